"""Runs of the command line in processes of their own, and how two of them are compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from alignlab.runs.run import Run

TIMES = {"time", "eval/runtime", "eval/samples_per_second", "eval/steps_per_second"}


def alignlab(folder: Path, *arguments: str, wait: bool = True, **environment: str):
    """A finished process, or with `wait=False` one that is running; its output is text."""
    command = [sys.executable, "-m", "alignlab", *arguments]
    env = {**os.environ, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder, "env": env}
    return subprocess.run(command, **pipes) if wait else subprocess.Popen(command, **pipes)


def kill_when(process: subprocess.Popen, moment) -> None:
    """Kills the process as soon as `moment()` holds."""
    wait_until(process, moment)
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_until(process: subprocess.Popen, moment) -> None:
    deadline = time.time() + 120
    while not moment():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.01)


def weights(run: Run) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in run.model.glob("*.safetensors")}


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(one: Run, other: Run) -> None:
    """Equal weights, bit for bit, and equal rows but for times."""
    assert weights(one) == weights(other)
    assert timeless(one.metrics()) == timeless(other.metrics())
    assert one.samples() == other.samples()
    assert one.manifest.test == other.manifest.test
