"""A run's metrics and replies, read as far as they are whole: still being written, cut off by a crash, or damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignlab.disk import read_row
from alignlab.text.estimate import is_number

MetricRow = Mapping[str, Any]
NAMES = (  # of the metrics that anybody shows; the rest of a long run's log would only take memory and time
    "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies kl perplexity reply_tokens eos_rate "
    "repetition distinct_2 epoch"
).split()
READ = {f"{split}/{name}{of}" for split in ("eval", "train") for name in NAMES for of in ("", "_stderr")}
READ |= {"step", "time"}


def read_metrics(file: Path) -> tuple[list[MetricRow], list[str]]:
    """The rows that can be read, in order of their steps, and one sentence for each thing that was left out."""
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    tail = lines.pop() if lines else b""
    found = [_metrics(line) for line in lines if line.strip()]
    last = _metrics(tail)
    bad = found.count(None)
    rows = sorted((row for row in [*found, last] if row), key=lambda row: row["step"])
    notices = []
    if tail.strip() and last is None:
        used = f"used up to step {rows[-1]['step']}" if rows else "nothing before it"
        notices.append(f"the last line of {file.name} is cut off, by a crash or a write under way: {used}")
    if bad:
        lines_are = "line of {} cannot be read and is" if bad == 1 else "lines of {} cannot be read and are"
        notices.append(f"{bad} {lines_are.format(file.name)} left out")
    return rows, notices


def _metrics(line: bytes) -> MetricRow | None:
    row = read_row(line)
    if row is None or not is_number(row.get("step")):
        return None
    return {key: row[key] for key in READ & row.keys()}


def last_samples(file: Path) -> list[Mapping[str, Any]]:
    """The rows of a run's last sampling: those of the test split where there is one."""
    rows: list[Mapping[str, Any]] = []
    for line in reversed(file.read_bytes().split(b"\n") if file.is_file() else []):
        row = read_row(line, prompt=str, reply=str)
        if row is None:
            continue
        if rows and (row.get("step"), row.get("split")) != (rows[0].get("step"), rows[0].get("split")):
            break
        rows.append(row)
    return rows[::-1]
