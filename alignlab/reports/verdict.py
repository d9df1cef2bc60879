"""What came of a run, in one plain sentence of at most 25 words and some with figures; no surer than the numbers.

Everything here is a pure function of what `facts` has read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from alignlab.recipe.load import KLSection, MonitorSection
from alignlab.runs.evaluation import LESS_LIKELY, Evaluation, only_by_length
from alignlab.runs.facts import RunFacts
from alignlab.runs.run import Sweep
from alignlab.text.estimate import Estimate
from alignlab.text.tables import counts_of, number, percent
from alignlab.train.guards import UNMOVED, alarms

CHANCE = 0.5
MOST_WORDS = 25  # of a headline
SILENCE = 3600  # seconds without a logged step after which a run that says it is running was probably killed
GUARDS = {
    "kl": "KL",
    "accuracy": "accuracy",
    "length": "reply length",
    "eos": "unfinished replies",
    "quality": "reply quality",
    "chosen_reward": "chosen reward",
    "unmoved": "nothing changed",
}
OF_TEXT = ("length", "eos", "quality")  # guards that look at the replies


@dataclass(frozen=True)
class Verdict:
    """The headline, and sentences with the figures behind it."""

    headline: str
    details: Sequence[str] = field(default_factory=tuple)

    def __str__(self) -> str:
        return " ".join([self.headline, *self.details])


# --- one run ---


def verdict(run: RunFacts) -> Verdict:
    if run.status == "failed":
        reason = f"It ended with: {run.stop_reason or 'no reason was recorded'}."
        return Verdict(f"This run failed{_where(run)}.", [reason, *_so_far(run)])
    if run.status == "running":
        return Verdict(_running(run), list(_so_far(run)))
    if run.ended == "interrupted":
        return Verdict(f"This run was interrupted{_where(run)}; the same command goes on.", list(_so_far(run)))
    if run.stage == "sft":
        return _of_sft(run)
    details = [*_ended(run), *_win_rate(run), *_accuracy(run), *_kl(run), *_warned(run)]
    if not (run.win_rate or run.test.accuracy):
        details += _so_far(run)
    return Verdict(_headline(run), details)


def _headline(run: RunFacts) -> str:
    """Better, worse or neither, where nothing else must be said first."""
    other = run.versus
    if run.kept_its_start:
        return f"A guard stopped this run and kept {other}'s own weights: every figure compares {other} with itself."
    if said := unmoved(run):
        return said
    found = [*signs(run), *(["not at equal length"] if _wins_by_length(run) else [])]
    if run.win_rate:
        return _with_signs(_of_wins(run, run.win_rate), found)
    if set(found) - {GUARDS["length"]}:
        return _with_signs(f"{_stage(run)} went too far, whatever its accuracy says", found)
    if run.test.accuracy:
        return _with_signs(_of_accuracy(run, run.test.accuracy), found)
    return f"{_stage(run)} is {run.status}, but nothing was measured on the test split."


def _with_signs(said: str, found: Sequence[str]) -> str:
    """The sentence, and behind it as many warning signs as 25 words have room for."""
    shown = ""
    for number_of, name in enumerate(found):
        longer = f"{shown}, {name}" if number_of else f"; warning signs: {name}"
        if len(f"{said}{longer}".split()) > MOST_WORDS:
            break
        shown = longer
    return f"{said}{shown}."


def _of_wins(run: RunFacts, wins: Estimate) -> str:
    counts = f": {said}" if (said := counts_of(wins)) else ""
    of = f" of {wins.n:,} comparisons" if wins.n else ""
    if side(wins) == 0:
        return f"It cannot be told whether {_stage(run)}'s replies are better than {run.versus}'s{counts}{of}"
    which = "better" if side(wins) > 0 else "worse"
    return f"{_stage(run)}'s replies are {which} than {run.versus}'s{counts or f': they win {percent(wins.mean)}'}{of}"


def _of_accuracy(run: RunFacts, accuracy: Estimate) -> str:
    if side(accuracy) == 0:
        return f"{_stage(run)}'s ranking of {_count(accuracy)}test pairs cannot be told from chance"
    which = "preferred" if side(accuracy) > 0 else "rejected"
    share = accuracy.mean if side(accuracy) > 0 else 1 - accuracy.mean
    ranked = f"{_stage(run)} ranks the {which} reply higher in {percent(share)} of {_count(accuracy)}test pairs"
    return f"{ranked}; nobody judged its own replies"


def unmoved(run: RunFacts) -> str:
    """That training changed nothing, or almost nothing; empty where it did."""
    same, replies = _same_replies(run)
    if replies and same == replies:
        return f"{_stage(run)} changed nothing: all {replies} replies are the same as {run.versus}'s, letter by letter."
    kl = run.test.kl
    if kl and kl.mean + 2 * (kl.stderr or 0.0) < UNMOVED:
        return f"{_stage(run)} changed almost nothing: its replies are {number(kl.mean)} nats from {run.versus}'s."
    return ""


def _stage(run: RunFacts) -> str:
    return run.stage.upper()


def _same_replies(run: RunFacts) -> tuple[int, int]:
    """How many replies equal the reference's letter by letter, of how many: as evaluated, else as sampled last."""
    found = run.evaluation
    for each in found.win_rates if found else ():
        if {each.a, each.b} == {run.stage, found.against} and each.n:
            return each.identical, each.n
    return run.same_replies


def signs(run: RunFacts) -> dict[str, str]:
    """How the weights that were kept answer worse than those before: what it is called → what was seen.

    By the guards' own rules on the evaluation at the step that was kept, by the test figures, and by `alignlab eval`.
    """
    limit = math.inf if run.stage == "orpo" else run.limits.max_kl or MonitorSection.max_kl
    kl, before, after = run.test.kl, run.test.reference_perplexity, run.test.perplexity
    found = {}
    if kl and not kl.mean - 2 * (kl.stderr or 0.0) <= limit:  # nan is above it
        found["KL"] = f"its KL of {number(kl.mean)} nats per reply is above {limit:g}"
    found |= {GUARDS[alarm.guard]: alarm.sign for alarm in _alarms(run) if alarm.guard in OF_TEXT}
    if before and after and not after.mean <= LESS_LIKELY * before.mean:
        rise = f"{number(before.mean)} → {number(after.mean)}"
        found["perplexity"] = f"the perplexity of the chosen replies rose, {rise}"
    if run.evaluation and (seen := run.evaluation.signs.get(run.stage)):
        found["text"] = "; ".join(seen)
    return found


def _alarms(run: RunFacts):
    rows = [row for row in run.rows if "eval/loss" in row]
    kept = [row for row in rows if row["step"] == run.best_step]
    both = [{name.replace("eval/", "eval_"): its for name, its in row.items()} for row in (*rows[:1], *kept[-1:])]
    limits = MonitorSection(kl=KLSection(prompts=len(run.samples) or KLSection.prompts), max_kl=None, max_accuracy=None)
    return alarms(both, limits, stage=run.stage) if len(kept) and kept[-1] is not rows[0] else []


def side(estimate: Estimate) -> int:
    """+1 where the whole interval lies above chance, −1 where it lies below, 0 where it cannot be told."""
    if estimate.low is None or estimate.high is None:
        return 0
    return (estimate.low > CHANCE) - (estimate.high < CHANCE)


def _wins_by_length(run: RunFacts) -> bool:
    found = run.evaluation
    pairs = found.win_rates if found else ()
    return any(only_by_length(each) for each in pairs if (each.a, each.b) == (run.stage, found.against))


# --- the sentences with figures ---


def _ended(run: RunFacts) -> Iterator[str]:
    if run.ended == "guard":
        yield f"A guard stopped it{_where(run)}: {_guards(run)}."


def _win_rate(run: RunFacts) -> Iterator[str]:
    wins = run.win_rate
    if not wins:
        return
    by = f" {run.judge}" if run.judge else ""
    counts = f"{said}; " if (said := counts_of(wins)) else ""
    n = f" of {_count(wins)}comparisons" if wins.n else ""
    yield f"Win rate over {run.versus}{by}: {percent(wins.mean)}{n} ({counts}{_how_sure(wins)}; a tie counts half)."
    same, replies = _same_replies(run)
    if 0 < same < replies:
        yield f"{same} of {replies} replies are the same as {run.versus}'s, letter by letter."
    if _wins_by_length(run):
        yield "At equal length the win rate cannot be told from chance: the judge may be counting words."


def _accuracy(run: RunFacts) -> Iterator[str]:
    accuracy = run.test.accuracy
    if accuracy:
        share = f"{percent(accuracy.mean)} of {_count(accuracy)}test pairs"
        yield f"The implicit reward ranks the chosen reply higher in {share} ({_how_sure(accuracy)})."


def _kl(run: RunFacts) -> Iterator[str]:
    kl = run.test.kl
    if kl is None:
        yield "The KL from the reference was not measured."
        return
    edges = "" if kl.low is None else f" (95% interval {number(max(kl.low, 0.0))} to {number(kl.high)})"
    yield f"The KL from the reference is {number(kl.mean)} nats per reply{edges}."


def _warned(run: RunFacts) -> Iterator[str]:
    for seen in signs(run).values():
        yield f"{seen[0].upper()}{seen[1:]}."
    if run.warnings:
        yield f"Guards warned of: {_guards(run)}."
    elif run.manifest.limits:
        yield "No guard warned."


def _so_far(run: RunFacts) -> Iterator[str]:
    """What the last evaluation on validation pairs said, for a run without test figures."""
    last = run.last
    if last is None:
        yield "Nothing was measured yet."
        return
    said = []
    if last.accuracy is not None:
        said.append(f"held-out accuracy {percent(last.accuracy)}")
    if last.kl is not None:
        said.append(f"KL {number(last.kl)} nats per reply")
    if not said and last.loss is not None:
        said.append(f"held-out loss {number(last.loss)}")
    yield f"At its last evaluation, step {last.step:,}: {', '.join(said) or 'no figure'}."
    if run.warnings:
        yield f"Guards warned of: {_guards(run)}."


def _of_sft(run: RunFacts) -> Verdict:
    after, before = run.test.perplexity, run.first.perplexity if run.first else None
    if after is None:
        return Verdict(f"SFT is {run.status}, but nothing was measured on the test split.", list(_so_far(run)))
    was = f"Before training it was {number(before)} on validation replies." if before else ""
    done = f"Supervised fine-tuning is done: perplexity {number(after.mean)} on the test replies."
    return Verdict(done, [was] if was else [])


def _running(run: RunFacts) -> str:
    silent = run.silent_seconds
    if silent is not None and silent > SILENCE:
        silence = f"This run has logged nothing for {duration(silent)}{_where(run)}"
        return f"{silence}; if it was killed, the same command goes on."
    return f"This run is still going{_where(run)}."


def _where(run: RunFacts) -> str:
    if run.steps is None:
        return " before the first logged step"
    return f" at step {run.steps:,}" + (f" of {run.planned_steps:,}" if run.planned_steps else "")


def _guards(run: RunFacts) -> str:
    return ", ".join(dict.fromkeys(GUARDS.get(warning.guard, warning.guard) for warning in run.warnings))


def _count(estimate: Estimate) -> str:
    return f"{estimate.n:,} " if estimate.n else ""


def _how_sure(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "how sure that is cannot be said"
    return f"95% interval {percent(estimate.low)} to {percent(estimate.high)}; chance is 50%"


# --- several runs ---


def sweep_verdict(sweep: Sweep, runs: Sequence[RunFacts]) -> Verdict:
    """What was chosen and why, and what came of it."""
    done = sum(member.status == "finished" for member in sweep.members)
    count = f"{done} finished member{'s' * (done != 1)}"
    if missing := len(sweep.members) - done:
        count += f" ({missing} of {len(sweep.members)} did not finish)"
    why = f"Why: {sweep.why.rstrip('.')}." if sweep.why else "No reason was recorded."
    if sweep.choice is None:
        return Verdict(f"No member was chosen of {count}.", [why])
    chosen = next((run for run in runs if run.name == sweep.choice), None)
    came = [f"{chosen.label or chosen.name}: {verdict(chosen)}"] if chosen else []
    return Verdict(f"{sweep.choice} was chosen of {count}.", [why, *came])


def compare_verdict(runs: Sequence[RunFacts], names: Mapping[str, str], found: Evaluation | None) -> Verdict:
    """Which of two runs answers better, where they were judged side by side; `names` are those in that evaluation."""
    fingerprints = {run.fingerprint for run in runs if run.fingerprint}
    if len(fingerprints) > 1:
        return Verdict(
            f"{len(runs)} runs of different data: their figures do not rank them.", list(_own_win_rates(runs))
        )
    judged = [run for run in runs if run.name in names]
    if found is None or len(judged) < 2:
        headline = f"These {len(runs)} runs were not judged side by side, so their replies are not ranked."
        asked = " ".join(run.folder for run in runs)
        return Verdict(headline, [f"alignlab eval --runs {asked} judges them.", *_own_win_rates(runs)])
    elo = {rating.model: rating.elo.mean for rating in found.ratings}
    first, second, *rest = sorted(judged, key=lambda run: -elo.get(names[run.name], 0.0))
    wins = found.over(names[first.name], names[second.name])
    left_out = [run.name for run in runs if run.name not in names]
    details = [
        f"{_shown(first)} over {_shown(second)}: {percent(wins.mean)} of {wins.n} comparisons ({_how_sure(wins)})."
    ]
    details += [f"Judged side by side with them: {', '.join(map(_shown, rest))}."] * bool(rest)
    details += [f"Not judged side by side with the others: {', '.join(left_out)}."] * bool(left_out)
    if side(wins) == 0:
        return Verdict(
            f"{_shown(first)} and {_shown(second)} cannot be told apart: {wins.counts} of {wins.n}.", details
        )
    better, worse = (first, second) if side(wins) > 0 else (second, first)
    shown = wins if side(wins) > 0 else wins.turned()
    return Verdict(f"{_shown(better)} answers better than {_shown(worse)}: {shown.counts} of {wins.n}.", details)


def _shown(run: RunFacts) -> str:
    return run.label or run.name


def _own_win_rates(runs: Sequence[RunFacts]) -> Iterator[str]:
    """Each run against what it started from, which compares no run with another."""
    for run in runs:
        if run.win_rate:
            counts = f", {said}" if (said := counts_of(run.win_rate)) else ""
            yield f"{_shown(run)} over its own {run.versus}: {percent(run.win_rate.mean)}{counts}."


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `5.2 h`, `3.4 days`."""
    for least, size, unit in ((172_800, 86_400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"
