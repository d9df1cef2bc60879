"""What is in a recipe's data: counts, lengths, turns, length bias, and a few pairs as the model will see them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignlab.data.prepare import Prepared
from alignlab.data.prompts import turns_of
from alignlab.data.splits import SPLITS
from alignlab.recipe.load import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = {"p5": 5, "median": 50, "p95": 95, "max": 100}
EXAMPLES = 2
BINS = 24  # of a histogram


def describe(prepared: Prepared, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The prepared data in numbers that JSON can hold; lengths are in tokens, replies with their EOS."""
    lengths = {
        text: np.concatenate([prepared.token_counts(split, text) for split in SPLITS])
        for text in ("prompt", "chosen", "rejected")
    }
    layout = ", ".join(dict.fromkeys(part["source"] for part in prepared.parts if part["source"]))
    return {
        "layout": layout,
        "path": section.path,
        "subset": section.subset,
        "format": section.format,
        "made_by": [said for name in prepared.files if (said := _maker_of(Path(name)))],
        "rows_read": prepared.rows,
        "parts": [dict(part) for part in prepared.parts],
        "kept": sum(prepared.kept.values()),
        "splits": dict(prepared.kept),
        "dropped": dict(prepared.dropped),
        "repaired": dict(prepared.repaired),
        "not_read": dict(prepared.not_read),
        "dialogues": {split: len(keys) for split, keys in prepared.dialogues.items()},
        "tokens": {name: _percentiles(counts) for name, counts in lengths.items()},
        "histogram": _histogram(lengths),
        "turns": _turns(prepared, section.format),
        "length_bias": _length_bias(lengths["chosen"], lengths["rejected"]),
        "fingerprint": prepared.fingerprint,
        "examples": _examples(prepared, tokenizer),
    }


def _maker_of(file: Path) -> str:
    """What `alignlab pairs` says in the first row of its files: whose replies, judged by whom; else nothing."""
    if file.suffix != ".jsonl" or not file.is_file():
        return ""
    with file.open(encoding="utf-8", errors="replace") as lines:
        try:
            meta = json.loads(next(lines, ""))["meta"]
            return f"{file}: replies of {meta['run']} (weights {meta['weights'][:8]}), judge: {meta['judge']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""


def _percentiles(counts: np.ndarray) -> dict[str, float]:
    values = np.percentile(counts, list(PERCENTILES.values()), method="nearest")
    named = {name: int(value) for name, value in zip(PERCENTILES, values, strict=True)}
    return {"mean": round(float(counts.mean()), 1), **named}


def _histogram(lengths: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """How many of each lie in [edge, next edge) tokens; the last bin holds its upper edge."""
    longest = max(int(counts.max()) for counts in lengths.values())
    edges = np.unique(np.linspace(0, longest + 1, BINS + 1).round().astype(int))
    bins = {name: np.histogram(counts, edges)[0].tolist() for name, counts in lengths.items()}
    return {"edges": edges.tolist(), **bins}


def _turns(prepared: Prepared, form: str) -> dict[str, int]:
    """How many prompts have so many Human turns; empty where a template has written the turns in its own way."""
    if form != "hh":
        return {}
    counts = Counter(turns_of(p) for _, _, batch in prepared.batches(["prompt"]) for p in batch["prompt"])
    return {str(turns): counts[turns] for turns in sorted(counts)}


def _length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """The share of pairs whose longer reply is the chosen one, of those with replies of different length."""
    n = int((chosen != rejected).sum())
    share = float((chosen > rejected).sum()) / max(n, 1)
    return {"longer_is_chosen": share, "stderr": (share * (1 - share) / max(n, 1)) ** 0.5, "n": n}


def _examples(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The first training pairs, spelled from their token ids: BOS and EOS show where the model meets them."""
    examples = []
    for pair in prepared.train.select(range(min(EXAMPLES, len(prepared.train)))):
        prompt = tokenizer.decode(pair["prompt_ids"])
        whole = {name: tokenizer.decode(pair["prompt_ids"] + pair[f"{name}_ids"]) for name in ("chosen", "rejected")}
        examples.append({"prompt": prompt, **{name: text.removeprefix(prompt) for name, text in whole.items()}})
    return examples
