"""A run's own figures, and those of several runs, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from alignlab.recipe.objectives import STAGES
from alignlab.runs.evaluation import Evaluation
from alignlab.runs.facts import Evaluated, RunFacts, cost_rows
from alignlab.runs.sweep import group_by_setting, over_seeds
from alignlab.text.estimate import Estimate
from alignlab.text.tables import SHARE, Row

REWARD = "pairs whose chosen reply has the higher implicit reward: how much likelier training has made it"
NATS = "how far the replies have moved; 1 nat is a factor of 2.7 in probability"
PERPLEXITY = ("perplexity", "perplexity of chosen", "", "lower", "")
TEST = (  # figure, what it is called, unit, which side is better, what it is
    ("accuracy", "accuracy", SHARE, "higher", REWARD),
    ("margin", "margin", "", "higher", "chosen minus rejected reward"),
    PERPLEXITY,
    ("kl", "KL per reply", "nats", None, NATS),
    ("reply_tokens", "length", "tokens", None, ""),
    ("eos_rate", "ended by itself", SHARE, None, "an EOS or the next turn, not the limit"),
)
VALIDATION = ("perplexity", "reply_tokens", "eos_rate")


def own_rows(run: RunFacts) -> tuple[list[str], list[Row]]:
    """Base, SFT and DPO side by side, from what the runs wrote of themselves: the columns and the rows."""
    ours, before = run.stage.upper(), run.reference_name if STAGES[run.stage].from_sft else "base"
    rows = [_row("test split", figure, {ours: getattr(run.test, figure[0])}) for figure in TEST]
    if run.test.reference_perplexity:
        values = {before: run.test.reference_perplexity, ours: run.test.perplexity}
        rows[TEST.index(PERPLEXITY)] = _row("test split", PERPLEXITY, values)
    if run.win_rate:
        called = ("win_rate", f"win rate over {run.versus}", SHARE, "higher", run.judge or "")
        rows.insert(0, _row("test split", called, {ours: run.win_rate}))
    at: dict[str, Evaluated | None] = {before: run.first, ours: run.kept or run.last}
    if STAGES[run.stage].from_sft:
        at = {"base": run.before, **at}
    for figure in TEST:
        if figure[0] in VALIDATION:
            rows.append(_row("validation split", figure, {name: _single(its, figure[0]) for name, its in at.items()}))
    rows = [row for row in rows if row.values]
    return [name for name in at if any(name in row.values for row in rows)], rows


def compare_rows(
    runs: Sequence[RunFacts], found: Evaluation | None, called: Mapping[str, str]
) -> tuple[list[str], list[Row]]:
    """The runs' figures on the test split, one column a run; seeds of one setting are one column.

    Where they were judged side by side, as they are `called` in that evaluation, each one's win rate over the first.
    """
    groups = group_by_setting(runs, lambda run: {**run.settings, "stage": run.stage})
    names = [_group_name(its) for its in groups]

    def across(figure: Sequence[Any], value_of) -> Row:
        values = {}
        for name, its in zip(names, groups, strict=True):
            values[name] = value_of(its[0]) if len(its) == 1 else over_seeds([value_of(run) for run in its])
        return _row("test split", figure, values)

    first = next((run for run in runs if run.name in called), None)
    rows = []
    if found and first:
        over = ("", f"win rate over {first.label or first.name}", SHARE, "higher", "judged side by side")
        rows.append(across(over, lambda run: found.over(called.get(run.name, ""), called[first.name])))
    note = "each over what it started from: this does not compare the runs with each other"
    rows.append(across(("", "win rate over its own start", SHARE, "higher", note), lambda run: run.win_rate))
    rows += [across(figure, lambda run, name=figure[0]: getattr(run.test, name)) for figure in TEST]
    rows += cost_rows({name: _mean_cost(its) for name, its in zip(names, groups, strict=True)})
    return names, [row for row in rows if row.values]


def _mean_cost(runs: Sequence[RunFacts]) -> dict[str, float]:
    return {name: fmean(run.cost[name] for run in runs) for name in runs[0].cost if all(name in r.cost for r in runs)}


def _group_name(runs: Sequence[RunFacts]) -> str:
    name = runs[0].label or runs[0].name
    return name if len(runs) == 1 else f"{name}, {len(runs)} seeds"


def _row(group: str, figure: Sequence[Any], values: Mapping[str, Estimate | None]) -> Row:
    _, measure, unit, better, note = figure
    known = {name: value for name, value in values.items() if value}
    return Row(group=group, measure=measure, unit=unit, better=better, values=known, note=note)


def _single(evaluated: Evaluated | None, name: str) -> Estimate | None:
    value = getattr(evaluated, name) if evaluated else None
    return None if value is None else Estimate(value)
