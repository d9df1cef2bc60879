"""TRL's trainers with the few methods that alignlab overrides: every seam with TRL is here or in `orpo`."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOTrainer, SFTTrainer
from trl.trainer.utils import use_adapter

from alignlab.measure import heldout
from alignlab.measure.generate import batches
from alignlab.measure.heldout import PairLogps
from alignlab.models.load import (
    PICKLED_STATE,
    PICKLED_WEIGHTS,
    load_adapters,
    make_sampleable,
    refuse_changed,
    refuse_pickles,
)
from alignlab.models.packing import decide, scored_positions_only, share_prefixes
from alignlab.train.callbacks import CarriedOver, Guard
from alignlab.train.samples import Samples
from alignlab.train.store import ReferenceIdentity

log = logging.getLogger(__name__)

PAIR_METRICS = ("rewards/", "logps/")  # TRL's metrics that are means over pairs; the others are means over tokens
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
CHOSEN_METRICS = ("logits/chosen", "mean_token_accuracy")


if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # TRL's trainers, beside which `_Seams` stands, bring it


class _Seams(Trainer):
    """What all trainers need changed in TRL: resuming, exact held-out means, and metrics of our own."""

    samples: Samples | None = None
    guard: Guard | None = None
    carried_over: CarriedOver | None = None
    identity: ReferenceIdentity | None = None  # of the reference, where the store may know it

    def __init__(self, *args, **kwargs):
        self._batch_sizes: list[dict[str, int]] = []
        self._batch_losses: list[float] = []
        super().__init__(*args, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """Restores adapters bit for bit."""
        refuse_changed(Path(checkpoint))
        remedy = f"remove {checkpoint}, and the same command goes on from the checkpoint before it"
        refuse_pickles(Path(checkpoint), (*PICKLED_WEIGHTS, *PICKLED_STATE), remedy)
        if isinstance(self.model, PeftModel):
            load_adapters(self.model, Path(checkpoint))
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _run_epoch(self, **kwargs) -> None:
        """Trains nothing where the checkpoint was written at the end of training: its order to stop is in it.

        Trainer would forget that order, and ask whether it is at the end only after one more step (transformers 5.23).
        """
        if self.state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        refuse_changed(best)
        if isinstance(self.model, PeftModel):
            load_adapters(self.model, best)
        else:
            super()._load_best_model()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A checkpoint outside the limits of a run that stops there is never the best one."""
        return not (self.guard and self.guard.outside) and super()._determine_best_metric(metrics, trial)

    def create_model_card(self, *args, **kwargs) -> None:
        """No card beside each checkpoint: it would call an unfinished model done."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Keeps each batch's size, so that a short last batch does not count as a full one in TRL's means."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        counts = self._count(inputs)
        sizes = {name: self._total(count) for name, count in counts.items()}
        weight = self._weight_of("loss")
        self._batch_losses.append(self._total(result[0].detach().double() * counts[weight]) / sizes[weight])
        self._batch_sizes.append(sizes)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._batch_sizes:  # an evaluation ends with this log, under the name of its dataset where there are several
            loss = next(name for name in reversed([*logs]) if name.endswith("_loss"))
            metrics = self._metrics["eval"]
            for name, values in metrics.items():
                weights = [count for sizes in self._batch_sizes if (count := sizes[self._weight_of(name)])]
                if len(values) == len(weights):  # TRL leaves out a batch that has nothing to average
                    metrics[name] = [_mean(values, weights)]
            logs[loss] = _mean(self._batch_losses, [sizes[self._weight_of("loss")] for sizes in self._batch_sizes])
            logs["eval_perplexity"] = self._perplexity()
            logs |= self._errors()
            if self.samples:
                logs |= self.samples.measure(self._unwrapped(), self.state.global_step, self.reference_context())
            self._batch_sizes.clear()
            self._batch_losses.clear()
        super().log(logs, start_time)

    def _errors(self) -> dict[str, float]:
        """Standard errors of held-out means, where they follow from the means alone."""
        return {}

    def probe(self, model: PreTrainedModel, pairs: Dataset) -> list[float]:
        """What `heldout.probe` gives, in the precision of training: before it begins too, and of the reference."""
        with self.accelerator.autocast():
            return heldout.probe(model, pairs, self.processing_class.pad_token_id)

    def _total(self, count: torch.Tensor) -> int:
        return self.accelerator.gather(count).sum().item()

    def _unwrapped(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)


class AlignSFTTrainer(_Seams, SFTTrainer):
    """TRL's SFTTrainer on rows that alignlab has prepared."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        make_sampleable(self.model)

    def compute_loss(self, *args, **kwargs):
        """TRL's loss, with the LM head on reply tokens only, on a CPU too."""
        with scored_positions_only(self.accelerator.device):
            return super().compute_loss(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        return longest_first(eval_dataset, ("input_ids",))

    def _count(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"tokens": (inputs["labels"][:, 1:] != -100).sum()}

    def _weight_of(self, metric: str) -> str:
        return "tokens"

    def _perplexity(self) -> float:
        return math.exp(_mean(self._batch_losses, [sizes["tokens"] for sizes in self._batch_sizes]))

    def reference_context(self) -> None:
        return None


class PreferenceTrainer(_Seams):
    """What the trainers that learn preferences share: a model beside the policy, from which KL and rewards are told.

    It is the reference of DPO and KTO; ORPO has none, and is measured from the base model.
    """

    @property
    def is_anchored(self) -> bool:
        """Whether the loss holds an SFT term, or can be given none."""
        return True

    @property
    def first_loss(self) -> float | None:
        """The loss where policy and reference are the same, if that is known."""
        return None

    def score_pairs(self, model: PreTrainedModel, pairs: Dataset) -> PairLogps:
        return heldout.score_pairs(model, pairs, self.processing_class.pad_token_id)

    def reference_context(self):
        return self.as_reference

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The model that answers as the reference does, while the context lasts."""
        if self.ref_model is not None:
            yield self.accelerator.unwrap_model(self.ref_model)
            return
        policy = self._unwrapped()
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
            yield policy

    @torch.no_grad()
    def return_to_reference(self) -> None:
        """Gives the policy the reference's weights: what is left when no checkpoint is worth keeping."""
        policy = self._unwrapped()
        if self.ref_model is not None:
            policy.load_state_dict(self.accelerator.unwrap_model(self.ref_model).state_dict())
        elif "ref" in policy.peft_config:
            set_peft_model_state_dict(policy, get_peft_model_state_dict(policy, adapter_name="ref"))
        else:  # the reference is the model without its adapter, as which a fresh one answers
            config = policy.peft_config["default"]
            policy.delete_adapter("default")
            policy.add_adapter("default", config)
            policy.set_adapter("default")

    @torch.no_grad()
    def score_one(self, row: Mapping[str, Any]) -> dict[str, float]:
        """TRL's own loss and rewards of one row, leaving no trace in its averages."""
        self.model.eval()
        inputs = self._prepare_inputs(self.data_collator([row]))
        with self.accelerator.autocast():  # which accelerate puts around the model only once training begins
            loss = self.compute_loss(self.model, inputs).item()
        found = {name: values[-1] for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()
        return {"loss": loss, **found}


class AlignDPOTrainer(PreferenceTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs that alignlab has prepared, with the reference that the recipe means."""

    shares_prefixes = False

    def _prepare_dataset(self, dataset: Dataset, processing_class, args: DPOConfig, dataset_name: str) -> Dataset:
        """The pairs as they are: they hold token ids, and TRL would tokenize them again, cut them and drop some."""
        if isinstance(dataset, IterableDataset):  # its lengths are not known
            return dataset
        prompt, chosen, rejected = (pc.list_value_length(dataset.data.column(name)) for name in IDS)
        longest = pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py()
        assert args.max_length is None or longest <= args.max_length, (
            f"TRL would cut {dataset_name} at {args.max_length}"
        )
        return dataset

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        return longest_first(eval_dataset, IDS)

    def _count(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        chosen, rejected = inputs["completion_mask"][:, 1:].chunk(2)
        pairs = torch.tensor(len(chosen), device=chosen.device)
        return {
            "pairs": pairs,
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
            "tokens": chosen.sum() + rejected.sum(),
        }

    def _weight_of(self, metric: str) -> str:
        if metric == "loss" or metric.startswith(PAIR_METRICS):
            return "pairs"
        return "chosen" if metric in CHOSEN_METRICS else "rejected" if metric == "logits/rejected" else "tokens"

    def _perplexity(self) -> float:
        """Of the chosen replies. TRL has averaged their log-probabilities over all pairs by now."""
        pairs, tokens = (sum(sizes[name] for sizes in self._batch_sizes) for name in ("pairs", "chosen"))
        return torch.tensor(-self._metrics["eval"]["logps/chosen"][0] * pairs / tokens).exp().item()

    def _errors(self) -> dict[str, float]:
        accuracy = self._metrics["eval"]["rewards/accuracies"][0]
        pairs = sum(sizes["pairs"] for sizes in self._batch_sizes)
        return {"eval_rewards/accuracies_stderr": (accuracy * (1 - accuracy) / pairs) ** 0.5}

    def share_prefixes(self, setting: Literal["auto"] | bool) -> bool:
        """Makes policy and reference compute each pair's prompt once, where the recipe and the model allow it."""
        shared, why = decide(setting, self.model, self.accelerator.device, self.aux_loss_enabled)
        log.info("%s", why)
        for model in (self.model, self.ref_model) if shared else ():
            if model is not None:
                share_prefixes(self.accelerator.unwrap_model(model), "stop" if setting == "auto" else "raise")
        self.shares_prefixes = shared
        return shared

    @contextlib.contextmanager
    def scoring_reference(self) -> Iterator[Callable[[Mapping[str, Any]], tuple[float, float]]]:
        """A function: one pair → the reference's log-probabilities of its replies (chosen, rejected), in nats.

        The numbers are those of TRL's `compute_ref_log_probs`, which would put the reference in place for each pair.
        """
        self.model.eval()
        if self.ld_alpha is not None:  # the tail of the longer reply counts less, as TRL has it
            yield lambda pair: tuple(each.item() for each in self.compute_ref_log_probs(*self._asked(pair)))
            return
        with self.as_reference() as reference:
            yield lambda pair: tuple(self._reply_logps(reference, [pair])[:, 0].tolist())

    def _asked(self, pair: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        return self.ref_model or self.model, self._prepare_inputs(self.data_collator([pair]))

    @torch.no_grad()
    def _reply_logps(self, model: PreTrainedModel, pairs: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """log p of whole replies, in nats, shape (2, B): of the chosen ones, and of the rejected ones."""
        inputs = self._prepare_inputs(self.data_collator(list(pairs)))
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            logps_ST = model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        tokens = labels.shape[1] - 1  # fewer than there are where an adapter puts some of its own before them
        return logps_ST[:, -tokens:].sum(1).view(2, -1)

    def score_pairs(self, model: PreTrainedModel, pairs: Dataset) -> PairLogps:
        """What `heldout.score_pairs` gives, with each prompt computed once where training does that."""
        if not self.shares_prefixes:
            return super().score_pairs(model, pairs)
        was_training, rows = model.training, pairs.select_columns([*IDS]).to_list()
        model.eval()
        order = sorted(range(len(rows)), key=lambda i: -sum(len(rows[i][name]) for name in IDS))
        logps_2N = torch.zeros(2, len(rows))
        for few in batches(order, self.args.per_device_eval_batch_size):
            logps_2N[:, few] = self._reply_logps(model, [rows[i] for i in few]).float().cpu()
        model.train(was_training)
        chosen_N, rejected_N = logps_2N
        return PairLogps(chosen_N, rejected_N, torch.tensor([len(row["chosen_ids"]) for row in rows]))

    def use_stored_reference(self, train: Dataset, validation: Dataset) -> None:
        """Trains on pairs that bring `ref_chosen_logps` and `ref_rejected_logps`: no more reference forwards.

        TRL reads these columns only with its own precomputing on, which would compute them again (TRL 1.16).
        """
        self.train_dataset, self.eval_dataset = train, validation
        self.precompute_ref_logps = True

    @property
    def first_loss(self) -> float | None:
        """ln 2 of a sigmoid loss and nothing else."""
        plain = self.loss_types == ["sigmoid"] and self.loss_weights == [1.0]
        return math.log(2) if plain and not self.use_weighting and not self.aux_loss_enabled else None

    @property
    def is_anchored(self) -> bool:
        return "sft" in self.loss_types


class AlignKTOTrainer(PreferenceTrainer, KTOTrainer):
    """TRL's KTOTrainer on the rows of `data.kto_rows`."""

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        """The rows as they are: they hold token ids, and each another row's reply beside its own."""
        return dataset

    def _count(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        is_good, tokens = inputs["label"].bool(), inputs["completion_mask"][:, 1:].sum(1)
        return {
            "rows": torch.tensor(len(is_good), device=is_good.device),
            "chosen": is_good.sum(),
            "rejected": (~is_good).sum(),
            "chosen tokens": tokens[is_good].sum(),
            "rejected tokens": tokens[~is_good].sum(),
            "tokens": tokens.sum(),
        }

    def _weight_of(self, metric: str) -> str:
        side = metric.rpartition("/")[2]
        if side in ("chosen", "rejected"):
            return f"{side} tokens" if metric.startswith("logits/") else side
        return "tokens" if metric == "entropy" else "rows"

    def _perplexity(self) -> float:
        replies, tokens = (sum(sizes[name] for sizes in self._batch_sizes) for name in ("chosen", "chosen tokens"))
        return math.exp(-self._metrics["eval"]["logps/chosen"][0] * replies / tokens)

    def _errors(self) -> dict[str, float]:
        """No error; the margin is that of the means over all rows, where TRL averages the margins of batches."""
        metrics = self._metrics["eval"]
        metrics["rewards/margins"] = [metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]]
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's own estimate of the KL, on mismatched replies of a batch, is no KL on samples: it is `kto_kl`."""
        for metrics in self._metrics.values():
            if "kl" in metrics:
                metrics["kto_kl"] = metrics.pop("kl")
        super().log(logs, start_time)

    @property
    def first_loss(self) -> float | None:
        """1 − σ(0), where good and bad rows weigh the same."""
        plain = self.desirable_weight == self.undesirable_weight == 1.0 and not self.aux_loss_enabled
        return 0.5 if plain else None


def longest_first(rows: Dataset, columns: Sequence[str]) -> list[int]:
    """The numbers of held-out rows by their tokens, so that batches hold little padding; means are over all rows."""
    lengths = np.sum([pc.list_value_length(rows.with_format("arrow")[:][name]) for name in columns], axis=0)
    return np.argsort(-lengths, kind="stable").tolist()


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
