"""What `sweep.json` says of the runs of one recipe with several settings, and seeds of one setting as one; no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab import typed
from alignlab.estimate import Estimate, mean_estimate
from alignlab.text import SHARE, Row, WinRate

FILE = "sweep.json"
FIGURES = ("margin", "margin_over_beta", "accuracy", "kl", "win_rate")


@dataclass(frozen=True, kw_only=True)
class SweepMember:
    """A member of a sweep: figures on validation pairs at the step whose weights it kept, none where there are none."""

    run: str
    path: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # what is its own: "dpo.beta" → 0.3
    status: str = "missing"
    error: str | None = None
    margin: Estimate | None = None
    margin_over_beta: Estimate | None = None
    accuracy: Estimate | None = None
    kl: Estimate | None = None
    win_rate: Estimate | WinRate | None = None  # on the test split
    perplexity_change: float | None = None

    @property
    def label(self) -> str:
        """`beta 0.3`."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items()) or self.run


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep.json` holds: the members with their figures, and the choice."""

    members: Sequence[SweepMember]
    recipe: str = ""
    rule: str = ""
    max_kl: float | None = None
    split: str = "validation"
    overrides: Sequence[str] = ()
    choice: str | None = None
    why: str | None = None
    test: Mapping[str, Estimate | None] | None = None  # the chosen run's figures on pairs that chose nothing
    warnings: Sequence[str] = ()

    @property
    def settings(self) -> list[SweepMember]:
        """The members, where those that differ in their seeds only are one, over their seeds."""
        groups = group_by_setting(self.members, lambda member: member.settings)
        return [_over_seeds(its) if len(its) > 1 else its[0] for its in groups]


def read_sweep(file: Path) -> Sweep:
    """What `alignlab sweep` wrote."""
    return typed.read_file(Sweep, file, "make it anew with alignlab sweep")


def group_by_setting(items: Sequence[Any], settings_of: Callable[[Any], Mapping[str, Any]]) -> list[list[Any]]:
    """Items whose settings are the same but for their seeds, together; in the order of the first of each."""
    groups: dict[Hashable, list[Any]] = {}
    for item in items:
        groups.setdefault(_without_seeds(settings_of(item)), []).append(item)
    return list(groups.values())


def _without_seeds(settings: Mapping[str, Any]) -> Hashable:
    return tuple(sorted((key, json.dumps(value)) for key, value in settings.items() if not key.endswith("seed")))


def _over_seeds(members: Sequence[SweepMember]) -> SweepMember:
    done = [member for member in members if member.margin]
    figures = {name: over_seeds([getattr(member, name) for member in done]) for name in FIGURES}
    changes = [member.perplexity_change for member in done if member.perplexity_change is not None]
    own = {key: value for key, value in members[0].settings.items() if not key.endswith("seed")}
    return replace(
        members[0],
        run=f"{len(done)} of {len(members)} seeds of {members[0].run}",
        settings={**own, "seeds": len(done)},
        status="finished" if done else members[0].status,
        perplexity_change=sum(changes) / len(changes) if changes else None,
        **figures,
    )


def over_seeds(estimates: Sequence[Estimate | WinRate | None]) -> Estimate | WinRate | None:
    """The mean over seeds, with the interval of their scatter; n counts seeds."""
    known = [each for each in estimates if each]
    if not known:
        return None
    mean = mean_estimate([each.mean for each in known])
    if not all(isinstance(each, WinRate) for each in known):
        return mean
    counts = {name: [getattr(each, name) for each in known] for name in ("wins", "ties", "losses")}
    totals = {name: None if None in its else sum(its) for name, its in counts.items()}
    return WinRate(**vars(mean), **totals)


def sweep_rows(sweep: Sweep) -> list[Row]:
    """The figures of the members as a table, one column each; seeds of one setting are one column."""
    on = f"{sweep.split} split"
    measures = (
        ("margin", on, "margin", "", "higher"),
        ("margin_over_beta", on, "margin ÷ beta", "", "higher"),
        ("accuracy", on, "accuracy", SHARE, "higher"),
        ("kl", on, "KL, nats per reply", "", "lower"),
        ("win_rate", "test split", "win rate", SHARE, "higher"),
    )
    shown = [member for member in sweep.settings if member.margin]
    rows = [
        Row(
            group=group,
            measure=called,
            unit=unit,
            better=better,
            values={member.label: its for member in shown if (its := getattr(member, name))},
        )
        for name, group, called, unit, better in measures
    ]
    changes = {m.label: Estimate(m.perplexity_change) for m in shown if m.perplexity_change is not None}
    rows.insert(4, Row(group=on, measure="perplexity change", unit=SHARE, better="lower", values=changes))
    return [row for row in rows if row.values]
