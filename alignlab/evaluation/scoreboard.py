"""An evaluation on one screen of text, 80 columns wide; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from alignlab.runs.evaluation import FILE, Comparison, Evaluation, Target
from alignlab.text.tables import Row, as_text, columns, paragraph, percent

LEFT_OUT = ("win rate", "accuracy by slice")  # groups of the table: said in words, and on the page
LINES = 4  # of a warning


def show(found: Evaluation, file: Path) -> str:
    """Who wins, the targets, the table, the ratings and the warnings of an evaluation kept in `file`."""
    names, against = found.names, found.against
    how = "sampled at temperature 1" if found.decoding["sampled"] else "greedy"
    replies = f"replies to {found.prompts} prompts, {how}, at most {found.decoding['max_new_tokens']} tokens"
    lines = paragraph(f"{', '.join(names)} on the test split: {found.pairs} pairs; {replies}")
    lines += [f"judge: {found.judge or 'none'}", ""]
    for each in found.win_rates:
        lines += _who_wins(each)
    lines += _targets(found.targets)
    rows = [row for row in found.table if row.group not in LEFT_OUT and not _is_category(row)]
    lines += ["", *as_text(rows, names, names[-1], against)]
    lines += paragraph("± is the standard error; 95 % intervals are in the file below, * marks a change beyond chance")
    lines += _ratings(found)
    for warning in found.warnings:
        lines += ["", *paragraph(f"warning: {warning}", more="    ", most=LINES)]
    return "\n".join([*lines, "", *_where(file)])


def _who_wins(of: Comparison) -> list[str]:
    rate = of.over(of.a, of.b)
    edges = f"{percent(rate.low)} to {percent(rate.high)}"
    head = f"{of.a} over {of.b}, {of.prompts}: {rate.counts} of {of.n}"
    return paragraph(f"{head}; win rate {percent(rate.mean)} ({edges}), p = {of.p_value:.2g}", more="    ")


def _targets(found: Sequence[Target]) -> list[str]:
    """Each target, what was measured, and whether that reaches it."""
    if not found:
        return []
    return ["", "targets", *columns([[each.name, each.limit_text, each.found_text, each.outcome] for each in found])]


def _is_category(row: Row) -> bool:
    return row.group == "stereotype bias" and not row.measure.endswith(": all")


def _ratings(found: Evaluation) -> list[str]:
    if not found.ratings:
        return []
    each = [
        f"{rating.model} {rating.elo.mean:.0f} ({rating.elo.low:.0f} to {rating.elo.high:.0f})"
        for rating in found.ratings
    ]
    return paragraph(f"ratings: {', '.join(each)}; {found.ratings_note}", more="    ")


def _where(file: Path) -> Iterator[str]:
    """The evaluation's file, and whether `eval.json` is the same one."""
    yield f"{file}"
    folder = file.parent.parent
    if (folder / FILE).read_bytes() != file.read_bytes():
        yield f"{folder / FILE} is still the fuller evaluation made before"
