"""Four betas on CPU: one `alignlab sweep` against four processes of TRL's own DPOTrainer on the same pairs.

    python tests/bench/sweep.py llama-25m                        # full size, over an hour on two cores
    python tests/bench/sweep.py tiny
    python tests/bench/sweep.py llama-25m --pairs 64 --betas 0.5,0.1

Both sides are timed from start to end of their processes: imports, data, the reference, training, and evaluation of
the same held-out pairs before the first step and after the last. The sweep also samples replies for the KL, scores a
test split and keeps checkpoints, which stock TRL does not; a random model's replies never end by themselves, so that
they are cut early. It says where the time of each side goes, and what it takes of the processor. Half of the stock
runs come before the sweep and half after it. Both sides train on the same ids in the same order, which is checked, and
their training losses are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from batches import REAL, SHARED, real_rows
from machine import machine
from step import SHAPES
from stock import ids_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.disk import write_lines
from alignlab.recipe.load import Recipe, load_recipe
from alignlab.runs.run import Run
from alignlab.train.stages import prepare_data, with_weights

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("BENCH_DATA", REAL))
TOKENIZERS = Path(os.environ.get("BENCH_TOKENIZERS", SHARED / "tokenizers"))
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
HELD_OUT = 50  # pairs to validate on, and as many to test on
PAIRS_A_STEP = 8
LLAMA = """
about: four betas on CPU
data: {{source: hh-rlhf, path: rows.jsonl, max_prompt_tokens: 352, max_reply_tokens: 160}}
model: {{name: model, start: model, dtype: float32}}
dpo: {{num_train_epochs: 1, learning_rate: 5.0e-6, per_device_train_batch_size: {batch}, gradient_checkpointing: false,
  logging_steps: 1, eval_steps: {steps}}}
monitor: {{kl: {{prompts: 16, max_new_tokens: 64}}}}
"""
TINY = """
about: four betas on the embedded default
extends: tiny
data: {{toy: {{pairs: {pairs}}}}}
model: {{name: model, start: model}}
dpo: {{max_steps: {steps}, logging_steps: 1, eval_steps: {steps}}}
monitor: {{patience: null}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama-25m", "tiny"))
    parser.add_argument("--pairs", type=int, help="training pairs; default 1000, of tiny 2000")
    parser.add_argument("--betas", default="0.5,0.3,0.1,0.05")
    parser.add_argument(
        "--stock-runs", type=int, metavar="N", help="time stock TRL on N betas, and take the others to be as slow"
    )
    args = parser.parse_args()
    pairs = args.pairs or {"tiny": 2000}.get(args.model, 1000)
    with tempfile.TemporaryDirectory() as folder:
        cell = compare(args.model, pairs, args.betas.split(","), args.stock_runs, Path(folder))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"sweep-{args.model}-{pairs}.json"
    file.write_text(json.dumps(cell, indent=2) + "\n")
    clock, cpu = (f"{cell[f'stock_{of}']} s over {cell[f'ours_{of}']} s" for of in ("seconds", "cpu_seconds"))
    print(
        f"{args.model}, {pairs} pairs: {cell['ratio']:.2f} ({clock}), of the processor {cell['cpu_ratio']:.2f} ({cpu})"
    )
    for side in ("stock", "ours"):
        print(f"  {side}: " + ", ".join(f"{name} {seconds:g} s" for name, seconds in cell[f"{side}_parts"].items()))


def compare(name: str, pairs: int, betas: list[str], stock_runs: int | None, folder: Path) -> dict:
    recipe = {"llama-25m": make_llama, "tiny": make_tiny}[name](pairs, folder)
    digest, steps = write_stock(recipe, folder), recipe.dpo["eval_steps"]
    timed = betas[:stock_runs]
    before = [time_stock(beta, folder) for beta in timed[: len(timed) // 2]]
    ours = time_process(["-m", "alignlab", "sweep", recipe.name, "--betas", ",".join(betas)], folder)
    stock = before + [time_stock(beta, folder) for beta in timed[len(timed) // 2 :]]
    found = {float(beta): read(folder / f"stock-{float(beta)}.json") for beta in timed}
    assert all(of["ids"] == digest for of in found.values()), "both sides train on the same ids"
    assert all(of["steps"] == steps for of in found.values())
    members = read(folder / "runs" / recipe.name / "sweep.json")["members"]
    runs = {member["settings"]["dpo.beta"]: Run(folder / member["path"]) for member in members}
    whole, cpu = (sum(of) * len(betas) / len(of) for of in zip(*stock, strict=True))
    return {
        "model": name,
        "pairs": pairs,
        "betas": betas,
        "pairs_a_step": recipe.dpo["per_device_train_batch_size"],
        "steps": steps,
        "ratio": round(whole / ours[0], 3),
        "ours_seconds": round(ours[0], 1),
        "stock_seconds": round(whole, 1),
        "stock_seconds_each": [round(seconds, 1) for seconds, _ in stock],
        "cpu_ratio": round(cpu / ours[1], 3),  # what a busy machine disturbs less
        "ours_cpu_seconds": round(ours[1], 1),
        "stock_cpu_seconds": round(cpu, 1),
        "stock_runs_not_timed": len(betas) - len(stock),
        "stock_parts": stock_parts([of["seconds"] for of in found.values()], [seconds for seconds, _ in stock], steps),
        "ours_parts": ours_parts([*runs.values()], ours[0], steps),
        "loss_difference": max(difference(runs[beta], of["losses"]) for beta, of in found.items()),
        "kl": dataclasses.asdict(recipe.monitor.kl),
        "environment": MALLOC,
        "machine": machine("peft", threads=torch.get_num_threads()),
    }


def stock_parts(found: list[dict], stock: list[float], steps: int) -> dict[str, float]:
    """Where the seconds of a process went, on average; the rest is imports, data and the model."""
    training, evaluating = (sum(of[name] for of in found) / len(found) for name in ("training", "evaluating"))
    whole = sum(stock) / len(stock)
    parts = {"a step": (training - evaluating) / steps, "evaluating": evaluating, "the rest": whole - training}
    return {name: round(seconds, 2) for name, seconds in parts.items()}


def ours_parts(runs: list[Run], ours: float, steps: int) -> dict[str, float]:
    """The same of a member, and what all share: imports, data, the reference, and the checks before the first step."""
    mean = lambda name: sum(getattr(run.manifest, f"{name}_seconds") for run in runs) / len(runs)
    rows = [row for run in runs for row in run.metrics()]
    evaluating = sum(row.get("eval/runtime", 0) for row in rows) / len(runs)
    training, sampling, figures = mean("training"), mean("sampling"), mean("figures")
    parts = {"a step": (training - evaluating - sampling) / steps, "evaluating": evaluating, "sampling": sampling}
    parts |= {"figures on the test split": figures, "the rest, all members": ours - len(runs) * (training + figures)}
    return {name: round(seconds, 2) for name, seconds in parts.items()}


def make_llama(pairs: int, folder: Path) -> Recipe:
    """A random model, and real pairs whose splits are named in the rows."""
    config, vocabulary = SHAPES["llama-25m"]
    for name, path in (("BENCH_DATA", DATA), ("BENCH_TOKENIZERS", TOKENIZERS)):
        if not path.exists():
            raise SystemExit(f"{name}: there is no {path}")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / vocabulary)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    real = real_rows(DATA, TOKENIZERS / vocabulary)
    if len(real) < pairs + 2 * HELD_OUT:
        raise SystemExit(f"{DATA} has {len(real)} pairs of at most 512 tokens, and {pairs + 2 * HELD_OUT} are needed")
    splits = ["train"] * pairs + ["validation"] * HELD_OUT + ["test"] * HELD_OUT
    lines = [
        {"split": split, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for split, row in zip(splits, real, strict=False)
    ]
    write_lines(folder / "rows.jsonl", lines)
    return write_recipe("llama", LLAMA.format(batch=PAIRS_A_STEP, steps=-(-pairs // PAIRS_A_STEP)), folder)


def make_tiny(pairs: int, folder: Path) -> Recipe:
    """The embedded base model and its dialogues; DPO starts from the base, with a fresh adapter, on both sides."""
    shutil.copytree(with_weights(load_recipe("tiny")).model.name, folder / "model")
    return write_recipe("tiny-bench", TINY.format(pairs=pairs, steps=min(200, pairs // 16)), folder)


def write_recipe(name: str, text: str, folder: Path) -> Recipe:
    (folder / "recipes").mkdir()
    (folder / "recipes" / f"{name}.yaml").write_text(text)
    os.chdir(folder)
    return load_recipe(name)


def write_stock(recipe: Recipe, folder: Path) -> str:
    """What `stock.py` reads, and a digest of the ids that it should make of it."""
    _, prepared = prepare_data(recipe)
    for split in ("train", "validation"):
        write_lines(folder / f"{split}.json", getattr(prepared, split).select_columns(["prompt", "chosen", "rejected"]))
    own = {key: value for key, value in recipe.dpo.items() if key != "beta"}
    same = {"max_length": recipe.data.max_prompt_tokens + recipe.data.max_reply_tokens, "eval_strategy": "steps"}
    plain = {"eval_on_start": True, "save_strategy": "no", "report_to": [], "bf16": False, "use_cpu": True}
    lora = dict(recipe.model.lora) if recipe.model.lora else None
    (folder / "settings.json").write_text(json.dumps({**own, **same, **plain, "lora": lora}))
    return ids_of(prepared.train)


def time_stock(beta: str, folder: Path) -> tuple[float, float]:
    return time_process([str(Path(__file__).with_name("stock.py")), str(folder), beta], folder)


def time_process(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of a Python process from its start to its end, by the clock and of the processor."""
    environment = {**os.environ, **MALLOC, "ALIGNLAB_CACHE": str(folder / "cache")}
    began, cpu_before = time.perf_counter(), cpu_seconds_of_children()
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, cpu_seconds = time.perf_counter() - began, cpu_seconds_of_children() - cpu_before
    print(f"{seconds:.0f} s, {cpu_seconds:.0f} s of CPU  {' '.join(arguments)}", file=sys.stderr, flush=True)
    return seconds, cpu_seconds


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def difference(run: Run, losses: list[float]) -> float:
    """The largest between the training losses of the two sides, step by step."""
    ours = [row["train/loss"] for row in run.metrics() if "train/loss" in row]
    return max(abs(a - b) for a, b in zip(ours, losses, strict=True))


def read(file: Path) -> dict:
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
