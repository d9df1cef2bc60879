"""Figures and tables as people read them: on a terminal of 80 columns, as Markdown, and as CSV; imports no torch."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from alignlab.disk import write_text
from alignlab.errors import RecipeError
from alignlab.text.estimate import Estimate

WIDTH = 80  # characters of a terminal
LABEL, CELL, LONGEST, CHANGE, COUNT = 22, 13, 20, 14, 5  # characters of a table's columns
SHARE = "share"
FORMATS = (".csv", ".md")
TIDY = "group measure unit model mean stderr low high n wins ties losses change change_low change_high note".split()


@dataclass(frozen=True)
class WinRate(Estimate):
    """How often the replies of one model beat another's, a tie counting half, and the counts that it comes from."""

    wins: int | None = None
    ties: int | None = None
    losses: int | None = None

    @property
    def counts(self) -> str:
        """`68 wins, 40 ties, 9 losses`; empty where they were not recorded."""
        if self.wins is None or self.ties is None or self.losses is None:
            return ""
        counted = ((self.wins, "win", "wins"), (self.ties, "tie", "ties"), (self.losses, "loss", "losses"))
        return ", ".join(f"{n:,} {one if n == 1 else many}" for n, one, many in counted)

    def turned(self) -> WinRate:
        """The same seen from the other side."""
        other = turned(self)
        return WinRate(other.mean, other.stderr, other.n, other.low, other.high, self.losses, self.ties, self.wins)


def counts_of(of: Estimate | None) -> str:
    """The counts of a win rate; empty of any other figure."""
    return of.counts if isinstance(of, WinRate) else ""


def turned(share: Estimate) -> Estimate:
    """The share of the other side."""
    low, high = (None if edge is None else 1 - edge for edge in (share.high, share.low))
    return replace(share, mean=1 - share.mean, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of several models, and how far each lies from the one that all are compared with."""

    group: str
    measure: str
    unit: str = ""
    better: str | None = None  # higher or lower
    values: Mapping[str, Estimate | WinRate] = field(default_factory=dict)
    change: Mapping[str, Estimate | None] = field(default_factory=dict)
    note: str = ""

    @property
    def label(self) -> str:
        """`KL per reply, nats`."""
        return f"{self.measure}, {self.unit}" if self.unit not in ("", SHARE) else self.measure


# --- one figure ---


def number(value: float) -> str:
    """Three significant digits, in full up to ten million."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in whole percent; with one decimal near the ends, where that says more."""
    near_an_end = min(abs(value), abs(1 - value)) < 0.05 and value not in (0, 1)
    return f"{value:.1%}" if near_an_end else f"{value:.0%}"


def figure(estimate: Estimate, unit: str = "") -> str:
    """`0.62 ± 0.03 (n=256)`, a standard error behind the ±; of a win rate its counts too."""
    is_share = unit == SHARE
    error = estimate.stderr
    spread = "" if error is None else f" ± {percent(error) if is_share else f'{error:.2g}'}"
    sample = [f"n={estimate.n:,}"] if estimate.n else []
    sample += [counts] if (counts := counts_of(estimate)) else []
    shown = percent(estimate.mean) if is_share else number(estimate.mean)
    return shown + spread + (f" ({'; '.join(sample)})" if sample else "")


# --- a table on a terminal ---


def as_text(rows: Sequence[Row], names: Sequence[str], change_of: str | None = None, against: str = "") -> list[str]:
    """The lines of a table of at most 80 columns; models for which there is no room follow in a table of their own.

    `change_of` names the model whose difference from `against` has a column; a star marks those beyond chance.
    """
    lines: list[str] = []
    for few in _fitting(names, WIDTH - LABEL - COUNT - (CHANGE if change_of else 0)):
        shows_change = change_of if change_of in few else None
        lines += [""] * bool(lines) + [_head(few, shows_change, against)]
        for group, its in groupby(rows, key=lambda row: row.group):
            shown = [row for row in its if any(name in row.values for name in few)]
            if shown:
                lines.append(group)
            for row in shown:
                lines += _line(row, few, shows_change)
    return [line.rstrip() for line in lines]


def _width(name: str) -> int:
    return max(CELL, min(len(name), LONGEST) + 1)


def _fitting(names: Sequence[str], room: int) -> Iterator[list[str]]:
    """The names in portions whose columns fit into the room."""
    few: list[str] = []
    for name in names:
        if few and sum(map(_width, [*few, name])) > room:
            yield few
            few = []
        few.append(name)
    yield few


def _head(names: Sequence[str], change_of: str | None, against: str) -> str:
    columns = "".join(f"{ellipsis(name, LONGEST):>{_width(name)}}" for name in names)
    change = f"{change_of} − {against}"
    change = f"{change if len(change) < CHANGE else 'change':>{CHANGE}}" if change_of else ""
    return f"{'':{LABEL}}{columns}{change}{'n':>{COUNT}}"


def _line(row: Row, names: Sequence[str], change_of: str | None) -> list[str]:
    label = f"  {row.label}"
    cells = "".join(f"{_cell(row.values.get(name)):>{_width(name)}}" for name in names)
    change = row.change.get(change_of) if change_of else None
    moved = f"{_cell(change, '+') + ('*' if beyond_chance(change) else ' '):>{CHANGE}}" if change_of else ""
    sizes = {row.values[name].n for name in names if name in row.values} - {None}
    n = str(sizes.pop()) if len(sizes) == 1 else ""
    counts = [f"    {name}: {said}" for name in names if (said := counts_of(row.values.get(name)))]
    if len(label) <= LABEL:
        return [f"{label:{LABEL}}{cells}{moved}{n:>{COUNT}}", *counts]
    above = textwrap.wrap(label, WIDTH, subsequent_indent="  ")
    return [*above, f"{'':{LABEL}}{cells}{moved}{n:>{COUNT}}", *counts]


def _cell(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    if estimate.stderr is None and abs(estimate.mean) >= 100:  # a count, such as of steps
        return f"{estimate.mean:{sign},.0f}"
    digits = 3 if abs(estimate.mean) < 10 else 1
    error = "" if estimate.stderr is None else f"±{estimate.stderr:.{digits}f}"
    return f"{estimate.mean:{sign}.{digits}f}{error}"


def beyond_chance(change: Estimate | None) -> bool:
    """Whether the interval of a change leaves zero out."""
    if change is None or change.low is None or change.high is None:
        return False
    return change.low > 0 or change.high < 0


def ellipsis(name: str, most: int) -> str:
    """A name of at most `most` letters that keeps both its ends."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def columns(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Lines of plain text whose cells stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        " " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def paragraph(text: str, indent: str = "", more: str = "", most: int | None = None) -> list[str]:
    """A text in lines of at most 80 columns: `indent` before the first, `more` before the others."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=more or indent, max_lines=most)


# --- a table as a file ---


def check_table(file: str | Path | None) -> None:
    """RecipeError where a table cannot be written to such a file."""
    if file and Path(file).suffix not in FORMATS:
        raise RecipeError(f"--table {file}: a table is written as CSV or Markdown; end the name in .csv or .md")


def write_table(file: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """CSV with one line a figure, or Markdown with one column a model, by the file's suffix."""
    check_table(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, as_csv(rows) if file.suffix == ".csv" else as_markdown(rows, names))


def as_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(TIDY)
    for row in rows:
        for model, its in row.values.items():
            counts = (its.wins, its.ties, its.losses) if isinstance(its, WinRate) else ("", "", "")
            change = row.change.get(model)
            moved = (change.mean, change.low, change.high) if change else ("", "", "")
            shown = (its.mean, its.stderr, its.low, its.high, its.n, *counts, *moved)
            writer.writerow([row.group, row.measure, row.unit, model, *shown, row.note])
    return out.getvalue()


def as_markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = [["", *names], ["---"] * (len(names) + 1)]
    for group, its in groupby(rows, key=lambda row: row.group):
        lines += [[f"**{group}**", *[""] * len(names)]] if group else []
        for row in its:
            cells = [figure(row.values[name], row.unit) if name in row.values else "–" for name in names]
            lines.append([row.label, *cells])
    return "".join(f"| {' | '.join(map(markdown_cell, line))} |\n" for line in lines)


def markdown_cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
