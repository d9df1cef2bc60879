"""A real model on CPU, Gemma 3 270M with LoRA: steps of SFT and DPO and a held-out evaluation, against stock TRL.

    python tests/bench/real.py                       # where `make gemma270m` has put the model
    python tests/bench/real.py --model FOLDER --times 10

The pairs are the first of HH-RLHF helpful-base whose prompts and replies have at most 64 tokens. Both ways compute the
same batches in turn, in random order, in one process. A ratio is TRL's time ÷ ours. DPO is compared with TRL's step,
and with its fastest one, in which the reference's log-probabilities are precomputed. The losses of an evaluation differ
a little: TRL's is the mean over batches, ours over tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from batches import SHARED
from comparison import RESULTS, WAYS, Bench, wait
from datasets import Dataset
from machine import machine
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, SFTConfig, SFTTrainer

from alignlab.data.prepare import prepare, sft_rows
from alignlab.recipe.load import DataSection, model_folder
from alignlab.train.trainers import AlignDPOTrainer, AlignSFTTrainer

HELPFUL = SHARED / "data" / "hh-rlhf" / "helpful-base.test.jsonl.gz"
TOKENS, PAIRS, EVALUATED = 64, 8, 24  # of a prompt and of a reply; rows of a batch; rows of an evaluation
SETTINGS = {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": 2 * TOKENS}
SETTINGS |= {"per_device_train_batch_size": PAIRS, "per_device_eval_batch_size": PAIRS}
RATIOS = {
    "DPO step": ("stock", "shared-stored"),
    "DPO step, TRL with precompute_ref_log_probs": ("stored", "shared-stored"),
    "SFT step": ("SFT stock", "SFT ours"),
    "held-out evaluation": ("evaluation stock", "evaluation ours"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=model_folder("gemma270m"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BENCH_DATA", HELPFUL)))
    parser.add_argument("--times", type=int, default=10, help="batches, and evaluations")
    parser.add_argument("--only", nargs="+", default=["dpo", "sft", "evaluation"], help="which of the three")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for what, path, remedy in (("model", args.model, "make gemma270m"), ("data", args.data, "set BENCH_DATA")):
        if not path.exists():
            print(f"skipped: there is no {what} at {path} ({remedy})")
            return
    warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)  # TRL 1.16 sets it
    words = AutoTokenizer.from_pretrained(args.model)
    section = DataSection(source="hh-rlhf", path=str(args.data), max_prompt_tokens=TOKENS, max_reply_tokens=TOKENS)
    pairs = prepare(section, words).train
    found: Mapping[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        if "dpo" in args.only:
            measure_dpo(load(args.model), pairs, words, args.times, folder, found)
        if len({"sft", "evaluation"} & set(args.only)):
            measure_sft(load(args.model), pairs, words, args.times, folder, found, args.only)
    report(found, {"model": args.model.name, "rows": args.data.name}, args.results)


def load(model: Path) -> PeftModel:
    """With an adapter that has learned something, so that losses differ from those of the base."""
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(weights, config)


def measure_dpo(model, pairs: Dataset, words: PreTrainedTokenizerBase, times: int, folder: str, found) -> None:
    args = DPOConfig(output_dir=folder, **SETTINGS)
    trainer = AlignDPOTrainer(model, None, args, train_dataset=pairs, processing_class=words)
    with torch.no_grad():  # only now, as the reference is a copy
        for name, weight in model.named_parameters():
            if "lora_B.default" in name:
                weight.normal_(std=1e-3)
    bench = Bench(trainer, WAYS)
    bench.step("shared", pairs.select(range(PAIRS)).to_list())  # is computed both ways
    ways = ("stock", "stored", "shared-stored")
    for number in range(times):
        batch = rows_of(pairs, number, PAIRS).to_list()
        in_turn(number, {way: partial(bench.step, way) for way in ways}, batch, found)


def measure_sft(model, pairs: Dataset, words, times: int, folder: str, found, only: Sequence[str]) -> None:
    rows = sft_rows(pairs)
    args = SFTConfig(output_dir=folder, dataset_kwargs={"skip_prepare_dataset": True}, **SETTINGS)
    make = lambda kind: kind(model, args, train_dataset=rows, eval_dataset=rows, processing_class=words)
    trainers = {"ours": make(AlignSFTTrainer), "stock": make(SFTTrainer)}
    if "sft" in only:
        sft_step(trainers["ours"], rows.select(range(PAIRS)))  # the first is slower
        for number in range(times):
            batch = rows_of(rows, number, PAIRS)
            ways = {f"SFT {name}": partial(sft_step, it) for name, it in trainers.items()}
            in_turn(number, ways, batch, found)
    for number in range(times if "evaluation" in only else 0):
        held_out = rows_of(rows, number, EVALUATED)
        ways = {f"evaluation {name}": partial(evaluation, it) for name, it in trainers.items()}
        in_turn(number, ways, held_out, found)


def rows_of(rows: Dataset, number: int, count: int) -> Dataset:
    return rows.select([(number * count + each) % len(rows) for each in range(count)])


def in_turn(number: int, ways: Mapping[str, Callable[[Any], tuple[float, float]]], rows: Any, found) -> None:
    order = sorted(ways)
    random.Random(number).shuffle(order)
    for name in order:
        found[name].append(ways[name](rows))
    print(f"{number + 1}: " + ", ".join(f"{name} {found[name][-1][0]:.2f} s" for name in ways), flush=True)


def sft_step(trainer: SFTTrainer, rows: Dataset) -> tuple[float, float]:
    """Wall seconds of forward and backward, and the loss."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows.to_list()))
    trainer.model.train()
    wait()
    began = time.perf_counter()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    wait()
    seconds = time.perf_counter() - began
    trainer.model.zero_grad()
    return seconds, loss.item()


def evaluation(trainer: SFTTrainer, rows: Dataset) -> tuple[float, float]:
    began = time.perf_counter()
    loss = trainer.evaluate(rows)["eval_loss"]
    return time.perf_counter() - began, loss


def report(found: Mapping[str, list[tuple[float, float]]], facts: Mapping[str, Any], folder: Path | None) -> None:
    for what, (theirs, ours) in RATIOS.items():
        if not found.get(theirs):
            continue
        ratios = [other[0] / one[0] for one, other in zip(found[ours], found[theirs], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        apart = max(abs(one[1] - other[1]) for one, other in zip(found[ours], found[theirs], strict=True))
        seconds = [round(statistics.median(each[0] for each in found[name]), 3) for name in (theirs, ours)]
        print(f"{what}: {median:.2f} ({low:.2f} to {high:.2f}, n={len(ratios)}); losses differ by {apart:.1g} at most")
        entry = {**facts, "compared": what, "ratio_median": median, "ratio_quartiles": [low, high], "n": len(ratios)}
        entry |= {"seconds_median": seconds, "loss_difference": apart, "machine": machine("peft")}
        if folder:
            folder.mkdir(exist_ok=True)
            name = "real-" + what.lower().replace(",", "").replace(" ", "-") + ".json"
            (folder / name).write_text(json.dumps(entry, indent=1) + "\n")


if __name__ == "__main__":
    main()
