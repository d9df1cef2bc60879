"""A DPO step on CPU with shared prefixes, and with a stored reference, against stock TRL on the same real batches.

    python tests/bench/step.py llama-25m --pairs 8 --batches 20

Forward, backward and the reference's forward of one batch are timed, the variants in random order, in one process.
Each ratio is stock TRL's time over ours for the same batch. Policy and reference differ, so that the losses compared
are not ln 2. Rows are HH-RLHF harmless-base from `BENCH_DATA` (a .jsonl.gz), or ../shared beside the checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from alignlab.data import prepare
from alignlab.packing import share_prefixes
from alignlab.recipe import DataSection
from alignlab.trainers import AlignDPOTrainer

SHARED = Path(__file__).parents[3] / "shared"
DATA = Path(os.environ.get("BENCH_DATA", SHARED / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz"))
RESULTS = Path(__file__).parent / "results"
LLAMA = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6}
SHAPES = {
    "llama-25m": (LlamaConfig(vocab_size=32_000, tie_word_embeddings=True, **LLAMA), "llama2"),
    "gpt2-82m": (GPT2Config(n_layer=6), "gpt2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--batches", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args.model, args.pairs, Path(folder))
        cells = compare(trainer, args.pairs, args.batches)
    RESULTS.mkdir(exist_ok=True)
    for variant, cell in cells.items():
        cell = {"model": args.model, "pairs": args.pairs, "variant": variant, **cell, "machine": machine()}
        (RESULTS / f"{args.model}-{args.pairs}-{variant}.json").write_text(json.dumps(cell, indent=2) + "\n")
        low, high = cell["ratio_quartiles"]
        spread = f"{low:.2f} to {high:.2f}, n={cell['n']}"
        print(f"{args.model}, {args.pairs} pairs, {variant}: {cell['ratio_median']:.2f} ({spread})")


def make_trainer(name: str, pairs: int, folder: Path) -> DPOTrainer:
    """Stock behaviour until a variant is switched on: AlignDPOTrainer changes nothing in a training step."""
    config, vocabulary = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / vocabulary)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    settings = {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": 512}
    args = DPOConfig(output_dir=str(folder), per_device_train_batch_size=pairs, **settings)
    return AlignDPOTrainer(policy, reference, args, train_dataset=rows(tokenizer), processing_class=tokenizer)


def rows(tokenizer: PreTrainedTokenizerBase):
    """Pairs of at most 512 tokens, in a fixed random order."""
    section = DataSection(source="hh-rlhf", path=str(DATA), max_prompt_tokens=352, max_reply_tokens=160)
    return prepare(section, tokenizer).train.shuffle(seed=0)


def compare(trainer: AlignDPOTrainer, pairs: int, count: int) -> dict[str, dict]:
    """Per variant: paired time ratios to the stock step, loss differences, and the share of positions computed."""
    handles = [share_prefixes(model) for model in (trainer.model, trainer.ref_model)]
    trainer.model.train()
    ratios: dict[str, list[float]] = {"shared": [], "shared-stored": [], "stored": []}
    differences: dict[str, list[float]] = {variant: [] for variant in ratios}
    variants: dict[str, Callable] = {"stock": stock, "shared": shared, "shared-stored": shared_stored, "stored": stored}
    for number in range(count + 1):
        batch = trainer.data_collator(
            trainer.train_dataset.select(range(number * pairs, (number + 1) * pairs)).to_list()
        )
        batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference_logps(trainer, batch), strict=True))
        order = list(variants)
        random.Random(number).shuffle(order)
        found = {name: step(trainer, batch, variants[name](trainer, handles)) for name in order}
        if number == 0:  # warm-up, and the batch that packing computes both ways
            continue
        for name in ratios:
            ratios[name].append(found["stock"][0] / found[name][0])
            differences[name].append(abs(found["stock"][1] - found[name][1]))
        print(number, {name: f"{seconds:.2f} s" for name, (seconds, _) in found.items()}, file=sys.stderr, flush=True)
    positions = handles[0].computed_positions / handles[0].standard_positions
    return {name: cell(ratios[name], differences[name], positions if "shared" in name else 1.0) for name in ratios}


def cell(ratios: list[float], differences: list[float], positions: float) -> dict:
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "n": len(ratios),
        "positions_ratio": round(positions, 4),
        "loss_difference": max(differences),
    }


def step(trainer: AlignDPOTrainer, batch: dict, variant: contextlib.ExitStack) -> tuple[float, float]:
    """Wall seconds of one step's forwards and backward, and its loss."""
    gc.collect()
    with variant:
        began = time.perf_counter()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        seconds = time.perf_counter() - began
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    return seconds, loss.item()


def stock(trainer, handles) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for handle in handles:
        stack.enter_context(handle.paused())
    return stack


def shared(trainer, handles) -> contextlib.ExitStack:
    return contextlib.ExitStack()


def stored(trainer, handles) -> contextlib.ExitStack:
    return with_stored_reference(trainer, stock(trainer, handles))


def shared_stored(trainer, handles) -> contextlib.ExitStack:
    return with_stored_reference(trainer, contextlib.ExitStack())


def with_stored_reference(trainer, stack: contextlib.ExitStack) -> contextlib.ExitStack:
    trainer.precompute_ref_logps = True
    stack.callback(setattr, trainer, "precompute_ref_logps", False)
    return stack


def reference_logps(trainer: AlignDPOTrainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return trainer.compute_ref_log_probs(trainer.ref_model, batch)


def machine() -> dict:
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
