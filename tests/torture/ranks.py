"""Launches of two ranks: all of them end with 0, also beside a load; and a rank that is killed is told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from workplace import append, copied, parts

LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
use_cpu: true
"""


def campaign(template: Path, root: Path, results: Path, minutes: float, launches: int) -> None:
    """One line for each launch; every second one runs beside a load, every fifth loses a rank on the way."""
    began = time.monotonic()
    done = parts(results, lambda row: row["launch"])
    for number in range(launches):
        if number in done:
            continue
        if time.monotonic() - began > 60 * minutes:
            return
        folder = copied(template, root / "ranks")
        (folder / "two.yaml").write_text(LAUNCH)
        load = _load() if number % 2 else []
        try:
            append(results, {"launch": number, "load": bool(load), **_launched(folder, killed=number % 5 == 4)})
        finally:
            for process in load:
                process.kill()


def _load() -> list[subprocess.Popen]:
    spin = "while True: pass"
    return [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]


def _launched(folder: Path, killed: bool) -> dict:
    command = [sys.executable, "-m", "alignlab", "sft", "constant", "--launch", "two.yaml"]
    environment = {**os.environ, "ALIGNLAB_CACHE": str(folder / "cache")}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": folder, "env": environment}
    process = subprocess.Popen(command, **pipes)
    if killed:
        _kill_rank(folder, process)
    _, said = process.communicate(timeout=600)
    fine = process.returncode != 0 if killed else process.returncode == 0
    fine = fine and "Traceback" not in said
    return {"killed": killed, "code": process.returncode, "same": fine, "said": "" if fine else said[-1500:]}


def _kill_rank(folder: Path, process: subprocess.Popen) -> None:
    """Kills the second rank once the run has begun to log."""
    metrics = folder / "runs" / "constant" / "sft" / "metrics.jsonl"
    while not metrics.is_file() and process.poll() is None:
        time.sleep(0.05)
    for pid in _descendants(process.pid):
        environment = Path(f"/proc/{pid}/environ")
        if environment.is_file() and b"\0RANK=1\0" in b"\0" + environment.read_bytes() + b"\0":
            os.kill(pid, signal.SIGKILL)
            return


def _descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [below for child in found for below in _descendants(int(child))]
