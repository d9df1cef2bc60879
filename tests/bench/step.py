"""A DPO step on CPU with shared prefixes, and with a stored reference, against stock TRL on the same real batches.

    python tests/bench/step.py llama-25m                                # 8 pairs, 20 batches, all ways
    python tests/bench/step.py gpt2-82m --pairs 4 --ways stock shared

Policy and reference are two models, so that the losses compared are not ln 2. A stopped run writes what it has. On
Linux, time is lost to page faults unless the C library keeps its memory: `make bench` sets what makes it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from batches import MEGA_BATCH, find_rows
from comparison import RESULTS, WAYS, Bench, Found, report
from datasets import Dataset
from machine import machine
from memory_gpu import tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from trl import DPOConfig

from alignlab.train.trainers import AlignDPOTrainer

LLAMA = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6}
TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "llama-25m": (LlamaConfig(vocab_size=32_000, tie_word_embeddings=True, **LLAMA), "llama2"),
    "gpt2-82m": (GPT2Config(n_layer=6), "gpt2"),
    "toy": (LlamaConfig(vocab_size=500, tie_word_embeddings=True, **TOY), None),
}
KEPT = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=8, help="of a batch")
    parser.add_argument("--batches", type=int, default=20, choices=range(2, MEGA_BATCH + 1), metavar="2..50")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="stock among them")
    parser.add_argument("--generated", action="store_true", help="generated rows, also where real ones are at hand")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)  # TRL 1.16 sets it
    config, vocabulary = SHAPES[args.model]
    rows, what = find_rows(None if args.generated else vocabulary, config.vocab_size)
    if missing := [name for name in KEPT if name not in os.environ]:
        print(f"{', '.join(missing)} not set: page faults may decide the figures (make bench sets them)")
    ways = {name: way for name, way in WAYS.items() if name in {"stock", *args.ways}}
    facts, found = {"model": args.model, "pairs": args.pairs, "rows": what}, Found()
    here = machine(threads=torch.get_num_threads(), keeps_memory=not missing)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(make_trainer(config, args.pairs, rows, Path(folder)), ways)
        try:
            for line in bench.measure(rows, args.pairs, args.batches, found):
                print(line, file=sys.stderr, flush=True)
        finally:
            report(found, facts, here, args.results, "cpu")


def make_trainer(config: PretrainedConfig, pairs: int, rows: Dataset, folder: Path) -> AlignDPOTrainer:
    """Stock behaviour until prefixes are shared: AlignDPOTrainer changes nothing in a training step."""
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    settings = {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": 512}
    args = DPOConfig(output_dir=str(folder), per_device_train_batch_size=pairs, **settings)
    return AlignDPOTrainer(policy, reference, args, train_dataset=rows, processing_class=tokenizer())


if __name__ == "__main__":
    main()
