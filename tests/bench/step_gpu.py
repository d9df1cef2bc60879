"""A QLoRA DPO step at Llama-2-7B's shapes on this GPU with shared prefixes, against stock TRL on the same batches.

    python tests/bench/step_gpu.py                  # batches of 1, 2, 4 and 8 pairs, 20 of each
    python tests/bench/step_gpu.py --toy            # toy shapes on a CPU: does it run

Weights are random, quantized layer by layer on the device. The reference is a frozen copy of the adapter, from which
the policy is moved away, so that the losses compared are not ln 2. Stock TRL is measured with SDPA and, where
flash_attn is installed, with FlashAttention 2; TRL 1.16 has no padding-free DPO. Gradient checkpointing and bfloat16
are as the recipe `llama2` has them. --toy only prints.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from batches import find_rows
from comparison import RESULTS, WAYS, Bench, Found, Way, report, stock
from datasets import Dataset
from machine import machine
from memory_gpu import MODELS, TOYS, make_trainer, quantized
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer

from alignlab.models import load as models
from alignlab.models.packing import PrefixSharing
from alignlab.recipe.load import Recipe, load_recipe

PAIRS, BATCHES = (1, 2, 4, 8), 20
TOY_PAIRS, TOY_BATCHES = (2,), 2
MOVED = 0.01  # standard deviation of what the policy's adapter gets beyond the reference's


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy shapes on a CPU")
    parser.add_argument("--pairs", type=int, nargs="+", help="of a batch")
    parser.add_argument("--batches", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if not (args.toy or torch.cuda.is_available()):
        parser.error("there is no GPU here; --toy runs the same at toy size on a CPU")
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # TRL 1.16 sets it
    config = (TOYS if args.toy else MODELS)["llama2"]
    recipe = load_recipe("llama2", ["dpo.gradient_checkpointing=true"])
    rows, what = find_rows(None if args.toy else "llama2", config.vocab_size)
    device = "cpu" if args.toy else torch.cuda.get_device_name()
    here = machine("peft", "bitsandbytes", device=device, flash_attn=installed("flash_attn"))
    weights = quantized(config, recipe)
    for pairs in args.pairs or (TOY_PAIRS if args.toy else PAIRS):
        facts = {"model": "llama2-toy" if args.toy else "llama2-7b-qlora", "pairs": pairs, "rows": what}
        found = measure(weights, recipe, rows, pairs, args.batches or (TOY_BATCHES if args.toy else BATCHES))
        report(found, facts, here, None if args.toy else args.results, device)
        gc.collect()
        torch.cuda.empty_cache()


def measure(weights: PreTrainedModel, recipe: Recipe, rows: Dataset, pairs: int, count: int) -> Found:
    """What each way took; what was measured before the memory ran out, where it does."""
    found, policy = Found(), models.add_adapter(weights, recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(policy, recipe, rows, pairs, Path(folder))
        move_away(policy)
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        bench = Bench(trainer, ways(weights))
        try:
            for line in bench.measure(rows, pairs, count, found):
                print(line, file=sys.stderr, flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"{pairs} pairs: the memory of this GPU ran out")
    for handle in bench.handles:
        handle.undo()
    policy.unload()
    return found


def move_away(policy: PeftModel) -> None:
    """A trainable adapter that differs from its frozen copy."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if ".lora_B.default." in name:
                weight.normal_(std=MOVED)


def ways(weights: PreTrainedModel) -> dict[str, Way]:
    @contextlib.contextmanager
    def flash(trainer: DPOTrainer, handles: Sequence[PrefixSharing]) -> Iterator[None]:
        weights.set_attn_implementation("flash_attention_2")
        try:
            with stock(trainer, handles):
                yield
        finally:
            weights.set_attn_implementation("sdpa")

    if installed("flash_attn") and torch.cuda.is_available():
        return {**WAYS, "flash": flash}
    print("stock TRL with FlashAttention is not measured: it needs flash_attn and a GPU")
    return dict(WAYS)


def installed(package: str) -> str | None:
    """Its version."""
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


if __name__ == "__main__":
    main()
