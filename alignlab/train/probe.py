"""Two real training steps on the longest rows, and the memory they take beside the plan's."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback
from trl import DPOConfig, SFTConfig

from alignlab.data.prepare import Prepared, sft_rows
from alignlab.errors import RecipeError
from alignlab.memory.fakes import Meter, held_tensors
from alignlab.memory.plan import GIB, Plan, plan
from alignlab.memory.steps import Row
from alignlab.models import load as models
from alignlab.recipe.arguments import TrainingContext, trl_arguments
from alignlab.recipe.load import Recipe
from alignlab.train.reference import with_reference_columns
from alignlab.train.stages import prepare_data, with_weights
from alignlab.train.trainers import AlignDPOTrainer, AlignSFTTrainer

STEPS, MICRO_BATCHES = 2, 2  # optimizer states come with the first step, gradients with its first micro-batch
QUIET = {  # of what a run does besides its steps
    "eval_strategy": "no",
    "save_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "restore_callback_states_from_checkpoint": False,
    "report_to": [],
    "disable_tqdm": True,
    "eval_steps": None,
}


@dataclass(frozen=True)
class Probe:
    """What two steps took, and what was planned for them."""

    plan: Plan
    measured: float  # bytes of tensors at the peak
    reserved: float | None  # bytes that torch's allocator held; None on a CPU

    @property
    def planned(self) -> float:
        return self.plan.step

    @property
    def difference(self) -> float:
        """(measured − planned) ÷ planned."""
        return self.measured / self.planned - 1


def probe(recipe: Recipe, stage: str) -> Probe:
    """Two steps of `stage` on the recipe's longest rows, from a fresh adapter, in a folder that is removed after.

    On a GPU the figure is torch's own. On a CPU it is the bytes of tensors after each operation, which leaves out what
    a kernel takes for itself: it checks the parts that do not depend on CUDA.
    """
    if stage not in ("sft", "dpo"):
        raise RecipeError(f"--probe runs steps of sft and dpo; alignlab plan --stage {stage} plans without it")
    tokenizer, pairs = prepare_data(recipe, stage)
    recipe, cuda = with_weights(recipe), torch.cuda.is_available()
    whole = plan(recipe, stage, cuda=cuda).job
    micro_batches = min(whole.given["gradient_accumulation_steps"], MICRO_BATCHES)
    rows = _longest(pairs, stage, len(whole.rows))
    lengths = [_lengths(row) for row in rows]
    rows = datasets.concatenate_datasets([rows] * STEPS * micro_batches)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(recipe, stage, rows, micro_batches, tokenizer, Path(folder))
        if stage == "dpo":
            _prepare_dpo(trainer, recipe, online=whole.scores_online)
        with measured(trainer.model, trainer) as found:
            trainer.train()
    return Probe(plan(recipe, stage, cuda=cuda, rows=lengths), found["peak"], found.get("reserved"))


def _longest(pairs: Prepared, stage: str, batch: int) -> Dataset:
    """As many of the longest rows as a micro-batch has."""
    rows = sft_rows(pairs.train) if stage == "sft" else pairs.train
    order = sorted(range(len(rows)), key=lambda number: -_lengths(rows[number]).length)[:batch]
    return rows.select((order * batch)[:batch])


def _lengths(row: Mapping[str, Any]) -> Row:
    if "labels" in row:
        prompt = sum(label == -100 for label in row["labels"])
        return Row(prompt, len(row["labels"]) - prompt, 0)
    return Row(*(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")))


def _trainer(recipe: Recipe, stage: str, rows: Dataset, micro_batches: int, tokenizer: Any, folder: Path) -> Any:
    section, here = recipe.model, TrainingContext(folder, len(rows), not torch.cuda.is_available())
    given = {**trl_arguments(recipe, stage, here), **QUIET}
    given |= {"max_steps": STEPS, "gradient_accumulation_steps": micro_batches, "learning_rate": 1e-6}
    weights = models.load_weights(section)
    policy = models.add_adapter(weights, section) if section.lora is not None else weights
    common = {"train_dataset": rows, "processing_class": tokenizer}
    if stage == "sft":
        trainer = AlignSFTTrainer(policy, SFTConfig(**given), **common)
    else:
        reference = None if section.lora is not None else models.load_weights(section)
        trainer = AlignDPOTrainer(policy, reference, DPOConfig(**given), **common)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if isinstance(policy, PeftModel):
        models.settle_adapters(policy, section)
    return trainer


def _prepare_dpo(trainer: AlignDPOTrainer, recipe: Recipe, *, online: bool) -> None:
    """What `train_dpo` does before it trains; the reference's log-probabilities are zeros, where they are stored."""
    rows = trainer.train_dataset
    trainer.share_prefixes(recipe.model.prefix_sharing)
    trainer.score_one(rows[0])
    if not online:
        rows = with_reference_columns(rows, *np.zeros((2, len(rows)), np.float32))
        trainer.use_stored_reference(rows, rows)


def show_probe(stage: str, probe: Probe) -> str:
    """What two real steps took, beside what was planned for them."""
    rows = f"micro-batches of {len(probe.plan.job.rows)}, the longest row {probe.plan.job.longest.length} tokens"
    lines = [
        f"{stage}: two steps, {rows}",
        f"  planned   {probe.planned / GIB:8.3f} GiB of tensors, in a training step",
    ]
    lines.append(f"  measured  {probe.measured / GIB:8.3f} GiB ({probe.difference:+.1%})")
    if probe.reserved is None:
        lines.append("  counted after each operation on the CPU; what depends on CUDA is not compared")
    else:
        lines.append(f"  reserved  {probe.reserved / GIB:8.3f} GiB, which the allocator held")
    return "\n".join(lines)


@contextlib.contextmanager
def measured(model: torch.nn.Module, trainer: Any) -> Iterator[dict[str, float]]:
    """The peak inside the block, which is there once it ends."""
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.update(peak=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
        return
    meter = Meter()
    for held in filter(None, (model, getattr(trainer, "ref_model", None))):
        for tensor in [*held.buffers(), *(each for weight in held.parameters() for each in held_tensors(weight))]:
            meter.watch(tensor)
    with meter:
        yield found
    found["peak"] = meter.peak
