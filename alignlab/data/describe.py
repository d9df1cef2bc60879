"""What is in a recipe's data: counts, lengths, biases, overlaps, and a few pairs as the model will see them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import xxhash

from alignlab.data import Prepared
from alignlab.data.preparation import BATCH_ROWS
from alignlab.data.splits import SPLITS
from alignlab.recipe import DataSection

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from transformers import PreTrainedTokenizerBase

PERCENTILES = {"p5": 5, "median": 50, "p95": 95, "max": 100}
EXAMPLES = 2
SHOWN_CHARACTERS = 700  # of one prompt or reply on the terminal


def describe(prepared: Prepared, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The prepared data in numbers that JSON can hold; lengths are in tokens, replies with their EOS."""
    lengths = {name: _lengths(prepared, f"{name}_ids") for name in ("prompt", "chosen", "rejected")}
    return {
        "source": section.source or ", ".join(dict.fromkeys(part["source"] or "empty" for part in prepared.parts)),
        "path": section.path,
        "subset": section.subset,
        "format": section.format,
        "rows": prepared.rows,
        "parts": [dict(part) for part in prepared.parts],
        "kept": sum(prepared.kept.values()),
        "splits": dict(prepared.kept),
        "dropped": dict(prepared.dropped),
        "repaired": dict(prepared.repaired),
        "dialogues": {split: len(keys) for split, keys in prepared.dialogues.items()},
        "tokens": {name: _percentiles(counts) for name, counts in lengths.items()},
        "length_bias": _length_bias(lengths["chosen"], lengths["rejected"]),
        "duplicates": _count_duplicates(prepared),
        "overlap": _overlap(prepared),
        "fingerprint": prepared.fingerprint,
        "examples": _examples(prepared, tokenizer),
    }


def render(description: Mapping[str, Any]) -> str:
    """A description as text for a terminal."""
    bias, overlap = description["length_bias"], description["overlap"]
    paths = description["path"] if isinstance(description["path"], list) else [description["path"]]
    where = " ".join(filter(None, (*paths, description["subset"])))
    lines = [
        f"{description['source']}  {where}  as {description['format']}",
        f"rows read       {description['rows']:>9,}",
        f"pairs kept      {description['kept']:>9,}   "
        + ", ".join(f"{split} {description['splits'][split]:,}" for split in SPLITS),
        *_parts(description["parts"]),
        *_counts("rows dropped", description["dropped"]),
        *_counts("repaired", description["repaired"]),
        "",
        "tokens    " + "".join(f"{name:>9}" for name in ("mean", *PERCENTILES)),
        *(_token_line(name, description["tokens"][name]) for name in ("prompt", "chosen", "rejected")),
        "",
        f"the longer reply is the chosen one: {bias['longer_is_chosen']:.3f} ± {bias['stderr']:.3f} (n={bias['n']:,})",
        f"pairs that repeat another pair: {description['duplicates']:,}",
        f"test dialogues that training also holds: {overlap['dialogues']:,}; test prompts: {overlap['prompts']:,}",
    ]
    for number, example in enumerate(description["examples"], 1):
        lines += ["", f"training pair {number}, as the model sees it"]
        for name in ("prompt", "chosen", "rejected"):
            lines += [f"  {name}", textwrap.indent(_shown(example[name]), "  | ", lambda line: True)]
    return "\n".join(lines)


def _lengths(prepared: Prepared, column: str) -> numpy.ndarray:
    import numpy
    import pyarrow.compute

    columns: list[pyarrow.ChunkedArray] = [getattr(prepared, split).data.column(column) for split in SPLITS]
    return numpy.concatenate([pyarrow.compute.list_value_length(ids).to_numpy() for ids in columns])


def _percentiles(counts: numpy.ndarray) -> dict[str, float]:
    import numpy

    values = numpy.percentile(counts, list(PERCENTILES.values()), method="nearest")
    named = {name: int(value) for name, value in zip(PERCENTILES, values, strict=True)}
    return {"mean": round(float(counts.mean()), 1), **named}


def _length_bias(chosen: numpy.ndarray, rejected: numpy.ndarray) -> dict[str, float]:
    """The share of pairs whose longer reply is the chosen one, of those with replies of different length."""
    n = int((chosen != rejected).sum())
    share = float((chosen > rejected).sum()) / max(n, 1)
    return {"longer_is_chosen": share, "stderr": (share * (1 - share) / max(n, 1)) ** 0.5, "n": n}


def _count_duplicates(prepared: Prepared) -> int:
    """How many pairs have the prompt and both replies of an earlier one."""
    seen = set()
    for split in SPLITS:
        for batch in _strings(prepared, split, ["prompt", "chosen", "rejected"]):
            seen.update(_digest(repr(pair)) for pair in zip(*batch.values(), strict=True))
    return sum(prepared.kept.values()) - len(seen)


def _overlap(prepared: Prepared) -> dict[str, int]:
    """What test shares with train: dialogues (by first Human turn), and rows with a prompt that a training row has."""
    train = set()
    for batch in _strings(prepared, "train", ["prompt"]):
        train.update(map(_digest, batch["prompt"]))
    test = [prompt for batch in _strings(prepared, "test", ["prompt"]) for prompt in batch["prompt"]]
    return {
        "dialogues": len(prepared.dialogues["train"] & prepared.dialogues["test"]),
        "prompts": sum(_digest(prompt) in train for prompt in test),
    }


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode())


def _strings(prepared: Prepared, split: str, columns: list[str]) -> Any:
    return getattr(prepared, split).select_columns(columns).iter(BATCH_ROWS)


def _examples(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The first training pairs, spelled from their token ids: BOS and EOS show where the model meets them."""
    examples = []
    for pair in prepared.train.select(range(min(EXAMPLES, len(prepared.train)))):
        prompt = tokenizer.decode(pair["prompt_ids"])
        whole = {name: tokenizer.decode(pair["prompt_ids"] + pair[f"{name}_ids"]) for name in ("chosen", "rejected")}
        examples.append({"prompt": prompt, **{name: text.removeprefix(prompt) for name, text in whole.items()}})
    return examples


def _parts(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a path, where there are several."""
    if len(parts) < 2:
        return []
    line = "  {rows:>9,} rows, {kept:,} kept, {dropped:,} dropped  {path} as {source}"
    return [line.format(**part) for part in parts]


def _counts(title: str, counts: Mapping[str, int]) -> list[str]:
    lines = [f"{title:<15} {sum(counts.values()):>9,}"]
    return lines + [f"  {count:>9,}  {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1])]


def _token_line(name: str, tokens: Mapping[str, float]) -> str:
    return f"{name:<10}" + "".join(f"{tokens[column]:>9,}" for column in ("mean", *PERCENTILES))


def _shown(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} […] {text[-half:]}"
