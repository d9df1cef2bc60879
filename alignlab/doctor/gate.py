"""A gate for a data set: which findings may not be there, or on how large a share of the pairs at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignlab.doctor.finding import LEVELS, NAMES, left_out, why_left_out
from alignlab.errors import DataError, MachineError
from alignlab.recipe.fields import suggest


def read_limits(written: Sequence[str]) -> dict[str, float]:
    """`overlap`, `wrong` or `near-duplicates=0.01` → the share of pairs above which the gate closes, by name.

    Raises DataError for a name that is neither a finding nor a level, and for a share outside 0 to 1; MachineError for
    a finding that cannot be looked for here.
    """
    limits = {}
    for item in written:
        name, has_share, share = item.partition("=")
        if name not in (*NAMES, *LEVELS):
            raise DataError(f"--fail-on {item}: there is no finding {name!r}{suggest(name, (*NAMES, *LEVELS))}")
        if name in left_out():
            raise MachineError(f"--fail-on {item}: {why_left_out()}")
        limits[name] = _share(item, share) if has_share else 0.0
    return limits


def _share(item: str, share: str) -> float:
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise DataError(f"--fail-on {item}: {share!r} is not a share of the pairs from 0 to 1")
    return value


def failures(findings: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> list[str]:
    """One line for each finding that is there on more than its share; a level stands for findings as bad or worse."""
    lines = []
    for finding in findings:
        worse = [level for level in LEVELS[LEVELS.index(finding["level"]) :] if level in limits]
        name = finding["name"].partition(":")[0]
        limit = limits[name] if name in limits else min((limits[level] for level in worse), default=None)
        if limit is not None and finding["count"] and finding["share"] > limit:
            lines.append(f"{finding['name']}: {finding['says']} ({finding['share']:.2%} of {finding['of']:,})")
    return lines
