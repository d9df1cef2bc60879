"""How a model does on held-out pairs: margin, accuracy and perplexity, each over every pair and with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor, tensor
from transformers import PreTrainedModel

from alignlab.measure.formulas import dpo_loss, perplexity, rewards
from alignlab.measure.generate import reply_logps
from alignlab.text.estimate import Estimate, mean_estimate


@dataclass(frozen=True)
class PairLogps:
    """What one model makes of N pairs: log-probabilities of their replies in nats, and the chosen replies' tokens.

    Of single replies with a label the good ones stand for chosen ones, the bad ones for rejected ones.
    """

    chosen_N: Tensor
    rejected_N: Tensor
    chosen_tokens_N: Tensor


def score_pairs(model: PreTrainedModel, pairs: Dataset, pad: int) -> PairLogps:
    good, bad, worse = pairs, pairs, "rejected_ids"
    if "label" in pairs.column_names:
        is_good = tensor(list(pairs["label"]))
        good, bad = (pairs.select(rows.nonzero()[:, 0].tolist()) for rows in (is_good, ~is_good))
        worse = "chosen_ids"  # the column of every reply
    return PairLogps(
        reply_logps(model, list(good["prompt_ids"]), list(good["chosen_ids"]), pad),
        reply_logps(model, list(bad["prompt_ids"]), list(bad[worse]), pad),
        tensor([len(ids) for ids in good["chosen_ids"]]),
    )


def preference(policy: PairLogps, reference: PairLogps, beta: float) -> dict[str, Estimate]:
    """The implicit reward's margin, accuracy (strictly larger for the chosen reply) and DPO loss."""
    chosen = rewards(policy.chosen_N, reference.chosen_N, beta)
    rejected = rewards(policy.rejected_N, reference.rejected_N, beta)
    return {
        "rewards/margins": mean_estimate(chosen - rejected),
        "rewards/accuracies": mean_estimate(chosen > rejected, share=True),
        "rewards/chosen": mean_estimate(chosen),
        "rewards/rejected": mean_estimate(rejected),
        "loss": mean_estimate(dpo_loss(chosen, rejected)),
    }


def preference_by_label(policy: PairLogps, reference: PairLogps, beta: float) -> dict[str, Estimate]:
    """The mean reward of good replies and of bad ones, and how far they are apart; there are no pairs to rank."""
    good = mean_estimate(rewards(policy.chosen_N, reference.chosen_N, beta))
    bad = mean_estimate(rewards(policy.rejected_N, reference.rejected_N, beta))
    errors = [each.stderr for each in (good, bad) if each.stderr is not None]
    error = math.hypot(*errors) if len(errors) == 2 else None
    margin = Estimate(good.mean - bad.mean, error, len(policy.chosen_N) + len(policy.rejected_N))
    return {"rewards/margins": margin, "rewards/chosen": good, "rewards/rejected": bad}


def reply_perplexity(scores: PairLogps) -> float:
    """Perplexity of the chosen replies."""
    return perplexity(scores.chosen_N, scores.chosen_tokens_N)


def probe(model: PreTrainedModel, pairs: Dataset, pad: int, count: int = 4) -> list[float]:
    """Log-probabilities of a few chosen replies: what identifies a model by its answers, whichever way it is loaded."""
    few: dict[str, Sequence[Any]] = pairs.select(range(min(count, len(pairs)))).to_dict()
    return reply_logps(model, few["prompt_ids"], few["chosen_ids"], pad).tolist()
