"""How a model does on held-out pairs: margin, accuracy and perplexity, each over every pair and with its error."""

from __future__ import annotations

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
    """What one model makes of N pairs: log-probabilities of their replies in nats, and the chosen replies' tokens."""

    chosen_N: Tensor
    rejected_N: Tensor
    chosen_tokens_N: Tensor


def score_pairs(model: PreTrainedModel, pairs: Dataset, pad: int) -> PairLogps:
    prompts, chosen, rejected = (pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    prompts, chosen, rejected = list(prompts), list(chosen), list(rejected)
    return PairLogps(
        reply_logps(model, prompts, chosen, pad),
        reply_logps(model, prompts, rejected, pad),
        tensor([len(ids) for ids in chosen]),
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


def reply_perplexity(scores: PairLogps) -> float:
    """Perplexity of the chosen replies."""
    return perplexity(scores.chosen_N, scores.chosen_tokens_N)


def probe(model: PreTrainedModel, pairs: Dataset, pad: int, count: int = 4) -> list[float]:
    """Log-probabilities of a few chosen replies: what identifies a model by its answers, whichever way it is loaded."""
    few: dict[str, Sequence[Any]] = pairs.select(range(min(count, len(pairs)))).to_dict()
    return reply_logps(model, few["prompt_ids"], few["chosen_ids"], pad).tolist()
