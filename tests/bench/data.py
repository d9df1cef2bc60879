"""Preparing preference pairs, against TRL's own preparation of the same pairs with the same tokenizer.

    python tests/bench/data.py --pairs 100000 --rounds 3

Each measurement is a process of its own, ours and TRL's in turn, with two threads. Ours reads raw rows from JSON lines,
splits, shortens, tokenizes and writes; TRL's `_prepare_dataset` gets prompt, chosen and rejected that are split and
loaded already, and tokenizes and writes. Rows are HH-RLHF harmless-base from `BENCH_DATA` (a .jsonl.gz), or ../shared
beside the checkout, repeated with an edit to the first question and to both replies of each repetition.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import machine

SHARED = Path(__file__).parents[3] / "shared"
DATA = Path(os.environ.get("BENCH_DATA", SHARED / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz"))
TOKENIZERS = Path(os.environ.get("BENCH_TOKENIZERS", SHARED / "tokenizers"))
RESULTS = Path(__file__).parent / "results"
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
THREADS = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
HUMAN = "\n\nHuman:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=160_000, help="pairs prepared once, and again from the cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WHOSE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        whose, file = args.measure
        print(json.dumps({"ours": ours, "trl": trl}[whose](Path(file), args.tokenizer) | memory()))
        return
    packages = ("tokenizers", "datasets", "pyarrow")
    load = round(os.getloadavg()[0], 2)
    described = machine(*packages, threads=int(THREADS["RAYON_NUM_THREADS"]), load_before=load)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, Path(folder)) | {"large": large(args, Path(folder))}
    found = {"tokenizer": args.tokenizer, "rows": args.pairs, **found, "machine": described}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Ours and TRL's in turn: pairs a second, the ratio of each round, and peak memory."""
    raw, split = folder / "raw.jsonl", folder / "split.jsonl"
    write_rows(raw, args.pairs)
    write_split(raw, split)
    rounds = []
    for number in range(args.rounds):
        turns = [("ours", raw), ("trl", split)]
        found = {whose: measure(whose, file, args.tokenizer, folder / f"{whose}{number}") for whose, file in turns}
        rounds.append(found)
        print(number, {whose: f"{one['pairs'] / one['seconds']:,.0f} pairs/s" for whose, one in found.items()})
    rate = {whose: [one[whose]["pairs"] / one[whose]["seconds"] for one in rounds] for whose in ("ours", "trl")}
    ratios = [mine / theirs for mine, theirs in zip(rate["ours"], rate["trl"], strict=True)]
    work = [one["trl"]["cpu_seconds"] / one["ours"]["cpu_seconds"] for one in rounds]  # of nearly as many pairs
    return {
        **{f"{whose}_pairs_a_second": [round(one) for one in rates] for whose, rates in rate.items()},
        "ratio_median": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "cpu_ratio_median": round(statistics.median(work), 2),
        "cpu_ratios": [round(ratio, 2) for ratio in work],
        **{f"{whose}_peak_gib": max(one[whose]["peak_gib"] for one in rounds) for whose in ("ours", "trl")},
        "ours_helper_peak_gib": max(one["ours"]["helper_peak_gib"] for one in rounds),
    }


def large(args: argparse.Namespace, folder: Path) -> dict:
    """Our preparation of many pairs, and of the same a second time."""
    write_rows(folder / "large.jsonl", args.large)
    first, second = (measure("ours", folder / "large.jsonl", args.tokenizer, folder / "cache") for _ in range(2))
    return {
        "rows": args.large,
        "seconds": first["seconds"],
        "peak_gib": first["peak_gib"],
        "helper_peak_gib": first["helper_peak_gib"],
        "cached_seconds": second["seconds"],
        "cached_peak_gib": second["peak_gib"],
    }


def measure(whose: str, file: Path, tokenizer: str, cache: Path) -> dict:
    environment = os.environ | QUIET | THREADS | {"ALIGNLAB_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, __file__, "--tokenizer", tokenizer, "--measure", whose, str(file)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(file: Path, name: str) -> dict:
    import datasets  # noqa: F401  imported outside the clock, as TRL's side has it
    from transformers import AutoTokenizer

    from alignlab.data.prepare import prepare
    from alignlab.recipe.load import DataSection

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    section = DataSection(source="hh-rlhf", path=str(file))
    with Clock() as clock:
        prepared = prepare(section, tokenizer)
    return {"pairs": sum(prepared.kept.values()), **clock.seconds}


def trl(file: Path, name: str) -> dict:
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    args = DPOConfig(bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False, max_length=None)
    with Clock() as clock:
        prepared = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")
    return {"pairs": len(prepared), **clock.seconds}


class Clock:
    """Wall seconds, and CPU seconds of this process and of those that helped it: what a busy machine changes less."""

    def __enter__(self) -> Clock:
        self.began = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        wall, cpu = time.perf_counter() - self.began[0], cpu_seconds() - self.began[1]
        self.seconds = {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# Rows


def write_rows(path: Path, count: int) -> None:
    """Raw rows: the real ones, then the same again with edits."""
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        real = [json.loads(line) for line in lines]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            repetition, place = divmod(number, len(real))
            file.write(json.dumps(edited(real[place], repetition)) + "\n")


def edited(row: dict, repetition: int) -> dict:
    if not repetition:
        return row
    sides = {}
    for name in ("chosen", "rejected"):
        text, begins = row[name], row[name].index(HUMAN) + len(HUMAN)
        sides[name] = f"{text[:begins]} ({repetition}){text[begins:]} [{name} {repetition}]"
    return sides


def write_split(raw: Path, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in split_rows(raw))


def split_rows(raw: Path) -> Iterator[dict]:
    from alignlab.data.transcript import split_pair
    from alignlab.errors import DataError

    with raw.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            try:
                prompt, chosen, rejected = split_pair(row["chosen"], row["rejected"])
            except DataError:
                continue
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# Memory


def memory() -> dict:
    """Peaks of this process and of the largest that helped it; what they share is in both. Linux counts in KiB."""
    peak, helper = (resource.getrusage(of).ru_maxrss / 2**20 for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"peak_gib": round(peak, 2), "helper_peak_gib": round(helper, 2)}


if __name__ == "__main__":
    main()
