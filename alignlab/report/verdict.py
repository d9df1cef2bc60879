"""The one sentence at the head of a report: what came of a run in plain words, and no surer than its numbers.

Everything here is a pure function of the report's facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from alignlab.estimate import Estimate
from alignlab.report.curves import is_number

CHANCE = 0.5
SILENCE = 3600  # seconds without a logged step after which a run that says it is running was probably killed
GUARDS = {
    "kl": "KL",
    "accuracy": "accuracy",
    "length": "reply length",
    "eos": "unfinished replies",
    "quality": "reply quality",
    "chosen_reward": "chosen reward",
}


def with_interval(estimate: Mapping[str, Any] | None, share: bool = False) -> dict[str, Any] | None:
    """The estimate with the edges of its 95 % interval, `low` and `high`; those it brings are kept.

    Where the error is not known, both edges are None.
    """
    if not estimate or not is_number(estimate.get("mean")):
        return None
    known = {field.name: value for field in fields(Estimate) if is_number(value := estimate.get(field.name))}
    return asdict(Estimate(**known).with_interval(share))


def percent(value: float) -> str:
    """A share in whole percent; with one decimal near the ends, where that says more."""
    near_an_end = min(abs(value), abs(1 - value)) < 0.05 and value not in (0, 1)
    return f"{value:.1%}" if near_an_end else f"{value:.0%}"


def number(value: float) -> str:
    """Three significant digits, in full up to ten million."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def verdict(run: Mapping[str, Any]) -> str:
    """One sentence on one run."""
    if run["status"] == "failed":
        return f"Failed{_where(run)}: {run['stop_reason'] or 'no reason was recorded'}; {_so_far(run)}."
    if run["status"] == "running":
        return f"{_running(run)}; {_so_far(run)}."
    if run["status"] == "stopped" and run["ended"] == "interrupted":
        return f"Interrupted{_where(run)}, and the same command goes on from there; {_so_far(run)}."
    outcome = _sft_outcome(run) if run["stage"] == "sft" else _outcome(run)
    if run["ended"] == "guard":
        return f"Stopped by a guard{_where(run)} ({_guards(run)}): {outcome}."
    return f"{outcome[0].upper()}{outcome[1:]}{_warned(run)}."


def _running(run: Mapping[str, Any]) -> str:
    silent = run["silent_seconds"]
    if silent is not None and silent > SILENCE:
        return (
            f"Says it is running{_where(run)}, but has logged nothing for {duration(silent)}: if it was killed, "
            f"the same command goes on"
        )
    return f"Still running{_where(run)}"


def _where(run: Mapping[str, Any]) -> str:
    if run["steps"] is None:
        return " before the first logged step"
    planned = run["planned_steps"]
    return f" at step {run['steps']:,} of {planned:,}" if planned else f" at step {run['steps']:,}"


def _so_far(run: Mapping[str, Any]) -> str:
    """What the last evaluation on validation pairs said, for a run without test figures."""
    last = run["evaluations"].get("last", {})
    said = []
    if "accuracy" in last:
        said.append(f"held-out accuracy {percent(last['accuracy'])}")
    if "kl" in last:
        said.append(f"KL {number(last['kl'])} nats per reply")
    if not said and "loss" in last:
        said.append(f"held-out loss {number(last['loss'])}")
    if not said:
        return "nothing was measured yet"
    return f"at its last evaluation, step {last['step']:,}: {', '.join(said)}{_warned(run, silent_if_none=True)}"


def _outcome(run: Mapping[str, Any]) -> str:
    """Better, worse or neither, by how much, how sure, and at what KL."""
    wins, accuracy = run["win_rate"], run["test"].get("accuracy")
    if wins:
        judged = f" {wins['judge']}" if wins.get("judge") else ""
        return (
            f"DPO {_claim(wins, run['versus'])}: its replies win {percent(wins['mean'])} of {_count(wins)}comparisons"
            f"{judged} ({_how_sure(wins)}), {_at_kl(run)}"
        )
    if accuracy:
        return (
            f"DPO {_learned(accuracy)}: it ranks the chosen reply higher in {percent(accuracy['mean'])} of "
            f"{_count(accuracy)}test pairs ({_how_sure(accuracy)}), {_at_kl(run)}; whether its own replies are better "
            f"was not judged"
        )
    return f"{run['status']}, but nothing was measured on the test split; {_so_far(run)}"


def side(estimate: Mapping[str, Any]) -> int:
    """+1 where the whole interval lies above chance, −1 where it lies below, 0 where it cannot be told."""
    if estimate["low"] is None:
        return 0
    return (estimate["low"] > CHANCE) - (estimate["high"] < CHANCE)


def _claim(wins: Mapping[str, Any], versus: str) -> str:
    unsure = f"cannot be told from {versus}{_at_n(wins)}"
    return {1: f"is better than {versus}", -1: f"is worse than {versus}", 0: unsure}[side(wins)]


def _learned(accuracy: Mapping[str, Any]) -> str:
    return {
        1: "has learned the preferences",
        -1: "has learned the opposite of the preferences",
        0: f"cannot be told from chance{_at_n(accuracy)}",
    }[side(accuracy)]


def _count(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['n']:,} " if estimate["n"] else ""


def _at_n(estimate: Mapping[str, Any]) -> str:
    return f" at n={estimate['n']:,}" if estimate["n"] else ""


def _how_sure(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return "how sure that is cannot be said; chance is 50%"
    return f"95% interval {percent(estimate['low'])} to {percent(estimate['high'])}; chance is 50%"


def _at_kl(run: Mapping[str, Any]) -> str:
    kl = run["test"].get("kl")
    if not kl:
        return "at a KL that was not measured"
    if kl["low"] is None:
        return f"at a KL of {number(kl['mean'])} nats per reply"
    return f"at a KL of {number(kl['mean'])} nats per reply ({number(max(kl['low'], 0.0))} to {number(kl['high'])})"


def _guards(run: Mapping[str, Any]) -> str:
    names = dict.fromkeys(GUARDS.get(w["guard"], w["guard"]) for w in run["warnings"])
    return " and ".join(names)


def _warned(run: Mapping[str, Any], silent_if_none: bool = False) -> str:
    if run["warnings"]:
        return f"; warning on {_guards(run)}"
    return "" if silent_if_none or run["stage"] == "sft" or not run["limits"] else "; no guard warned"


def _sft_outcome(run: Mapping[str, Any]) -> str:
    before = run["evaluations"].get("first", {}).get("perplexity")
    after = run["test"].get("perplexity")
    if not after:
        return f"finished, but nothing was measured on the test split; {_so_far(run)}"
    was = f", where on validation replies it was {number(before)} before training" if before else ""
    return f"supervised fine-tuning is done: perplexity {number(after['mean'])} on the test replies{was}"


def sweep_verdict(sweep: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on a sweep: what was chosen and why, and what came of it."""
    members, choice = sweep["members"], sweep["choice"]
    if choice is None:
        return f"None of {len(members)} members was chosen: {_ended(sweep['why'] or 'no reason was recorded')}"
    why = f" ({sweep['why'].rstrip('.')})" if sweep["why"] else ""
    chosen = next((run for run in runs if run["name"] == choice), None)
    return f"{choice} was chosen of {len(members)}{why}{f': {verdict(chosen)}' if chosen else '.'}"


def compare_verdict(runs: Sequence[Mapping[str, Any]], same_data: bool) -> str:
    """One sentence on runs side by side: which leads, and whether it can be told from the next."""
    if not same_data:
        return f"{len(runs)} runs of different data: their figures do not rank them."
    for figures, called in (
        ({r["name"]: r["win_rate"] for r in runs}, "win rate"),
        ({r["name"]: r["test"].get("accuracy") for r in runs}, "accuracy of the implicit reward"),
    ):
        known = {name: e for name, e in figures.items() if e}
        if len(known) > 1:
            return _leader(known, called) + _left_out(set(figures) - set(known), called)
    return f"{len(runs)} runs side by side: fewer than two have figures on the test split to compare."


def _leader(known: Mapping[str, Mapping[str, Any]], called: str) -> str:
    """The difference's interval is that of two independent estimates: too wide, if anything, for shared prompts."""
    (first, a), (second, b), *_ = sorted(known.items(), key=lambda item: -item[1]["mean"])
    figures = f"{percent(a['mean'])} (n={a['n']}) against {percent(b['mean'])} (n={b['n']}) of {second}"
    if a["stderr"] is None or b["stderr"] is None or not (a["stderr"] or b["stderr"]):
        return f"{first} has the highest {called}, {figures}, but how sure that is cannot be said"
    difference = Estimate(a["mean"] - b["mean"], math.hypot(a["stderr"], b["stderr"])).with_interval()
    if difference.low > 0:
        return f"{first} has the highest {called}, {figures}"
    return f"{first} and {second} cannot be told apart: {called} {figures}"


def _left_out(names: set[str], called: str) -> str:
    return f"; no {called} of {', '.join(sorted(names))}." if names else "."


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(".") else f"{sentence}."


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `5.2 h`, `3.4 days`."""
    for size, unit in ((86400 * 2, "days"), (7200, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.0f} s"
