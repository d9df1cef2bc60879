"""Batches of preference pairs for the step benchmarks: real HH-RLHF rows, or generated ones of the same lengths.

`BENCH_DATA` is a file of HH-RLHF rows (.jsonl or .jsonl.gz), `BENCH_TOKENIZERS` a folder of tokenizers, each in a
folder of its own name; both are looked for in ../shared beside the checkout otherwise. Where there is no data, rows
are generated.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import get_length_grouped_indices

from alignlab.data.prepare import prepare
from alignlab.recipe.load import DataSection

SHARED = Path(__file__).parents[3] / "shared"
REAL = SHARED / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz"
LIMITS = {"max_prompt_tokens": 352, "max_reply_tokens": 160}  # 512 in all
MEGA_BATCH = 50  # batches whose rows transformers' length-grouped sampler sorts together
Rows = Sequence[dict[str, list[int]]]

# Quantiles 0, 5, … 100 % of the tokens of the 1,929 pairs that `real_rows` makes of HH-RLHF harmless-base's test file
# with Llama-2's tokenizer, the end-of-sequence token of a reply included. The lengths of prompt, chosen and rejected
# reply are correlated by 0.21, 0.21 and 0.25; CORRELATION is that of the normal variables they are drawn through.
QUANTILES = {
    "prompt_ids": [15, 20, 23, 26, 29, 36, 51, 65, 78, 90, 103, 116, 129, 143, 158, 174, 194, 220, 256, 298, 352],
    "chosen_ids": [2, 7, 10, 12, 13, 15, 18, 20, 23, 25, 28, 31, 35, 40, 45, 51, 60, 69, 85, 107, 160],
    "rejected_ids": [2, 7, 10, 13, 16, 18, 21, 24, 28, 31, 35, 40, 46, 52, 58, 64, 72, 82, 96, 118, 160],
}
CORRELATION = 0.25


def find_rows(tokenizer: str | None, words: int) -> tuple[Dataset, str]:
    """Pairs of at most 512 tokens in a fixed random order, and what they are.

    Real rows are for a named tokenizer; generated ones, where there is none or no data, are of `words` tokens.
    """
    file = Path(os.environ.get("BENCH_DATA", REAL))
    if tokenizer is None or (not file.is_file() and "BENCH_DATA" not in os.environ):
        return generated_rows(words), "generated, of HH-RLHF harmless-base's lengths"
    folder = Path(os.environ.get("BENCH_TOKENIZERS", SHARED / "tokenizers")) / tokenizer
    for name, path in (("BENCH_DATA", file), ("BENCH_TOKENIZERS", folder)):
        if not path.exists():
            raise SystemExit(f"{name}: there is no {path}")
    return real_rows(file, folder), "HH-RLHF harmless-base test" if file == REAL else file.name


def real_rows(file: Path, folder: Path) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return prepare(DataSection(source="hh-rlhf", path=str(file), **LIMITS), tokenizer).train.shuffle(seed=0)


def generated_rows(words: int, count: int = 2_000) -> Dataset:
    """Random tokens of a vocabulary of `words`; the replies of a pair have nothing in common, as most real ones."""
    generator = random.Random(0)
    draw = lambda length: [generator.randrange(3, words) for _ in range(length)]
    lengths = (draw_lengths(generator) for _ in range(count))
    return Dataset.from_list([{name: draw(length) for name, length in row.items()} for row in lengths])


def draw_lengths(generator: random.Random) -> dict[str, int]:
    normal = statistics.NormalDist()
    common = generator.gauss() * CORRELATION**0.5
    shares = {name: normal.cdf(common + generator.gauss() * (1 - CORRELATION) ** 0.5) for name in QUANTILES}
    return {name: round(at_quantile(table, shares[name])) for name, table in QUANTILES.items()}


def at_quantile(table: list[int], share: float) -> float:
    """Between the entries of a table of equally spaced quantiles, in a straight line."""
    place = share * (len(table) - 1)
    low = min(int(place), len(table) - 2)
    return table[low] + (place - low) * (table[low + 1] - table[low])


def random_batches(rows: Dataset, pairs: int) -> Iterator[Rows]:
    """The mega-batch's batches, in the rows' own random order."""
    return (rows.select(range(i, i + pairs)).to_list() for i in range(0, MEGA_BATCH * pairs, pairs))


def grouped_batches(rows: Dataset, pairs: int, count: int) -> list[Rows]:
    """Of the same mega-batch sorted by length, as the sampler does, `count` batches at equal distances."""
    mega = rows.select(range(MEGA_BATCH * pairs))
    seeded, lengths = torch.Generator().manual_seed(0), [length(row) for row in mega]
    order = get_length_grouped_indices(lengths, pairs, mega_batch_mult=MEGA_BATCH, generator=seeded)
    starts = [(2 * i + 1) * MEGA_BATCH // (2 * count) * pairs for i in range(count)]
    return [mega.select(order[start : start + pairs]).to_list() for start in starts]


def length(row: dict[str, list[int]]) -> int:
    """The tokens of the longer of a pair's two sequences, which is what padding goes by."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def padded_positions(batch: Rows) -> int:
    """What stock TRL computes in one forward."""
    return 2 * len(batch) * max(map(length, batch))


def needed_positions(batch: Rows) -> int:
    """What any forward must compute: each common prefix once, and nothing for padding."""
    return sum(_needed(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in batch)


def _needed(prompt: list[int], chosen: list[int], rejected: list[int]) -> int:
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    return len(prompt) + len(chosen) + len(rejected) - common
