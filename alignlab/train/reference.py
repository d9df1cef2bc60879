"""Reference log-probabilities from the store: what a reference makes of a pair is computed once, ever.

Each reference has one file in the store, named after everything that decides its numbers (`identify_reference`); in it
each pair is found by a hash of the token ids that are scored. So another beta, learning rate, output folder, LoRA rank
of the policy, order, split or part of the data finds what is there, and only new pairs are computed. Pairs are computed
one at a time: in a batch, the padding that other pairs bring would change the last digits, and the numbers would depend
on which run came first.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from huggingface_hub.utils import tqdm
from trl import DPOConfig

from alignlab.disk import digest
from alignlab.errors import ModelError
from alignlab.models import load as models
from alignlab.recipe.load import ModelSection
from alignlab.train.store import IDS, RECORD, ReferenceIdentity, ReferenceRecords, pair_keys, read_records, records_of

Pair = Mapping[str, Sequence[int]]  # prompt_ids, chosen_ids, rejected_ids

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls them
FORMAT = 1  # of keys and numbers; another number leaves older files unread
PAIRS_A_TURN = 16  # to a process, before the processes tell each other what they have
WHERE_IT_LAY = ("_name_or_path", "base_model_name_or_path", "revision")  # in a config: says nothing of the weights
WHO_WROTE_IT = ("transformers_version", "peft_version", "dtype", "torch_dtype", "inference_mode")


# Which reference --------------------------------------------------------------


def identify_reference(
    section: ModelSection,
    start: models.Start,
    *,
    ld_alpha: float | None = None,
    prefix_sharing: bool = False,
    known: Mapping[str, Any] | None = None,
) -> ReferenceIdentity:
    """The identity of a recipe's reference, by content: the same weights in another folder are the same reference.

    Ask once the model is loaded, when a hub model's files are on this machine. Hashing reads all the weights; pass
    what `model.identify` has found before as `known`, and it is used where it is about the reference's weights.

    Besides weights, configuration, adapter, dtype, quantization and `ld_alpha`, which change the numbers, this holds
    what changes their rounding (attention implementation, prefix sharing, device, float32 matmul precision, library
    versions): in bfloat16 that is tenths of a nat on a long reply. The number of CPU threads is left out; it moves
    the last digits of float32.
    """
    bare = section.reference == "base"
    other = section.reference_folder
    name = section.name if bare else start.weights if start.adapter else other or start.weights
    adapter = None if bare or not start.adapter else _local_adapter(other or start.adapter)
    weights = known if known and known["name"] == name else models.identify(section, name)
    facts = {
        "format": FORMAT,
        "weights": weights.get("weights") or weights,
        "config": _config(Path(name)) if Path(name).is_dir() else None,  # a hub commit covers its own
        "adapter": [models.weights_hash(adapter), _config(adapter)] if adapter else None,
        "dtype": [section.dtype, section.dtype if section.lora is not None else "float32"],  # computed in, kept in
        "quantization": models.quantization(section).to_dict() if section.load_in_4bit else None,
        "ld_alpha": ld_alpha,
        "attention": section.attn_implementation,
        "prefix_sharing": prefix_sharing,
        **({"kernels": importlib.metadata.version("kernels")} if section.use_kernels else {}),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "float32_matmul": torch.get_float32_matmul_precision(),
        "versions": _versions(adapter is not None, section.load_in_4bit),
    }
    how = section.dtype + (", 4-bit" if section.load_in_4bit else "") + (f", ld_alpha {ld_alpha}" if ld_alpha else "")
    return ReferenceIdentity(f"{start.reference}; {how}", json.loads(json.dumps(facts, default=str)))


def _versions(adapter: bool, quantized: bool) -> dict[str, str]:
    names = ["torch", "transformers", "trl"] + ["peft"] * adapter + ["bitsandbytes"] * quantized
    return {name: importlib.metadata.version(name) for name in names}


def _local_adapter(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    return Path(cached_file(name, models.ADAPTER_FILE)).parent


def _config(folder: Path) -> str:
    """A hash of how the weights in a folder are used: its configuration, and code of its own where it brings some."""
    files = [file for name in ("config.json", models.ADAPTER_FILE) if (file := folder / name).is_file()]
    settings = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    acting = [{k: v for k, v in one.items() if k not in WHERE_IT_LAY + WHO_WROTE_IT} for one in settings]
    return digest([acting, [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))]])


# What is there, and the rest --------------------------------------------------


@dataclass(frozen=True)
class StoredPairs:
    """Pairs, and what the store knows of them."""

    identity: ReferenceIdentity
    splits: Mapping[str, Dataset]
    keys: Mapping[str, np.ndarray]  # of each pair of each split
    records: np.ndarray  # of these pairs, sorted by key
    missing: Sequence[tuple[str, int]]  # split and row of each pair to compute, the longest first, none twice

    @property
    def pairs(self) -> int:
        return sum(len(keys) for keys in self.keys.values())

    @cached_property
    def ids(self) -> Mapping[str, Dataset]:
        return {split: pairs.select_columns([*IDS]) for split, pairs in self.splits.items()}

    @property
    def hits(self) -> int:
        return len(self.known_keys)

    @cached_property
    def known_keys(self) -> np.ndarray:
        """Of the pairs that need no computing; a pair that stands there twice counts twice."""
        keys = np.concatenate([*self.keys.values()])
        return keys[np.isin(keys, self.records["key"])]


@dataclass(frozen=True)
class StoreUse:
    """What the store was good for; `str()` is the line a run prints."""

    pairs: int
    hits: int
    seconds: float  # spent computing the others
    saved_seconds: float  # what the hits took when they were computed

    def __str__(self) -> str:
        saved = f" (saved about {_duration(self.saved_seconds)})" if self.hits else ""
        others = self.pairs - self.hits
        computed = f"; {others:,} computed in {_duration(self.seconds)}" if others else ""
        return f"reference: {self.hits:,} of {self.pairs:,} pairs from the store{saved}{computed}"


def look_up(
    identity: ReferenceIdentity,
    splits: Mapping[str, Dataset],
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> StoredPairs:
    """What the store knows of these pairs, the same on every rank: rank 0 reads.

    A file that is damaged, or is about something else than its name says, counts as empty, and one line says so.
    `max_length` and `truncation_mode` are TRL's, and matter to pairs that are cut by them.
    """
    keyed = {split: pair_keys(pairs, max_length, truncation_mode) for split, pairs in splits.items()}
    wanted = np.concatenate([keys for keys, _ in keyed.values()])
    records = _from_main(lambda: read_records(identity, wanted))
    longest = sorted(
        (
            (-length, key, (split, row))
            for split, of in keyed.items()
            for row, (key, length) in enumerate(zip(*of, strict=True))
        ),
        key=lambda item: item[:2],
    )
    known, missing = set(records["key"]), {}
    for _, key, place in longest:
        if key not in known:
            missing.setdefault(key, place)
    return StoredPairs(
        identity, splits, {split: keys for split, (keys, _) in keyed.items()}, records, [*missing.values()]
    )


def worth_storing(found: StoredPairs, online_pairs: int) -> bool:
    """Whether completing the store costs no more reference forwards than a run without it, which makes `online_pairs`.

    That is so for any run over all of its training pairs, since the forward is the same and evaluations come free;
    not for one that stops after a small part of them, unless another run has stored them already.
    """
    return len(found.missing) <= online_pairs


def pairs_scored_online(args: DPOConfig, train: int, validation: int, world_size: int = 1) -> int:
    """How many pairs the reference would score in a run over these many pairs, without the store."""
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    trained = args.max_steps * a_step if args.max_steps > 0 else math.ceil(args.num_train_epochs * train)
    steps = trained / a_step
    every = args.eval_steps or steps
    evaluations = args.eval_on_start + math.ceil(steps / (every if every >= 1 else every * steps))
    return trained + evaluations * validation


def complete(found: StoredPairs, compute: Callable[[Pair], tuple[float, float]]) -> tuple[dict[str, Dataset], StoreUse]:
    """The splits with TRL's reference columns, after computing and storing what was missing.

    `compute` gives the reference's log-probabilities of one pair (chosen, rejected). With several ranks each computes
    its share, as often as the others do, and rank 0 writes. What was computed before an interruption is kept. Where
    another run has stored a pair meanwhile, its numbers are taken. Raises ModelError where a log-probability is no
    number; a store that cannot be written costs a line, not the run.
    """
    began = time.perf_counter()
    records = _filled(found, compute) if found.missing else found.records
    spent = time.perf_counter() - began
    filled = {}
    for split, pairs in found.splits.items():
        of = records_of(records, found.keys[split])
        filled[split] = with_reference_columns(pairs, of["chosen"], of["rejected"])
    saved = records_of(found.records, found.known_keys)["seconds"].sum()
    return filled, StoreUse(found.pairs, found.hits, spent, float(saved) / PartialState().num_processes)


def with_reference_columns(pairs: Dataset, chosen_N: np.ndarray, rejected_N: np.ndarray) -> Dataset:
    """The pairs with `ref_chosen_logps` and `ref_rejected_logps` (float32), in place of any they had."""
    pairs = pairs.remove_columns([name for name in COLUMNS if name in pairs.column_names])
    for name, values_N in zip(COLUMNS, (chosen_N, rejected_N), strict=True):
        pairs = pairs.add_column(name, np.asarray(values_N, np.float32))
    return pairs


def _filled(found: StoredPairs, compute: Callable[[Pair], tuple[float, float]]) -> np.ndarray:
    """Every record of these pairs, the missing ones computed now."""
    state = PartialState()
    growing = ReferenceRecords(found.identity, found.records, writes=state.is_main_process)
    a_turn = PAIRS_A_TURN * state.num_processes
    quiet = not (state.is_main_process and sys.stderr.isatty())
    try:
        with tqdm(total=len(found.missing), desc="reference", unit="pair", delay=3, disable=quiet) as bar:
            for first in range(0, len(found.missing), a_turn):
                turn = found.missing[first : first + a_turn]
                growing.add(np.concatenate(gather_object([_share(found, turn, compute)])))
                bar.update(len(turn))
    finally:
        growing.save()
    wanted = np.concatenate([*found.keys.values()])
    return _from_main(lambda: records_of(growing.records, np.unique(wanted)))


def _share(found: StoredPairs, turn: Sequence[tuple[str, int]], compute: Callable) -> np.ndarray:
    """This rank's records of a turn. Each rank computes as many, or sharded weights would wait for one another."""
    state = PartialState()
    mine = range(state.process_index, state.process_index + len(turn), state.num_processes)
    places = [turn[min(i, len(turn) - 1)] for i in mine]
    return np.array([_computed(found, *place, compute) for place in places], RECORD)


def _computed(found: StoredPairs, split: str, row: int, compute: Callable) -> tuple[bytes, float, float, float]:
    pair = found.ids[split][row]
    began = time.perf_counter()
    chosen, rejected = compute(pair)
    seconds = time.perf_counter() - began
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        raise ModelError(
            f"the reference gives pair {row} of {split} the log-probabilities {chosen} and {rejected}; "
            f"set model.dtype=float32, or look for NaN in its weights"
        )
    return found.keys[split][row], chosen, rejected, seconds


def _from_main(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank."""
    state = PartialState()
    return broadcast_object_list([make() if state.is_main_process else None])[0]


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
