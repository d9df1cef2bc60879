"""Which member of a sweep is the best: its runs' figures on validation pairs, the rule, and how sure it is.

The choice is made on the split that chose each run's checkpoint, so that the test figures of the chosen run are those
of pairs that chose nothing. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from alignlab.disk import read_lines, write_json
from alignlab.errors import RunError
from alignlab.estimate import Estimate, mean_estimate
from alignlab.recipe import consumed
from alignlab.report.curves import is_number
from alignlab.report.reading import read_run, read_sweep
from alignlab.run import Run
from alignlab.sweep.members import Member, Members

log = logging.getLogger(__name__)

SPLIT = "validation"
NEEDED = ("rewards/margins", "rewards/accuracies", "kl", "perplexity")
ON_TEST = ("margin", "accuracy", "kl")
FIGURES = ("margin", "margin_over_beta", "accuracy", "kl", "win_rate")


@dataclass(frozen=True)
class Row:
    """A member and what its run says of itself."""

    member: Member
    path: Path
    status: str = "missing"
    error: str | None = None
    figures: Mapping[str, Estimate | None] | None = None
    margins: Sequence[float] = ()  # of each validation pair, where the run has kept them
    perplexity_change: float | None = None
    facts: Mapping[str, Any] | None = None  # of the run, as a report has them

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def can_win(self) -> bool:
        return bool(self.status == "finished" and self.figures)


def collect(members: Members, failures: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Writes `sweep.json`: the members that are there, the choice among them, and why; and returns it.

    `failures` are what has just gone wrong, by member. A run that cannot be used is named, and the others count.
    """
    rows = [_row(member, members.folder, (failures or {}).get(member.name)) for member in members.all]
    limit = members.recipe.sweep.max_kl
    chosen, why = choose(rows, limit)
    table = {
        "recipe": members.recipe.name,
        "rule": f"largest margin among members with KL below {limit:g}",
        "max_kl": limit,
        "split": SPLIT,
        "overrides": members.shared,
        "choice": chosen.name if chosen else None,
        "why": why,
        "test": {name: chosen.facts["test"].get(name) for name in ON_TEST} if chosen else None,
        "warnings": _warnings(rows),
        "members": [_as_json(row) for row in rows],
    }
    members.folder.mkdir(parents=True, exist_ok=True)
    write_json(members.table, table)
    return table


def chosen_run(folder: Path) -> Path:
    """The run that the sweep in this folder has chosen, for `--best`."""
    file = folder / "sweep.json"
    if not file.is_file():
        raise RunError(f"there is no {file} with a best run; make it with alignlab sweep, or leave out --best")
    sweep = read_sweep(file)
    if sweep["choice"] is None:
        raise RunError(f"{file} has chosen no member: {sweep['why']}; name a run with --run")
    if not Run(folder / sweep["choice"]).manifest:
        raise RunError(f"{folder / sweep['choice']}, which {file} has chosen, is not there; copy it beside {file.name}")
    return folder / sweep["choice"]


# --- what a run says ---


def _row(member: Member, folder: Path, failure: str | None) -> Row:
    path = folder / member.name
    try:
        status = Run(path).manifest.get("status", "missing")
        if failure or status == "missing":
            return Row(member, path, "failed" if failure else status, failure)
        facts = read_run(path)
        _refuse_other_settings(member, path)
        for notice in facts["notices"]:
            log.warning("%s: %s", path, notice)
        if status != "finished":
            return Row(member, path, status, facts["stop_reason"], facts=facts)
        return Row(member, path, status, facts=facts, **_figures(path, facts, member.beta))
    except RunError as e:
        return Row(member, path, "failed", str(e))


def _refuse_other_settings(member: Member, path: Path) -> None:
    expected = _flat(json.loads(json.dumps(consumed(member.recipe, "dpo"), default=str)))
    found = _flat(Run(path).manifest.get("consumed", {}))
    if changed := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        named = ", ".join(f"{key} was {found.get(key)!r}, is {expected.get(key)!r}" for key in changed)
        raise RunError(f"{path} was made from other settings: {named}; take it away, or sweep with those settings")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key in tree for k, v in _flat(tree[key], f"{prefix}.{key}" if prefix else key).items()}


def _figures(path: Path, facts: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """The figures at the step whose weights were kept."""
    evaluated = [row for row in facts["rows"] if "eval/loss" in row]
    kept = next((row for row in reversed(evaluated) if row["step"] == facts["best_step"]), None)
    if kept is None:
        raise RunError(f"{path}/metrics.jsonl has no evaluation at step {facts['best_step']}, whose weights were kept")
    if lacking := [name for name in NEEDED if not is_number(kept.get(f"eval/{name}"))]:
        raise RunError(f"{path}/metrics.jsonl has no number for eval/{lacking[0]} at step {kept['step']}")
    pairs = (facts["data"].get("kept") or {}).get(SPLIT)
    logratios = _logratios(path)
    margins = [beta * (chosen - rejected) for chosen, rejected in logratios]
    if logratios:
        margin = mean_estimate(margins)
        accuracy = mean_estimate([chosen > rejected for chosen, rejected in logratios], share=True)
    else:
        margin = _logged(kept, "rewards/margins", pairs)
        accuracy = _logged(kept, "rewards/accuracies", pairs, share=True)
    over_beta = Estimate(margin.mean / beta, margin.stderr and margin.stderr / beta, margin.n)
    return {
        "figures": {
            "margin": margin,
            "margin_over_beta": over_beta.with_interval(),
            "accuracy": accuracy,
            "kl": _logged(kept, "kl", _replies(path, kept["step"])),
            "win_rate": _win_rate(facts["win_rate"]),
        },
        "margins": margins,
        "perplexity_change": kept["eval/perplexity"] / evaluated[0]["eval/perplexity"] - 1,
    }


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


def _win_rate(found: Mapping[str, Any] | None) -> Estimate | None:
    return _estimate(found) if found else None


def _estimate(found: Mapping[str, Any]) -> Estimate:
    return Estimate(**{field.name: found.get(field.name) for field in fields(Estimate)})


# --- the rule ---


def choose(rows: Sequence[Row], max_kl: float) -> tuple[Row | None, str]:
    """The member with the largest margin among those with KL below the limit, and why, in one sentence."""
    finished = [row for row in rows if row.can_win]
    if not finished:
        return None, "no member has finished"
    inside = sorted((row for row in finished if row.figures["kl"].mean < max_kl), key=_margin, reverse=True)
    if not inside:
        nearest = min(finished, key=lambda row: row.figures["kl"].mean)
        return None, (
            f"no member has a KL below {max_kl:g}: the lowest is {nearest.figures['kl'].plus_minus()} of "
            f"{nearest.name}; try larger betas or a smaller dpo.learning_rate, or raise sweep.max_kl"
        )
    best = inside[0]
    said = [f"largest margin, {best.figures['margin'].plus_minus()}, of {_count(len(inside))} with KL below {max_kl:g}"]
    said += [_against(best, inside[1])] if len(inside) > 1 else []
    return best, "; ".join([*said, *_near_the_limit(best, max_kl), *_scales(inside)])


def _margin(row: Row) -> float:
    return row.figures["margin"].mean


def _count(members: int) -> str:
    return f"{members} members" if members > 1 else "the one member"


def _against(best: Row, second: Row) -> str:
    """Whether the best two can be told apart: by two standard errors of their difference."""
    difference, how = _difference(best, second)
    name = f"{second.name} ({second.figures['margin'].plus_minus()})"
    if difference.stderr is None:
        return f"whether it can be told from {name} is not known, as their standard errors were not recorded"
    said = f"difference {difference.plus_minus()}, {how}"
    if abs(difference.mean) > 2 * difference.stderr:
        return f"told apart from {name}: {said}"
    lower = min(best, second, key=lambda row: row.figures["kl"].mean)
    return f"cannot be told apart from {name} at this n: {said}; of the two {lower.name} has the lower KL"


def _difference(one: Row, other: Row) -> tuple[Estimate, str]:
    """The difference of two margins; over the same pairs where both runs have kept theirs."""
    if len(one.margins) == len(other.margins) > 1 and _fingerprint(one) == _fingerprint(other):
        differences = [a - b for a, b in zip(one.margins, other.margins, strict=True)]
        return mean_estimate(differences), f"paired over the same {len(differences)} pairs"
    a, b = one.figures["margin"], other.figures["margin"]
    stderr = math.hypot(a.stderr, b.stderr) if a.stderr is not None and b.stderr is not None else None
    return Estimate(a.mean - b.mean, stderr), "as of independent estimates"


def _near_the_limit(best: Row, max_kl: float) -> list[str]:
    kl = best.figures["kl"]
    near = kl.stderr is not None and kl.mean + 2 * kl.stderr >= max_kl
    return [f"its KL of {kl.plus_minus()} is within two standard errors of the limit"] if near else []


def _scales(inside: Sequence[Row]) -> list[str]:
    """Where betas differ: the margin grows with beta itself, so the rule leans towards large ones."""
    if len({row.member.beta for row in inside}) < 2:
        return []
    largest = max(inside, key=lambda row: row.figures["margin_over_beta"].mean)
    return [
        f"a margin is beta times a log-ratio, which favours large betas: margin ÷ beta is largest for {largest.name}"
    ]


def _fingerprint(row: Row) -> str | None:
    return row.facts["data"].get("fingerprint")


def _warnings(rows: Sequence[Row]) -> list[str]:
    """What makes figures of members hard to compare."""
    there = [row for row in rows if row.figures]
    found = []
    if len({_fingerprint(row) for row in there}) > 1:
        each = ", ".join(f"{row.name} {(_fingerprint(row) or 'unknown')[:8]}" for row in there)
        found.append(f"the members were made from different data, so their figures do not compare one to one: {each}")
    for key in ("monitor.kl.max_new_tokens", "monitor.kl.prompts"):
        values = {row.name: row.facts["settings"].get(key) for row in there}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in values.items())
            found.append(f"KL was not measured alike: {key} is {each}")
    return found


# --- written down ---


def _as_json(row: Row) -> dict[str, Any]:
    figures = {name: asdict(of) if (of := (row.figures or {}).get(name)) else None for name in FIGURES}
    return {
        "run": row.name,
        "path": str(row.path),
        "settings": dict(row.member.settings),
        "status": row.status,
        "error": row.error,
        **figures,
        "perplexity_change": row.perplexity_change,
    }


def render(table: Mapping[str, Any], folder: Path) -> str:
    """The table, the choice and why, for a terminal."""
    rows = [["", "run", *COLUMNS.values()], *(_cells(member, table["choice"]) for member in table["members"])]
    widths = [max(len(row[n]) for row in rows if len(row) == len(rows[0]) or n < 2) for n in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    sizes = {m["margin"]["n"] for m in table["members"] if m["margin"]}
    n = f" (n={sizes.pop()})" if len(sizes) == 1 else ""
    size = f"{len(rows) - 1} member{'s' * (len(rows) > 2)}"
    head = f"{table['recipe']}, {size}; on {table['split']} pairs{n}, each at the step whose weights it kept"
    chosen = f"chosen: {table['choice']}, {table['why']}" if table["choice"] else f"none is chosen: {table['why']}"
    said = [f"! {warning}" for warning in table["warnings"]]
    return "\n".join([head, *lines, "", *said, chosen, *_on_test(table), f"{folder}/sweep.json"])


COLUMNS = {
    "margin": "margin",
    "margin_over_beta": "margin ÷ beta",
    "accuracy": "accuracy",
    "kl": "KL, nats",
    "win_rate": "win rate on test",
    "perplexity_change": "perplexity",
}


def _cells(member: Mapping[str, Any], choice: str | None) -> list[str]:
    name = ["*" if member["run"] == choice else "", member["run"]]
    if not member["margin"]:
        return [*name, member["status"] + (f": {member['error']}" if member["error"] else "")]
    figures = [_estimate(member[key]).plus_minus() if member[key] else "–" for key in FIGURES]
    return [*name, *figures, f"{member['perplexity_change']:+.1%}"]


def _on_test(table: Mapping[str, Any]) -> list[str]:
    """The chosen member's figures on pairs that chose nothing."""
    known = {name: of for name, of in (table["test"] or {}).items() if of}
    said = [f"{name} {_estimate(of)}" for name, of in known.items()]
    return [f"its test split, which chose nothing: {', '.join(said)}"] if said else []
