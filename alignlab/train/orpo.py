"""TRL's experimental ORPOTrainer on pairs that alignlab has prepared; only this module goes where TRL drops it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from trl.experimental.orpo import ORPOTrainer

from alignlab.train.trainers import PreferenceTrainer

SIDES = ("chosen", "rejected")


class AlignORPOTrainer(PreferenceTrainer, ORPOTrainer):
    """ORPO has no reference; `ref_model` is the base model, which KL and win rate are measured from.

    TRL's `rewards/` and `logps/` of ORPO are of a reply's mean log-probability a token, not of their sum.
    """

    ref_model = None  # where the base is not the policy without its adapter
    _total_train_tokens = 0

    def __init__(self, *args, **kwargs):
        self._chosen_nats: list[float] = []  # log-probabilities of the chosen replies, a sum for each held-out batch
        super().__init__(*args, **kwargs)

    @property
    def _metrics(self) -> Mapping[str, dict[str, list[float]]]:
        return self._stored_metrics

    def tokenize_row(self, row: Mapping[str, Any], model=None) -> dict[str, list[int]]:
        """The prepared ids: TRL would tokenize the texts again, and cut them."""
        prompt, found = row["prompt_ids"], {}
        for side in SIDES:
            found[f"{side}_input_ids"] = [*prompt, *row[f"{side}_ids"]]
            found[f"{side}_attention_mask"] = [1] * len(found[f"{side}_input_ids"])
            found[f"{side}_labels"] = [*[-100] * len(prompt), *row[f"{side}_ids"]]
        return found

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Counts the tokens of training, as TRL's other trainers do."""
        read = torch.stack([inputs[f"{side}_attention_mask"].sum() for side in SIDES])
        self._total_train_tokens += self._total(read)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def concatenated_forward(self, model, batch):
        """Keeps the sum of the chosen replies' log-probabilities, of which TRL logs means of means."""
        found = super().concatenated_forward(model, batch)
        if not model.training:
            nats = (found[0].detach().double() * (batch["chosen_labels"][:, 1:] != -100).sum(1)).sum()
            self._chosen_nats.append(self._total(nats))
        return found

    def _count(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels, read = inputs["chosen_labels"], inputs["chosen_attention_mask"]
        pairs = torch.tensor(len(labels), device=labels.device)
        return {"pairs": pairs, "chosen": (labels[:, 1:] != -100).sum(), "tokens": read[:, 1:].sum()}

    def _weight_of(self, metric: str) -> str:
        return "tokens" if metric == "eval_nll_loss" else "pairs"

    def _perplexity(self) -> float:
        nats = sum(self._chosen_nats)
        self._chosen_nats.clear()
        return math.exp(-nats / sum(sizes["chosen"] for sizes in self._batch_sizes))

    def _errors(self) -> dict[str, float]:
        pairs, accuracy = (
            sum(s["pairs"] for s in self._batch_sizes),
            self._metrics["eval"]["eval_rewards/accuracies"][0],
        )
        return {"eval_rewards/accuracies_stderr": (accuracy * (1 - accuracy) / pairs) ** 0.5}
