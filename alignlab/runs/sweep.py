"""A sweep as a table: one column a setting, over its seeds where it was trained with several; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignlab.runs.run import Sweep, SweepMember
from alignlab.text.estimate import Estimate, mean_estimate
from alignlab.text.tables import SHARE, Row, WinRate

FIGURES = ("margin", "margin_over_beta", "accuracy", "kl", "win_rate")


def label_of(member: SweepMember) -> str:
    """`beta 0.3`."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in member.settings.items()) or member.run


def settings_of(sweep: Sweep) -> list[SweepMember]:
    """The members, where those that differ in their seeds only are one, over their seeds."""
    groups = group_by_setting(sweep.members, lambda member: member.settings)
    return [_over_seeds(its) if len(its) > 1 else its[0] for its in groups]


def columns_of(sweep: Sweep) -> list[str]:
    """The columns of a sweep's table."""
    return [label_of(member) for member in settings_of(sweep) if member.margin]


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
    figures: dict[str, Any] = {name: over_seeds([getattr(member, name) for member in done]) for name in FIGURES}
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
    totals: dict[str, Any] = {name: None if None in its else sum(its) for name, its in counts.items()}
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
    shown = [member for member in settings_of(sweep) if member.margin]
    rows = [
        Row(
            group=group,
            measure=called,
            unit=unit,
            better=better,
            values={label_of(member): its for member in shown if (its := getattr(member, name))},
        )
        for name, group, called, unit, better in measures
    ]
    changes = {label_of(m): Estimate(m.perplexity_change) for m in shown if m.perplexity_change is not None}
    rows.insert(4, Row(group=on, measure="perplexity change", unit=SHARE, better="lower", values=changes))
    return [row for row in rows if row.values]
