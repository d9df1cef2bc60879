"""Signs of over-optimisation in a run's evaluations, each one sentence that says what to try; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignlab.recipe.load import MonitorSection

Row = Mapping[str, float]  # one evaluation, under the trainer's names: eval_kl, eval_rewards/margins, …
Said = tuple[str, Sequence[str]] | None  # a sign and its remedies

# Where a reply's form is said to have changed, against the evaluation before the first step, and beyond twice the
# standard error. Chosen so that the shipped recipes' healthy runs stay silent; nothing published fixes them.
LONGER = 1.5  # times as many tokens
FEWER_ENDS = 0.1  # share of replies that no longer end by themselves
MORE_REPEATED = 0.1  # share of 4-grams that stood in the reply before
LESS_DISTINCT = 0.7  # of the different bigrams there were
UNMOVED = 0.01  # nats a reply from the reference below which training has changed nothing that a reader could see

LARGER_BETA = "a larger dpo.beta"
GENTLER = ("stop earlier", LARGER_BETA, "a smaller dpo.learning_rate")
ANCHOR = "dpo.loss_type=[sigmoid,sft], which holds on to the chosen replies"


@dataclass(frozen=True)
class Alarm:
    guard: str
    step: int
    sign: str  # what was seen
    remedies: Sequence[str]  # what to try
    stops: bool  # a run whose monitor.action is stop

    @property
    def message(self) -> str:
        return f"{self.sign}; try: {', or '.join(self.remedies)}"

    def as_json(self) -> dict[str, Any]:
        return {"guard": self.guard, "step": self.step, "message": self.message}


def alarms(
    evaluations: Sequence[Row], limits: MonitorSection, anchored: bool = False, stage: str = "dpo"
) -> list[Alarm]:
    """What the last of a run's evaluations gives cause to warn of; the first, before training, is its measure.

    `anchored` says that the loss holds the SFT term already, or can have none, which then is no remedy. A remedy names
    the stage's own settings. ORPO has no reference that a larger beta would bind it to: KL and length are told from the
    base model, and change as they do in SFT.
    """
    if len(evaluations) < 2:
        return []
    step = int(evaluations[-1]["step"])
    asked = {name: of for name, of in GUARDS.items() if stage != "orpo" or name not in OF_REFERENCE}
    found = ((name, guard(evaluations, limits), stops) for name, (guard, stops) in asked.items())
    useless = {*([ANCHOR] if anchored else []), *([LARGER_BETA] if stage == "orpo" else [])}
    remedies = lambda all_of_them: tuple(r.replace("dpo.", f"{stage}.") for r in all_of_them if r not in useless)
    return [Alarm(name, step, said[0], remedies(said[1]), stops) for name, said, stops in found if said]


def _kl(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    kl, error = evaluations[-1].get("eval_kl", 0.0), evaluations[-1].get("eval_kl_stderr", 0.0)
    if limits.max_kl is None or kl - 2 * _known(error) <= limits.max_kl:  # nan is above it
        return None
    return (
        f"the policy is {kl:.3g} ± {_known(error):.2g} nats a reply away from its reference, "
        f"above monitor.max_kl {limits.max_kl:g}",
        GENTLER,
    )


def _accuracy(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    accuracy = evaluations[-1].get("eval_rewards/accuracies", 0.0)
    error = _known(evaluations[-1].get("eval_rewards/accuracies_stderr", 0.0))
    if limits.max_accuracy is None or accuracy - 2 * error <= limits.max_accuracy:
        return None
    return (
        f"held-out accuracy is {accuracy:.3f} ± {error:.2g}, above monitor.max_accuracy {limits.max_accuracy:g}: "
        f"few preferences are that clear",
        ("look for what gives the chosen reply away (alignlab data)", *GENTLER),
    )


def _length(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    before, now = (row.get("eval_reply_tokens", 0.0) for row in (evaluations[0], evaluations[-1]))
    if now - 2 * _known(evaluations[-1].get("eval_reply_tokens_stderr", 0.0)) <= LONGER * before:
        return None
    return f"replies have grown from {before:.0f} to {now:.0f} tokens: length is easy reward", GENTLER


def _ends(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    before, now = (row.get("eval_eos_rate", 0.0) for row in (evaluations[0], evaluations[-1]))
    error = math.sqrt((before * (1 - before) + now * (1 - now)) / limits.kl.prompts)
    if before - now <= FEWER_ENDS + 2 * error:
        return None
    return f"replies that end by themselves fell from {before:.0%} to {now:.0%}", (*GENTLER, ANCHOR)


def _quality(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    """The loss falls while what is sampled gets worse: the loss is no longer about the text."""
    before, now = evaluations[0], evaluations[-1]
    if "eval_repetition" not in now or now["eval_loss"] >= before["eval_loss"]:
        return None
    error = _known(now.get("eval_repetition_stderr"))
    loops = now["eval_repetition"] - before["eval_repetition"] > MORE_REPEATED + 2 * error
    dull = now["eval_distinct_2"] < LESS_DISTINCT * before["eval_distinct_2"]
    if not (loops or dull):
        return None
    return (
        f"held-out loss fell from {before['eval_loss']:.3g} to {now['eval_loss']:.3g} while the replies got worse: "
        f"repeated 4-grams {before['eval_repetition']:.0%} → {now['eval_repetition']:.0%}, different bigrams "
        f"{before['eval_distinct_2']:.0%} → {now['eval_distinct_2']:.0%}",
        GENTLER,
    )


def _chosen_reward(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    """Twice in a row the margin grew and the chosen replies became less likely: it grows by forgetting."""
    chosen = [row.get("eval_rewards/chosen", 0.0) for row in evaluations[-3:]]
    margins = [row.get("eval_rewards/margins", 0.0) for row in evaluations[-3:]]
    if len(chosen) < 3 or not (0 > chosen[0] > chosen[1] > chosen[2] and margins[0] < margins[1] < margins[2]):
        return None
    return (
        f"the margin grew to {margins[2]:.3g} while the chosen replies' reward fell to {chosen[2]:.3g}: chosen replies "
        f"become less likely too, only more slowly than rejected ones",
        (ANCHOR, "a smaller dpo.learning_rate"),
    )


def _unmoved(evaluations: Sequence[Row], limits: MonitorSection) -> Said:
    """Twice in a row the policy answers as its reference does, whatever its accuracy is: margins may be tiny."""
    kls = [row.get("eval_kl", math.inf) + 2 * _known(row.get("eval_kl_stderr")) for row in evaluations[-2:]]
    if len(evaluations) < 3 or not max(kls) < UNMOVED:
        return None
    return (
        f"nothing has changed: the policy is {evaluations[-1]['eval_kl']:.2g} nats a reply away from its reference",
        ("a larger dpo.learning_rate", "more steps"),
    )


def _known(error: float | None) -> float:
    """The standard error of a single value is unknown; nothing is subtracted then."""
    return 0.0 if error is None or math.isnan(error) else error


# Name, guard, and whether it ends a run under `monitor.action: stop`. A falling chosen reward does not: it is what most
# healthy runs of plain DPO show; nor does a policy that has not moved: more steps may move it.
GUARDS: dict[str, tuple[Callable[[Sequence[Row], MonitorSection], Said], bool]] = {
    "kl": (_kl, True),
    "accuracy": (_accuracy, True),
    "length": (_length, True),
    "eos": (_ends, True),
    "quality": (_quality, True),
    "chosen_reward": (_chosen_reward, False),
    "unmoved": (_unmoved, False),
}
OF_REFERENCE = ("kl", "length")  # guards that need an SFT model to measure from
