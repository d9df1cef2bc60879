"""A disk that fills: one line, exit code 2; with more room the same command ends as on a large disk."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workplace import append, copied, differences, outcome, parts, run_command

COMMANDS = (("sft", "steps"), ("dpo", "steps"), ("eval", "steps", "--replies", "4", "--max-new-tokens", "4"))
KIB = (64, 128, 256, 400, 560, 720, 900, 1200, 1600, 2200, 3000)  # a run of these recipes needs about 3 MiB


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """Mounts a tmpfs of this size over the folder; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def campaign(template: Path, root: Path, results: Path, minutes: float) -> None:
    """One line for each size and place: the exit codes, and whether the end is that of a large disk."""
    began = time.monotonic()
    large = copied(template, root / "large")
    for command in COMMANDS:
        done = run_command(large, command)
        assert done.code == 0, done.said
    expected = outcome(large)
    done = parts(results, lambda row: (row["place"], row["kib"]))
    for place in ("runs", "cache"):
        for kib in KIB:
            if (place, kib) in done:
                continue
            if time.monotonic() - began > 60 * minutes:
                return
            append(results, _filled(template, root / "small", place, kib, expected))


def _filled(template: Path, folder: Path, place: str, kib: int, expected: dict[str, str]) -> dict:
    copied(template, folder)
    said = []
    with small_disk(folder / place, kib):
        for command in COMMANDS:
            ending = run_command(folder, command)
            said.append(f"{ending.code}: {(ending.said.strip().splitlines() or [''])[-1][:160]}")
            if ending.traceback or ending.code not in (0, 2):
                return {"place": place, "kib": kib, "said": said, "same": False, "wrong": ending.said[-1500:]}
            if ending.code:
                break
        subprocess.run(["mount", "-o", "remount,size=1g", folder / place], check=True)
        for command in COMMANDS:
            ending = run_command(folder, command)
            if ending.code:
                return {"place": place, "kib": kib, "said": said, "same": False, "wrong": ending.said[-1500:]}
        wrong = differences(expected, outcome(folder))
    return {"place": place, "kib": kib, "said": said, "same": not wrong, "wrong": wrong}
