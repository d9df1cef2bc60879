"""The files of the reference store: what a reference makes of pairs, and the replies it draws; imports no torch.

Each reference has one file of records, 28 bytes for each pair, sorted by key, and one file for each batch of prompts
that it has answered. The first line of a file is JSON that says what it holds. Files are written whole or not at all,
checked on reading, and shared by runs that use them at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from filelock import FileLock

from alignlab.disk import cache_folder, digest, remove, write_bytes

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
RECORD = np.dtype([("key", "S16"), ("chosen", "<f4"), ("rejected", "<f4"), ("seconds", "<f4")])
NOTHING = np.empty(0, RECORD)
SUFFIX, REPLIES = ".logps", ".replies"
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


class ReferenceRecords:
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
        body, facts = records.tobytes(), {"facts": identity.facts}
        _write(identity.file, {"reference": identity.sentence, "pairs": len(records), **facts}, body)
    return records


def _write(path: Path, says: Mapping[str, Any], body: bytes) -> None:
    """A file of the store: a line that says what it holds, and the rest."""
    head = {**says, "checksum": xxhash.xxh3_128_hexdigest(body)}
    write_bytes(path, json.dumps(head).encode() + b"\n" + body)


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
    body, complaint = _body(identity.file, {"facts": identity.facts})
    return NOTHING if body is None else np.frombuffer(body, RECORD), complaint


def _body(path: Path, expected: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    """What stands behind the first line; none where there is no file, or, with what is wrong, no reliable one."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None, None
    except OSError as e:
        return None, f"cannot be read ({e.strerror})"
    says = _parsed(head)
    if says.get("checksum") != xxhash.xxh3_128_hexdigest(body):
        return None, "is damaged (its checksum does not match)"
    if any(says.get(name) != value for name, value in expected.items()):
        return None, "is about another reference"
    return body, None


def _parsed(head: bytes) -> dict[str, Any]:
    try:
        says = json.loads(head)
    except ValueError:
        return {}
    return says if isinstance(says, dict) else {}


# Replies ----------------------------------------------------------------------


def read_replies(identity: ReferenceIdentity, drawing: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The replies that a reference gave where it was asked in just this way; none where it has not been.

    `drawing` is everything that decides the replies but for the reference, as plain JSON.
    """
    path = _replies_file(identity, drawing)
    body, complaint = _body(path, {"facts": identity.facts, "drawing": drawing})
    if complaint:
        log.warning("reference: %s %s; drawing its replies again", path, complaint)
    if body is None:
        return None
    with contextlib.suppress(OSError):  # a shared store may be ours to read only
        os.utime(path)
    return [json.loads(line) for line in body.splitlines()]


def store_replies(
    identity: ReferenceIdentity, drawing: Mapping[str, Any], replies: Sequence[Mapping[str, Any]]
) -> None:
    """Keeps them; two processes at once write the same. A store that cannot be written costs a line, not the run."""
    path, body = _replies_file(identity, drawing), b"".join(json.dumps(each).encode() + b"\n" for each in replies)
    about = {"reference": identity.sentence, "replies": len(replies)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {**about, "facts": identity.facts, "drawing": drawing}, body)
    except OSError as e:
        log.warning("reference: cannot store replies in %s (%s)", store_folder(), e.strerror or e)


def _replies_file(identity: ReferenceIdentity, drawing: Mapping[str, Any]) -> Path:
    return identity.file.with_name(f"{identity.file.stem}-{digest(drawing)}{REPLIES}")


# The whole store --------------------------------------------------------------


@dataclass(frozen=True)
class StoredReference:
    """What the store holds of one reference."""

    path: Path
    reference: str
    pairs: int
    bytes: int
    last_used: float  # seconds since 1970


def list_store() -> list[StoredReference]:
    """What the store holds, the last used first."""
    files: dict[str, list[Path]] = {}
    for path in [*store_folder().glob(f"*{SUFFIX}"), *store_folder().glob(f"*{REPLIES}")]:
        files.setdefault(path.stem.partition("-")[0], []).append(path)
    rows = []
    for paths in files.values():
        with contextlib.suppress(FileNotFoundError):  # cleared at this moment
            rows.append(_listed(paths))
    return sorted(rows, key=lambda row: -row.last_used)


def _listed(paths: Sequence[Path]) -> StoredReference:
    """One reference, of whose files the records come first."""
    heads, sizes = [_head(path) for path in paths], [path.stat() for path in paths]
    pairs, replies = (sum(says.get(what, 0) for says in heads) for what in ("pairs", "replies"))
    name = heads[0].get("reference", "damaged; it will be computed again")
    name += f", and {replies:,} replies it drew" if replies else ""
    last_used = max(facts.st_mtime for facts in sizes)
    return StoredReference(paths[0], name, pairs, sum(facts.st_size for facts in sizes), last_used)


def _head(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _parsed(file.readline())


def clear_store() -> int:
    """Empties the store and returns how many bytes that freed; a run that is filling it stores its pairs anew."""
    return sum(remove(path) for path in store_folder().glob("*"))
