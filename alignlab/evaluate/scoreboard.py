"""An `eval.json` on one screen of text; imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LEFT_OUT = ("accuracy by slice",)  # of the table; eval.json and the report have them
MEASURE = 40  # characters
WIDEST = 22  # characters of a model's column
LINES = 3  # of a warning


def show(found: Mapping[str, Any], file: Path) -> str:
    """The table, the win rates, the ratings and the warnings of an evaluation."""
    names, against = [model["name"] for model in found["models"]], found["against"]
    ours = names[-1]
    decoding = found["decoding"]
    how = "sampled at temperature 1" if decoding["sampled"] else "greedy"
    head = (
        f"{', '.join(names)} on the test split: {found['pairs']} pairs; replies to {found['prompts']} prompts, {how}, "
        f"at most {decoding['max_new_tokens']} tokens; judge: {found['judge'] or 'none'}"
    )
    lines = [*textwrap.wrap(head, 110), "", _heading(names, ours, against)]
    group = None
    for row in found["table"]:
        if row["group"] in LEFT_OUT or not row["values"] or _is_category(row):
            continue
        if row["group"] != group:
            group = row["group"]
            lines.append(f"  {group}")
        lines.append(_row(row, names, ours))
    lines.append("  ± is half the 95 % interval; its edges and every n are in eval.json")
    lines += _wins(found["win_rates"]) + _ratings(found)
    for warning in found["warnings"]:
        lines += ["", *textwrap.wrap(warning, 108, initial_indent="  ! ", subsequent_indent="    ", max_lines=LINES)]
    return "\n".join([*lines, "", f"{file}  (and verdicts.jsonl beside it)"])


def _is_category(row: Mapping[str, Any]) -> bool:
    return row["group"] == "stereotype bias" and not row["measure"].endswith(": all")


def _widths(names: Sequence[str]) -> list[int]:
    return [min(max(15, len(name) + 2), WIDEST) for name in names]


def _short(name: str) -> str:
    return name if len(name) < WIDEST - 1 else f"{name[: WIDEST - 3]}…"


def _heading(names: Sequence[str], ours: str, against: str) -> str:
    columns = "".join(f"{_short(name):>{width}}" for name, width in zip(names, _widths(names), strict=True))
    change = f"{_short(ours)} − {_short(against)}"
    return f"{'':{MEASURE}}{columns}{change if len(change) < 17 else 'change':>17}{'n':>7}"


def _row(row: Mapping[str, Any], names: Sequence[str], ours: str) -> str:
    unit = f", {row['unit']}" if row["unit"] not in ("", "share") else ""
    label = f"{row['measure']}{unit}"
    label = label if len(label) < MEASURE - 4 else f"{label[: MEASURE - 6]}…"
    cells = "".join(
        f"{_cell(row['values'].get(name)):>{width}}" for name, width in zip(names, _widths(names), strict=True)
    )
    change = row["change"].get(ours)
    n = next((v["n"] for v in reversed(row["values"].values()) if v and v["n"]), "")
    return f"    {label:{MEASURE - 4}}{cells}{_cell(change, '+') + _star(change):>17}{n:>7}"


def _cell(estimate: Mapping[str, Any] | None, sign: str = "") -> str:
    if not estimate:
        return ""
    mean, low, high = estimate["mean"], estimate["low"], estimate["high"]
    digits = 3 if abs(mean) < 10 else 1
    half = "" if low is None else f" ±{(high - low) / 2:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{half}"


def _star(change: Mapping[str, Any] | None) -> str:
    """A mark where the interval of a change leaves zero out."""
    return " *" if change and change["low"] is not None and (change["low"] > 0 or change["high"] < 0) else "  "


def _wins(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [""] * bool(entries) + [_win(entry) for entry in entries]


def _win(entry: Mapping[str, Any]) -> str:
    raw = entry["raw"]
    counts = f"{entry['wins']} wins, {entry['ties']} ties, {entry['losses']} losses; p = {entry['p_value']:.2g}"
    edges = f"95 % interval {raw['low']:.3f} to {raw['high']:.3f}"
    return (
        f"  {_short(entry['a'])} over {_short(entry['b'])}, {entry['prompts']}: {raw['mean']:.3f}, {edges} ({counts})"
    )


def _ratings(found: Mapping[str, Any]) -> list[str]:
    if not found["ratings"]:
        return []
    shown = ", ".join(
        f"{each['model']} {each['elo']['mean']:.0f} ({each['elo']['low']:.0f} to {each['elo']['high']:.0f})"
        for each in found["ratings"]
    )
    return textwrap.wrap(f"ratings: {shown}; {found['ratings_note']}", 108, initial_indent="  ", subsequent_indent="  ")
