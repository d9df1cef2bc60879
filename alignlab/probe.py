"""Two real training steps on the longest rows, and the memory they take beside the plan's."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback
from trl import DPOConfig, SFTConfig

from alignlab import model as models
from alignlab.arguments import Circumstances, trl_arguments
from alignlab.data import Prepared, sft_rows
from alignlab.plan.memory import Plan, plan
from alignlab.recipe import ModelSection, Recipe
from alignlab.train import prepare_data, with_weights
from alignlab.trainers import AlignDPOTrainer, AlignSFTTrainer

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


class Meter(TorchDispatchMode):
    """Counts the bytes of living tensors after each operation; what a kernel takes and returns inside is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.watch(leaf)
        return result


def probe(recipe: Recipe, stage: str) -> Probe:
    """Two steps of `stage` on the recipe's longest rows, from a fresh adapter, in a folder that is removed after.

    On a GPU the figure is torch's own. On a CPU it is the bytes of tensors after each operation, which leaves out what
    a kernel takes for itself: it checks the parts that do not depend on CUDA.
    """
    tokenizer, pairs = prepare_data(recipe)
    section = with_weights(recipe).model
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        rows = _longest(pairs, stage, _batch(recipe, stage, cuda))
        trainer = _trainer(recipe, section, stage, rows, tokenizer, Path(folder))
        with measured(trainer.model, trainer) as found:
            trainer.train()
    longest = max(_lengths(rows))
    planned = plan(recipe, stage, cuda=cuda, length=longest)
    return Probe(planned, found["peak"], found.get("reserved"))


def _batch(recipe: Recipe, stage: str, cuda: bool) -> int:
    return plan(recipe, stage, cuda=cuda).batch


def _longest(pairs: Prepared, stage: str, batch: int) -> Dataset:
    """The longest rows, each batch of the probe being the same ones."""
    rows = sft_rows(pairs.train) if stage == "sft" else pairs.train
    order = sorted(range(len(rows)), key=_lengths(rows).__getitem__, reverse=True)[:batch]
    wanted = (order * batch)[:batch]
    return rows.select(wanted * STEPS * MICRO_BATCHES)


def _lengths(rows: Dataset) -> list[int]:
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    columns = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*columns, strict=True)]


def _trainer(recipe: Recipe, section: ModelSection, stage: str, rows: Dataset, tokenizer: Any, folder: Path):
    here = Circumstances(folder, len(rows), not torch.cuda.is_available())
    given = {**trl_arguments(recipe, stage, here), **QUIET}
    given |= {"max_steps": STEPS, "gradient_accumulation_steps": MICRO_BATCHES, "learning_rate": 1e-6}
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
    for tensor in held_tensors(model, getattr(trainer, "ref_model", None)):
        meter.watch(tensor)
    with meter:
        yield found
    found["peak"] = meter.peak


def held_tensors(*held: torch.nn.Module | None) -> Iterator[torch.Tensor]:
    """Parameters and buffers, and the tensors in which bitsandbytes keeps a 4-bit weight's scales."""
    for model in filter(None, held):
        yield from model.buffers()
        for parameter in model.parameters():
            yield parameter
            if state := getattr(parameter, "quant_state", None):
                yield from _tensors_of(state)


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) is type(state):
            yield from _tensors_of(value)
