"""Which member of a sweep is the best: its runs' figures on validation pairs, the rule, and how sure it is.

The choice is made on the split that chose each run's checkpoint, so that the test figures of the chosen run are those
of pairs that chose nothing. Imports no torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignlab.disk import write_record
from alignlab.errors import RunError
from alignlab.recipe.load import consumed
from alignlab.runs.evaluation import scaled
from alignlab.runs.facts import RunFacts, read_run
from alignlab.runs.run import SWEEP, Run, Sweep, SweepMember, changed_settings
from alignlab.runs.sweep import FIGURES, columns_of, sweep_rows
from alignlab.sweeps.members import Member, Members
from alignlab.text.estimate import Estimate, is_number, mean_estimate
from alignlab.text.tables import WinRate, as_text, paragraph

log = logging.getLogger(__name__)

SPLIT = "validation"
NEEDED = ("rewards/margins", "rewards/accuracies", "kl", "perplexity")
ON_TEST = ("margin", "accuracy", "kl")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of a member that has finished, at the step whose weights it kept."""

    name: str
    beta: float
    margin: Estimate
    margin_over_beta: Estimate
    accuracy: Estimate
    kl: Estimate
    win_rate: Estimate | WinRate | None = None
    perplexity_change: float = 0.0
    margins: Sequence[float] = ()  # of each validation pair, where the run has kept them
    fingerprint: str | None = None  # of its data
    settings: Mapping[str, str] = field(default_factory=dict)  # of its recipe
    on_test: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A member and what its run says of itself."""

    member: Member
    path: Path
    status: str = "missing"
    error: str | None = None
    measured: Measured | None = None


def collect(members: Members, failures: Mapping[str, str] | None = None) -> Sweep:
    """Writes `sweep.json`: the members that are there, the choice among them, and why; and returns it.

    `failures` are what has just gone wrong, by member. A run that cannot be used is named, and the others count.
    """
    rows = [_row(member, members.folder, (failures or {}).get(member.name)) for member in members.all]
    measured = [row.measured for row in rows if row.measured]
    limit = members.recipe.sweep.max_kl
    chosen, why = choose(measured, limit)
    sweep = Sweep(
        recipe=members.recipe.name,
        rule=f"largest margin among members with KL below {limit:g}",
        max_kl=limit,
        split=SPLIT,
        overrides=members.shared,
        choice=chosen.name if chosen else None,
        why=why,
        test=chosen.on_test if chosen else None,
        warnings=_warnings(measured),
        members=[_written(row) for row in rows],
    )
    members.folder.mkdir(parents=True, exist_ok=True)
    write_record(members.folder / SWEEP, asdict(sweep))
    return sweep


# --- what a run says ---


def _row(member: Member, folder: Path, failure: str | None) -> Row:
    path = folder / member.name
    try:
        status = Run(path).manifest.status if Run(path).has_started else "missing"
        if failure or status == "missing":
            return Row(member, path, "failed" if failure else status, failure)
        facts = read_run(path)
        _refuse_other_settings(member, path)
        for notice in facts.notices:
            log.warning("%s: %s", path, notice)
        if status != "finished":
            return Row(member, path, status, facts.stop_reason)
        return Row(member, path, status, measured=_measured(member, path, facts))
    except RunError as e:
        return Row(member, path, "failed", str(e))


def _refuse_other_settings(member: Member, path: Path) -> None:
    if changed := changed_settings(Run(path), consumed(member.recipe, "dpo")):
        raise RunError(f"{path} was made from other settings: {changed}; take it away, or sweep with those settings")


def _measured(member: Member, path: Path, facts: RunFacts) -> Measured:
    evaluated = [row for row in facts.rows if "eval/loss" in row]
    kept = next((row for row in reversed(evaluated) if row["step"] == facts.best_step), None)
    if kept is None:
        raise RunError(f"{path}/metrics.jsonl has no evaluation at step {facts.best_step}, whose weights were kept")
    if lacking := [name for name in NEEDED if not is_number(kept.get(f"eval/{name}"))]:
        raise RunError(f"{path}/metrics.jsonl has no number for eval/{lacking[0]} at step {kept['step']}")
    if evaluated[0]["step"] != 0 or not is_number(evaluated[0].get("eval/perplexity")):
        raise RunError(f"{path}/metrics.jsonl has no perplexity before the first step")
    pairs, beta = facts.manifest.data.kept.get(SPLIT) if facts.manifest.data else None, member.beta
    logratios = _logratios(path, pairs)
    margins = [beta * (chosen - rejected) for chosen, rejected in logratios]
    if logratios:
        margin = mean_estimate(margins)
        accuracy = mean_estimate([chosen > rejected for chosen, rejected in logratios], share=True)
    else:
        margin = _logged(kept, "rewards/margins", pairs)
        accuracy = _logged(kept, "rewards/accuracies", pairs, share=True)
    return Measured(
        name=member.name,
        beta=beta,
        margin=margin,
        margin_over_beta=scaled(margin, 1 / beta),
        accuracy=accuracy,
        kl=_logged(kept, "kl", _replies(path, kept["step"])),
        win_rate=facts.win_rate,
        perplexity_change=kept["eval/perplexity"] / evaluated[0]["eval/perplexity"] - 1,
        margins=margins,
        fingerprint=facts.fingerprint,
        settings=facts.settings,
        on_test={name: of for name in ON_TEST if (of := getattr(facts.test, name))},
    )


def _logratios(path: Path, pairs: int | None) -> list[tuple[float, float]]:
    """log π ÷ π_ref of each validation pair's chosen and rejected reply, in nats, where the run has kept them all."""
    rows = [row for row in Run(path).scores() if row["split"] == SPLIT]
    there = [row["pair"] for row in rows]
    if there != list(range(len(rows) if pairs is None else pairs)):
        return []
    return [(row["chosen"], row["rejected"]) for row in rows]


def _replies(path: Path, step: int) -> int | None:
    return sum(row["step"] == step and row["split"] == SPLIT for row in Run(path).samples()) or None


def _logged(row: Mapping[str, float], name: str, n: int | None, share: bool = False) -> Estimate:
    stderr = row.get(f"eval/{name}_stderr")
    return Estimate(row[f"eval/{name}"], stderr if is_number(stderr) else None, n).with_interval(share)


# --- the rule ---


def choose(finished: Sequence[Measured], max_kl: float) -> tuple[Measured | None, str]:
    """The member with the largest margin among those with KL below the limit, and why, in one sentence."""
    if not finished:
        return None, "no member has finished"
    inside = [member for member in finished if member.kl.mean < max_kl]
    inside.sort(key=lambda member: member.margin.mean, reverse=True)
    if not inside:
        nearest = min(finished, key=lambda member: member.kl.mean)
        return None, (
            f"no member has a KL below {max_kl:g}: the lowest is {nearest.kl.plus_minus()} of {nearest.name}; "
            f"try larger betas or a smaller dpo.learning_rate, or raise sweep.max_kl"
        )
    best = inside[0]
    said = [f"largest margin, {best.margin.plus_minus()}, of {_count(len(inside))} with KL below {max_kl:g}"]
    said += [_against(best, inside[1])] if len(inside) > 1 else []
    return best, "; ".join([*said, *_near_the_limit(best, max_kl), *_scales(inside)])


def _count(members: int) -> str:
    return f"{members} members" if members > 1 else "the one member"


def _against(best: Measured, second: Measured) -> str:
    """Whether the best two can be told apart: by two standard errors of their difference."""
    difference, how = _difference(best, second)
    name = f"{second.name} ({second.margin.plus_minus()})"
    if difference.stderr is None:
        return f"whether it can be told from {name} is not known, as their standard errors were not recorded"
    said = f"difference {difference.plus_minus()}, {how}"
    if abs(difference.mean) > 2 * difference.stderr:
        return f"told apart from {name}: {said}"
    lower = min(best, second, key=lambda member: member.kl.mean)
    return f"cannot be told apart from {name} at this n: {said}; of the two {lower.name} has the lower KL"


def _difference(one: Measured, other: Measured) -> tuple[Estimate, str]:
    """The difference of two margins; over the same pairs where both runs have kept theirs."""
    if len(one.margins) == len(other.margins) > 1 and one.fingerprint == other.fingerprint:
        differences = [a - b for a, b in zip(one.margins, other.margins, strict=True)]
        return mean_estimate(differences), f"paired over the same {len(differences)} pairs"
    a, b = one.margin, other.margin
    stderr = math.hypot(a.stderr, b.stderr) if a.stderr is not None and b.stderr is not None else None
    return Estimate(a.mean - b.mean, stderr), "as of independent estimates"


def _near_the_limit(best: Measured, max_kl: float) -> list[str]:
    kl = best.kl
    near = kl.stderr is not None and kl.mean + 2 * kl.stderr >= max_kl
    return [f"its KL of {kl.plus_minus()} is within two standard errors of the limit"] if near else []


def _scales(inside: Sequence[Measured]) -> list[str]:
    """Where betas differ: the margin grows with beta itself, so the rule leans towards large ones."""
    if len({member.beta for member in inside}) < 2:
        return []
    largest = max(inside, key=lambda member: member.margin_over_beta.mean)
    return [
        f"a margin is beta times a log-ratio, which favours large betas: margin ÷ beta is largest for {largest.name}"
    ]


def _warnings(finished: Sequence[Measured]) -> list[str]:
    """What makes figures of members hard to compare."""
    found = []
    if len({member.fingerprint for member in finished}) > 1:
        each = ", ".join(f"{member.name} {(member.fingerprint or 'unknown')[:8]}" for member in finished)
        found.append(f"the members were made from different data, so their figures do not compare one to one: {each}")
    for key in ("monitor.kl.max_new_tokens", "monitor.kl.prompts"):
        values = {member.name: member.settings.get(key) for member in finished}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in values.items())
            found.append(f"KL was not measured alike: {key} is {each}")
    return found


# --- written down ---


def _written(row: Row) -> SweepMember:
    figures = {name: getattr(row.measured, name) for name in (*FIGURES, "perplexity_change")} if row.measured else {}
    about: dict[str, Any] = {"run": row.member.name, "path": str(row.path), "settings": row.member.settings}
    return SweepMember(**about, status=row.status, error=row.error, **figures)


def render(sweep: Sweep, folder: Path) -> str:
    """The table, the choice and why, 80 columns wide."""
    done = [member for member in sweep.members if member.status == "finished"]
    size = f"{len(done)} of {len(sweep.members)} member{'s' * (len(sweep.members) > 1)} finished"
    lines = paragraph(f"{sweep.recipe}: {size}; figures at the step whose weights each kept")
    if done:
        lines += ["", *as_text(sweep_rows(sweep), columns_of(sweep))]
        lines += paragraph(f"± is the standard error; 95 % intervals are in {SWEEP}")
    for member in sweep.members:
        if member.status != "finished":
            error = f": {member.error}" if member.error else ""
            lines += paragraph(f"{member.run}: {member.status}{error}", more="  ")
    for warning in sweep.warnings:
        lines += paragraph(f"warning: {warning}", more="  ")
    chosen = f"chosen: {sweep.choice}, {sweep.why}" if sweep.choice else f"none is chosen: {sweep.why}"
    return "\n".join([*lines, "", *paragraph(chosen, more="  "), *_on_test(sweep), f"{folder / SWEEP}"])


def _on_test(sweep: Sweep) -> list[str]:
    """The chosen member's figures on pairs that chose nothing."""
    said = [f"{name} {figure}" for name, figure in (sweep.test or {}).items() if figure]
    return paragraph(f"its test split, which chose nothing: {', '.join(said)}", more="  ") if said else []
