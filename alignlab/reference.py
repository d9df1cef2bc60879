"""The store of reference log-probabilities: what a reference makes of a pair is computed once, ever.

Each reference has one file under `$ALIGNLAB_CACHE/reference/`, named after everything that decides its numbers
(`identify_reference`); in it each pair has one record, found by a hash of the token ids that are scored. So another
beta, learning rate, output folder, LoRA rank of the policy, order, split or part of the data finds what is there, and
only new pairs are computed. Pairs are computed one at a time: in a batch, the padding that other pairs bring would
change the last digits, and the numbers would depend on which run came first.

The first line of a file is JSON that says what it holds; records of 28 bytes follow, sorted by key.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm
from trl import DPOConfig

from alignlab import model as models
from alignlab.errors import MachineError, ModelError
from alignlab.fields import cache_folder
from alignlab.recipe import ModelSection

log = logging.getLogger(__name__)
Pair = Mapping[str, Sequence[int]]  # prompt_ids, chosen_ids, rejected_ids

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = {"ref_chosen_logps": "chosen", "ref_rejected_logps": "rejected"}  # TRL's name -> ours
RECORD = np.dtype([("key", "S16"), ("chosen", "<f4"), ("rejected", "<f4"), ("seconds", "<f4")])
NOTHING = np.empty(0, RECORD)
SUFFIX = ".logps"
FORMAT = 1  # of the files and the keys; another number leaves older files unread
PAIRS_A_TURN = 16  # to a process, before the processes tell each other what they have
SECONDS_BETWEEN_SAVES = 60
WHERE_IT_LAY = ("_name_or_path", "base_model_name_or_path", "revision")  # in a config: says nothing of the weights
WHO_WROTE_IT = ("transformers_version", "peft_version", "dtype", "torch_dtype", "inference_mode")


# Which reference --------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceIdentity:
    """Everything that decides what a reference makes of a pair, but for the pair."""

    sentence: str  # for people
    facts: Mapping[str, Any]  # for the store; plain JSON

    @cached_property
    def file(self) -> Path:
        return store_folder() / f"{_digest(self.facts)}{SUFFIX}"


def store_folder() -> Path:
    return cache_folder() / "reference"


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
    name = section.name if bare else start.weights
    adapter = None if bare or not start.adapter else _local_adapter(start.adapter)
    weights = known if known and known["name"] == name else models.identify(section, name)
    dtype = models.compute_dtype(section)
    facts = {
        "format": FORMAT,
        "weights": weights.get("weights") or weights,
        "config": _config(Path(name)) if Path(name).is_dir() else None,  # a hub commit covers its own
        "adapter": [models.weights_hash(adapter), _config(adapter)] if adapter else None,
        "dtype": [section.dtype, section.dtype if section.lora else "float32"],  # computed in, kept in
        "quantization": models.quantization(section).to_dict() if section.load_in_4bit else None,
        "ld_alpha": ld_alpha,
        "attention": section.attn_implementation or models.best_attention(dtype),
        "prefix_sharing": prefix_sharing,
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
    return _digest([acting, [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))]])


def _digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


# What is there, and the rest --------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Pairs, and what the store knows of them."""

    identity: ReferenceIdentity
    splits: Mapping[str, Dataset]
    keys: Mapping[str, np.ndarray]  # of each pair of each split
    records: np.ndarray  # of these pairs, sorted by key
    missing: Sequence[tuple[str, int]]  # split and row of each pair to compute, the longest first, none twice

    @property
    def pairs(self) -> int:
        return sum(len(keys) for keys in self.keys.values())

    @property
    def hits(self) -> int:
        return sum(int(_is_in(self.records, keys).sum()) for keys in self.keys.values())


@dataclass(frozen=True)
class Receipt:
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
) -> Found:
    """What the store knows of these pairs, the same on every rank: rank 0 reads.

    A file that is damaged, or is about something else than its name says, counts as empty, and one line says so.
    `max_length` and `truncation_mode` are TRL's, and matter to pairs that are cut by them.
    """
    keyed = {split: _keys(pairs, max_length, truncation_mode) for split, pairs in splits.items()}
    wanted = np.concatenate([keys for keys, _ in keyed.values()])
    records = _from_main(lambda: _known(identity, wanted))
    longest = sorted(
        ((-length, key, (split, row)) for split, of in keyed.items() for row, (key, length) in enumerate(zip(*of))),
        key=lambda item: item[:2],
    )
    known, missing = set(records["key"]), {}
    for _, key, place in longest:
        if key not in known:
            missing.setdefault(key, place)
    return Found(identity, splits, {split: keys for split, (keys, _) in keyed.items()}, records, [*missing.values()])


def worth_storing(found: Found, online_pairs: int) -> bool:
    """Whether completing the store costs no more reference forwards than a run without it, which makes `online_pairs`.

    That is so for any run over all of its training pairs, since the forward is the same and evaluations come free;
    not for one that stops after a small part of them, unless another run has stored them already.
    """
    return len(found.missing) <= online_pairs


def online_pairs(args: DPOConfig, train: int, validation: int, world_size: int = 1) -> int:
    """How many pairs the reference would score in a run over so many training and validation pairs, without the store."""
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    trained = args.max_steps * a_step if args.max_steps > 0 else math.ceil(args.num_train_epochs * train)
    steps = trained / a_step
    every = args.eval_steps or steps
    evaluations = args.eval_on_start + math.ceil(steps / (every if every >= 1 else every * steps))
    return trained + evaluations * validation


def complete(found: Found, compute: Callable[[Pair], tuple[float, float]]) -> tuple[dict[str, Dataset], Receipt]:
    """The splits with TRL's reference columns, after computing and storing what was missing.

    `compute` gives the reference's log-probabilities of one pair (chosen, rejected). With several ranks each computes
    its share, as often as the others do, and rank 0 writes. What was computed before an interruption is kept. Where
    another run has stored a pair meanwhile, its numbers are taken. Raises ModelError where a log-probability is no
    number; a store that cannot be written costs a line, not the run.
    """
    began = time.perf_counter()
    records = _filled(found, compute) if found.missing else found.records
    spent = time.perf_counter() - began
    filled = {
        split: with_reference_columns(pairs, *_of(records, found.keys[split])) for split, pairs in found.splits.items()
    }
    saved = sum(_at(found.records, keys[_is_in(found.records, keys)])["seconds"].sum() for keys in found.keys.values())
    return filled, Receipt(found.pairs, found.hits, spent, float(saved) / PartialState().num_processes)


def with_reference_columns(pairs: Dataset, chosen_N: np.ndarray, rejected_N: np.ndarray) -> Dataset:
    """The pairs with `ref_chosen_logps` and `ref_rejected_logps` (float32), in place of any they had."""
    pairs = pairs.remove_columns([name for name in COLUMNS if name in pairs.column_names])
    for name, values_N in zip(COLUMNS, (chosen_N, rejected_N), strict=True):
        pairs = pairs.add_column(name, np.asarray(values_N, np.float32))
    return pairs


def _of(records: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = _at(records, keys)
    return found["chosen"], found["rejected"]


def _filled(found: Found, compute: Callable[[Pair], tuple[float, float]]) -> np.ndarray:
    """Every record of these pairs, the missing ones computed now."""
    state = PartialState()
    shelf = _Shelf(found.identity, found.records)
    a_turn = PAIRS_A_TURN * state.num_processes
    quiet = not (state.is_main_process and sys.stderr.isatty())
    try:
        with tqdm(total=len(found.missing), desc="reference", unit="pair", delay=3, disable=quiet) as bar:
            for first in range(0, len(found.missing), a_turn):
                turn = found.missing[first : first + a_turn]
                shelf.add(np.concatenate(gather_object([_share(found, turn, compute)])))
                bar.update(len(turn))
    finally:
        shelf.save()
    wanted = np.concatenate([*found.keys.values()])
    return _from_main(lambda: _at(shelf.records, np.unique(wanted)))


def _share(found: Found, turn: Sequence[tuple[str, int]], compute: Callable) -> np.ndarray:
    """This rank's records of a turn. Each rank computes as many, or sharded weights would wait for one another."""
    state = PartialState()
    mine = range(state.process_index, state.process_index + len(turn), state.num_processes)
    places = [turn[min(i, len(turn) - 1)] for i in mine]
    return np.array([_computed(found, *place, compute) for place in places], RECORD)


def _computed(found: Found, split: str, row: int, compute: Callable) -> tuple[bytes, float, float, float]:
    pair = {name: found.splits[split][row][name] for name in IDS}
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


# Keys and records -------------------------------------------------------------


def _keys(pairs: Dataset, max_length: int | None, truncation_mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair: a hash of the ids that are scored, and how many tokens its two sequences have."""
    keys, lengths = [], []
    for prompt, chosen, rejected in _ids(pairs):
        longest = len(prompt) + max(len(chosen), len(rejected))
        cut = (max_length, truncation_mode) if max_length is not None and longest > max_length else ()
        sizes = array("q", [len(prompt), len(chosen), len(rejected)]).tobytes()
        ids = b"".join(one.tobytes() for one in (prompt, chosen, rejected))
        keys.append(xxhash.xxh3_128_digest(sizes + ids + repr(cut).encode()))
        lengths.append(2 * len(prompt) + len(chosen) + len(rejected))
    return np.array(keys, RECORD["key"]), np.array(lengths, np.int64)


def _ids(pairs: Dataset) -> Iterator[tuple[np.ndarray, ...]]:
    """Prompt, chosen and rejected ids of each pair, int32, read from Arrow without a Python object a token."""
    for table in pairs.select_columns([*IDS]).with_format("arrow").iter(1000):
        columns = [table.column(name).combine_chunks() for name in IDS]
        offsets = [column.offsets.to_numpy() for column in columns]
        values = [column.values.to_numpy(zero_copy_only=False).astype("<i4") for column in columns]
        for row in range(table.num_rows):
            yield tuple(ids[at[row] : at[row + 1]] for ids, at in zip(values, offsets, strict=True))


def _is_in(records: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.isin(keys, records["key"])


def _at(records: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The records of keys that are all there."""
    found = records[np.searchsorted(records["key"], keys)]
    assert (found["key"] == keys).all(), "every pair has a record by now"
    return found


def _merged(older: np.ndarray, newer: np.ndarray) -> np.ndarray:
    """Both, sorted by key; where both know a pair, the older record stays."""
    both = np.concatenate([older, newer])
    return both[np.unique(both["key"], return_index=True)[1]]


# Files ------------------------------------------------------------------------


class _Shelf:
    """The records of one reference while they are added to; each is lent to other runs within a minute."""

    def __init__(self, identity: ReferenceIdentity, records: np.ndarray):
        self.identity, self.records, self.fresh = identity, records, NOTHING
        self.writes = PartialState().is_main_process
        self.saved = time.monotonic()

    def add(self, records: np.ndarray) -> None:
        self.records, self.fresh = _merged(self.records, records), _merged(self.fresh, records)
        if time.monotonic() - self.saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        self.saved = time.monotonic()
        if not self.writes or not len(self.fresh):
            return
        try:
            self.records = _merged(_store(self.identity, self.fresh), self.records)
            self.fresh = NOTHING
        except OSError as e:  # a lock that is not given back is one too
            self.writes = False
            log.warning("reference: cannot store in %s (%s); going on without", store_folder(), e.strerror or e)


def _store(identity: ReferenceIdentity, fresh: np.ndarray) -> np.ndarray:
    """Adds records to a reference's file, whole or not at all, and returns all that it holds."""
    identity.file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(identity.file.with_suffix(".lock"), timeout=SECONDS_BETWEEN_SAVES):
        records = _merged(_read(identity)[0], fresh)
        body = records.tobytes()
        head = {
            "reference": identity.sentence,
            "pairs": len(records),
            "checksum": xxhash.xxh3_128_hexdigest(body),
            "facts": identity.facts,
        }
        _replace(identity.file, json.dumps(head).encode() + b"\n" + body)
    return records


def _replace(path: Path, content: bytes) -> None:
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # a cache may be shared
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _known(identity: ReferenceIdentity, wanted: np.ndarray) -> np.ndarray:
    records, complaint = _read(identity)
    if complaint:
        log.warning("reference: %s %s; computing its pairs again", identity.file, complaint)
    records = records[_is_in(wanted, records["key"])]
    if len(records):
        with contextlib.suppress(OSError):  # a shared store may be ours to read only
            os.utime(identity.file)
    return records


def _read(identity: ReferenceIdentity) -> tuple[np.ndarray, str | None]:
    """The records of a reference; none, and what is wrong, where its file cannot be relied on."""
    try:
        head, _, body = identity.file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return NOTHING, None
    except OSError as e:
        return NOTHING, f"cannot be read ({e.strerror})"
    says = _parsed(head)
    if says.get("checksum") != xxhash.xxh3_128_hexdigest(body):
        return NOTHING, "is damaged (its checksum does not match)"
    if says.get("facts") != identity.facts:
        return NOTHING, "is about another reference"
    return np.frombuffer(body, RECORD), None


def _parsed(head: bytes) -> dict[str, Any]:
    try:
        says = json.loads(head)
    except ValueError:
        return {}
    return says if isinstance(says, dict) else {}


@dataclass(frozen=True)
class StoredReference:
    """One file of the store."""

    path: Path
    reference: str
    pairs: int
    bytes: int
    last_used: float  # seconds since 1970


def list_store() -> list[StoredReference]:
    """What the store holds, the last used first."""
    rows = []
    for path in store_folder().glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            says, facts = _parsed(file.readline()), path.stat()
            name = says.get("reference", "damaged; it will be computed again")
            rows.append(StoredReference(path, name, says.get("pairs", 0), facts.st_size, facts.st_mtime))
    return sorted(rows, key=lambda row: -row.last_used)


def clear_store() -> int:
    """Empties the store and returns how many bytes that freed; a run that is filling it stores its pairs anew."""
    files = [path for path in store_folder().glob("*") if path.is_file()] if store_folder().is_dir() else []
    freed = 0
    for path in files:
        try:
            freed += path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise MachineError(f"{path} cannot be removed ({e.strerror}); remove it as the user who owns it") from None
    return freed
