"""Which member of a sweep is the best: its runs' figures on validation pairs, the rule, and how sure it is.

The choice is made on the split that chose each run's checkpoint, so that the test figures of the chosen run are those
of pairs that chose nothing. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignlab.disk import read_lines, write_json
from alignlab.errors import RunError
from alignlab.estimate import Estimate, is_number, mean_estimate
from alignlab.facts.evaluation import scaled
from alignlab.facts.runs import RunFacts, read_run
from alignlab.facts.sweep import FILE, Sweep, SweepMember, read_sweep, sweep_rows
from alignlab.recipe import consumed
from alignlab.run import Run
from alignlab.sweep.members import Member, Members
from alignlab.text import as_text, paragraph

log = logging.getLogger(__name__)

SPLIT = "validation"
NEEDED = ("rewards/margins", "rewards/accuracies", "kl", "perplexity")
ON_TEST = ("margin", "accuracy", "kl")


@dataclass(frozen=True)
class Row:
    """A member, its line of the table, and what its run says besides."""

    member: Member
    shown: SweepMember
    margins: Sequence[float] = ()  # of each validation pair, where the run has kept them
    facts: RunFacts | None = None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def can_win(self) -> bool:
        return self.shown.status == "finished" and self.shown.margin is not None


def collect(members: Members, failures: Mapping[str, str] | None = None) -> Sweep:
    """Writes `sweep.json`: the members that are there, the choice among them, and why; and returns it.

    `failures` are what has just gone wrong, by member. A run that cannot be used is named, and the others count.
    """
    rows = [_row(member, members.folder, (failures or {}).get(member.name)) for member in members.all]
    limit = members.recipe.sweep.max_kl
    chosen, why = choose(rows, limit)
    found = Sweep(
        recipe=members.recipe.name,
        rule=f"largest margin among members with KL below {limit:g}",
        max_kl=limit,
        split=SPLIT,
        overrides=members.shared,
        choice=chosen.name if chosen else None,
        why=why,
        test={name: getattr(chosen.facts.test, name) for name in ON_TEST} if chosen else None,
        warnings=_warnings(rows),
        members=[row.shown for row in rows],
    )
    members.folder.mkdir(parents=True, exist_ok=True)
    write_json(members.table, asdict(found))
    return found


def chosen_run(folder: Path) -> Path:
    """The run that the sweep in this folder has chosen, for `--best`."""
    file = folder / FILE
    if not file.is_file():
        raise RunError(f"there is no {file} with a best run; make it with alignlab sweep, or leave out --best")
    sweep = read_sweep(file)
    if sweep.choice is None:
        raise RunError(f"{file} has chosen no member: {sweep.why}; name a run with --run")
    if not Run(folder / sweep.choice).has_started:
        raise RunError(f"{folder / sweep.choice}, which {file} has chosen, is not there; copy it beside {file.name}")
    return folder / sweep.choice


# --- what a run says ---


def _row(member: Member, folder: Path, failure: str | None) -> Row:
    path = folder / member.name
    shown = SweepMember(run=member.name, path=str(path), settings=dict(member.settings), error=failure)
    try:
        if failure or not Run(path).has_started:
            return Row(member, replace(shown, status="failed" if failure else "missing"))
        facts = read_run(path)
        _refuse_other_settings(member, facts)
        for notice in facts.notices:
            log.warning("%s: %s", path, notice)
        if facts.status != "finished":
            return Row(member, replace(shown, status=facts.status, error=facts.stop_reason), facts=facts)
        figures, margins = _figures(path, facts, member.beta)
        return Row(member, replace(shown, status="finished", **figures), margins, facts)
    except RunError as e:
        return Row(member, replace(shown, status="failed", error=str(e)))


def _refuse_other_settings(member: Member, facts: RunFacts) -> None:
    expected = _flat(json.loads(json.dumps(consumed(member.recipe, "dpo"), default=str)))
    found = _flat(facts.manifest.consumed)
    if changed := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        named = ", ".join(f"{key} was {found.get(key)!r}, is {expected.get(key)!r}" for key in changed)
        raise RunError(
            f"{facts.folder} was made from other settings: {named}; take it away, or sweep with those settings"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key in tree for k, v in _flat(tree[key], f"{prefix}.{key}" if prefix else key).items()}


def _figures(path: Path, facts: RunFacts, beta: float) -> tuple[dict[str, Any], list[float]]:
    """The figures at the step whose weights were kept, and the margin of each validation pair."""
    evaluated = [row for row in facts.rows if "eval/loss" in row]
    kept = next((row for row in reversed(evaluated) if row["step"] == facts.best_step), None)
    if kept is None:
        raise RunError(f"{path}/metrics.jsonl has no evaluation at step {facts.best_step}, whose weights were kept")
    if lacking := [name for name in NEEDED if not is_number(kept.get(f"eval/{name}"))]:
        raise RunError(f"{path}/metrics.jsonl has no number for eval/{lacking[0]} at step {kept['step']}")
    pairs = facts.manifest.data.kept.get(SPLIT) if facts.manifest.data else None
    logratios = _logratios(path)
    margins = [beta * (chosen - rejected) for chosen, rejected in logratios]
    if logratios:
        margin = mean_estimate(margins)
        accuracy = mean_estimate([chosen > rejected for chosen, rejected in logratios], share=True)
    else:
        margin = _logged(kept, "rewards/margins", pairs)
        accuracy = _logged(kept, "rewards/accuracies", pairs, share=True)
    figures = {
        "margin": margin,
        "margin_over_beta": scaled(margin, 1 / beta),
        "accuracy": accuracy,
        "kl": _logged(kept, "kl", _replies(path, kept["step"])),
        "win_rate": facts.win_rate,
        "perplexity_change": kept["eval/perplexity"] / evaluated[0]["eval/perplexity"] - 1,
    }
    return figures, margins


def _logratios(path: Path) -> list[tuple[float, float]]:
    """log π ÷ π_ref of each validation pair's chosen and rejected reply, in nats, where the run has kept them."""
    return [(row["chosen"], row["rejected"]) for row in _lines(Run(path).scores_file) if row["split"] == SPLIT]


def _replies(path: Path, step: int) -> int | None:
    return sum(row["step"] == step and row["split"] == SPLIT for row in _lines(Run(path).samples_file)) or None


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(file)
    except ValueError as e:
        raise RunError(f"{file} cannot be read ({e}); copy it again from where the run was made") from None


def _logged(row: Mapping[str, float], name: str, n: int | None, share: bool = False) -> Estimate:
    stderr = row.get(f"eval/{name}_stderr")
    return Estimate(row[f"eval/{name}"], stderr if is_number(stderr) else None, n).with_interval(share)


# --- the rule ---


def choose(rows: Sequence[Row], max_kl: float) -> tuple[Row | None, str]:
    """The member with the largest margin among those with KL below the limit, and why, in one sentence."""
    finished = [row for row in rows if row.can_win]
    if not finished:
        return None, "no member has finished"
    inside = sorted((row for row in finished if row.shown.kl.mean < max_kl), key=_margin, reverse=True)
    if not inside:
        nearest = min(finished, key=lambda row: row.shown.kl.mean)
        return None, (
            f"no member has a KL below {max_kl:g}: the lowest is {nearest.shown.kl.plus_minus()} of "
            f"{nearest.name}; try larger betas or a smaller dpo.learning_rate, or raise sweep.max_kl"
        )
    best = inside[0]
    said = [f"largest margin, {best.shown.margin.plus_minus()}, of {_count(len(inside))} with KL below {max_kl:g}"]
    said += [_against(best, inside[1])] if len(inside) > 1 else []
    return best, "; ".join([*said, *_near_the_limit(best, max_kl), *_scales(inside)])


def _margin(row: Row) -> float:
    return row.shown.margin.mean


def _count(members: int) -> str:
    return f"{members} members" if members > 1 else "the one member"


def _against(best: Row, second: Row) -> str:
    """Whether the best two can be told apart: by two standard errors of their difference."""
    difference, how = _difference(best, second)
    name = f"{second.name} ({second.shown.margin.plus_minus()})"
    if difference.stderr is None:
        return f"whether it can be told from {name} is not known, as their standard errors were not recorded"
    said = f"difference {difference.plus_minus()}, {how}"
    if abs(difference.mean) > 2 * difference.stderr:
        return f"told apart from {name}: {said}"
    lower = min(best, second, key=lambda row: row.shown.kl.mean)
    return f"cannot be told apart from {name} at this n: {said}; of the two {lower.name} has the lower KL"


def _difference(one: Row, other: Row) -> tuple[Estimate, str]:
    """The difference of two margins; over the same pairs where both runs have kept theirs."""
    if len(one.margins) == len(other.margins) > 1 and one.facts.fingerprint == other.facts.fingerprint:
        differences = [a - b for a, b in zip(one.margins, other.margins, strict=True)]
        return mean_estimate(differences), f"paired over the same {len(differences)} pairs"
    a, b = one.shown.margin, other.shown.margin
    stderr = math.hypot(a.stderr, b.stderr) if a.stderr is not None and b.stderr is not None else None
    return Estimate(a.mean - b.mean, stderr), "as of independent estimates"


def _near_the_limit(best: Row, max_kl: float) -> list[str]:
    kl = best.shown.kl
    near = kl.stderr is not None and kl.mean + 2 * kl.stderr >= max_kl
    return [f"its KL of {kl.plus_minus()} is within two standard errors of the limit"] if near else []


def _scales(inside: Sequence[Row]) -> list[str]:
    """Where betas differ: the margin grows with beta itself, so the rule leans towards large ones."""
    if len({row.member.beta for row in inside}) < 2:
        return []
    largest = max(inside, key=lambda row: row.shown.margin_over_beta.mean)
    return [
        f"a margin is beta times a log-ratio, which favours large betas: margin ÷ beta is largest for {largest.name}"
    ]


def _warnings(rows: Sequence[Row]) -> list[str]:
    """What makes figures of members hard to compare."""
    there = [row for row in rows if row.can_win]
    found = []
    if len({row.facts.fingerprint for row in there}) > 1:
        each = ", ".join(f"{row.name} {(row.facts.fingerprint or 'unknown')[:8]}" for row in there)
        found.append(f"the members were made from different data, so their figures do not compare one to one: {each}")
    for key in ("monitor.kl.max_new_tokens", "monitor.kl.prompts"):
        values = {row.name: row.facts.settings.get(key) for row in there}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in values.items())
            found.append(f"KL was not measured alike: {key} is {each}")
    return found


# --- on a terminal ---


def render(sweep: Sweep, folder: Path) -> str:
    """The table, the choice and why, 80 columns wide."""
    done = [member for member in sweep.members if member.status == "finished"]
    size = f"{len(done)} of {len(sweep.members)} member{'s' * (len(sweep.members) > 1)} finished"
    lines = paragraph(f"{sweep.recipe}: {size}; figures at the step whose weights each kept")
    lines += ["", *as_text(sweep_rows(sweep), [member.label for member in sweep.settings if member.margin])]
    lines += paragraph(f"± is the standard error; 95 % intervals are in {FILE}") if done else []
    for member in sweep.members:
        if member.status != "finished":
            lines += paragraph(
                f"{member.run}: {member.status}" + (f": {member.error}" if member.error else ""), more="  "
            )
    for warning in sweep.warnings:
        lines += paragraph(f"warning: {warning}", more="  ")
    chosen = f"chosen: {sweep.choice}, {sweep.why}" if sweep.choice else f"none is chosen: {sweep.why}"
    return "\n".join([*lines, "", *paragraph(chosen, more="  "), *_on_test(sweep), f"{folder / FILE}"])


def _on_test(sweep: Sweep) -> list[str]:
    """The chosen member's figures on pairs that chose nothing."""
    said = [f"{name} {of}" for name, of in (sweep.test or {}).items() if of]
    return paragraph(f"its test split, which chose nothing: {', '.join(said)}", more="  ") if said else []
