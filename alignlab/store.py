"""The files of the reference store: one for each reference, and in it one record for each pair; imports no torch.

The first line of a file is JSON that says what it holds; records of 28 bytes follow, sorted by key. Files are written
whole or not at all, checked on reading, and shared by runs that use them at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock

from alignlab.errors import MachineError
from alignlab.fields import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
RECORD = np.dtype([("key", "S16"), ("chosen", "<f4"), ("rejected", "<f4"), ("seconds", "<f4")])
NOTHING = np.empty(0, RECORD)
SUFFIX = ".logps"
SECONDS_BETWEEN_SAVES = 60
SECONDS_FOR_THE_LOCK = 60  # which other runs hold for as long as a file takes to write


@dataclass(frozen=True)
class ReferenceIdentity:
    """Everything that decides what a reference makes of a pair, but for the pair."""

    sentence: str  # for people
    facts: Mapping[str, Any]  # for the store; plain JSON

    @property
    def file(self) -> Path:
        return store_folder() / f"{digest(self.facts)}{SUFFIX}"


def store_folder() -> Path:
    return cache_folder() / "reference"


def digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Keys and records -------------------------------------------------------------


def pair_keys(pairs: Dataset, max_length: int | None, truncation_mode: str) -> tuple[np.ndarray, np.ndarray]:
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


def records_of(records: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The records of keys that are all there."""
    found = records[np.searchsorted(records["key"], keys)]
    assert (found["key"] == keys).all(), "every pair has a record by now"
    return found


def merged(*parts: np.ndarray) -> np.ndarray:
    """All records, sorted by key; of a pair that several parts know, the first one's."""
    together = np.concatenate([NOTHING, *parts])
    return together[np.unique(together["key"], return_index=True)[1]]


# Files ------------------------------------------------------------------------


class Shelf:
    """The records of one reference while a run adds to them; what it adds is in the file within a minute."""

    def __init__(self, identity: ReferenceIdentity, records: np.ndarray, writes: bool = True):
        self.identity, self.records, self.writes = identity, records, writes
        self.fresh: list[np.ndarray] = []
        self.saved = time.monotonic()

    def add(self, records: np.ndarray) -> None:
        self.fresh.append(records)
        if time.monotonic() - self.saved > SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Writes what was added, and takes in what other runs have; says so once where nothing can be written."""
        fresh = merged(*self.fresh)
        self.records = merged(self._stored(fresh), self.records, fresh)
        self.fresh, self.saved = [], time.monotonic()

    def _stored(self, fresh: np.ndarray) -> np.ndarray:
        if not self.writes or not len(fresh):
            return NOTHING
        try:
            return _store(self.identity, fresh)
        except OSError as e:  # a lock that is not given back is one too
            self.writes = False
            log.warning("reference: cannot store in %s (%s); going on without", store_folder(), e.strerror or e)
            return NOTHING


def _store(identity: ReferenceIdentity, fresh: np.ndarray) -> np.ndarray:
    """Adds records to a reference's file, whole or not at all, and returns all that it holds."""
    identity.file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(identity.file.with_suffix(".lock"), timeout=SECONDS_FOR_THE_LOCK):
        records = merged(_read(identity)[0], fresh)
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


def read_records(identity: ReferenceIdentity, wanted: np.ndarray) -> np.ndarray:
    """The records that a reference's file has of these keys; one line says so where the file cannot be relied on."""
    records, complaint = _read(identity)
    if complaint:
        log.warning("reference: %s %s; computing its pairs again", identity.file, complaint)
    records = records[np.isin(records["key"], wanted)]
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
