"""Prepared data in the cache, by content: a folder for each set of rows, settings and tokenizer; imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab import disk
from alignlab.data.account import make_folder

log = logging.getLogger(__name__)

Account = dict[str, Any]  # what became of all rows, as plain JSON

ACCOUNT = "account.json"


@dataclass(frozen=True)
class Entry:
    """Prepared data: a folder of files, and the account of how they came about."""

    folder: Path
    account: Account
    is_fresh: bool  # made just now


def prepared_folder() -> Path:
    return disk.cache_folder() / "prepared"


def find_or_make(facts: Mapping[str, Any] | None, about: str, make: Callable[[Path], Account]) -> Entry:
    """The entry of these facts; `make` fills its folder where there is none.

    Without facts, or where the cache cannot be written, it is made in a folder that goes when the process ends.
    """
    disk.remove_left_behind(disk.cache_folder(), ".data.*.tmp")  # Arrow files of processes that were killed
    if facts is None:
        return _make_apart(make)
    folder = prepared_folder() / disk.digest(facts)
    try:
        is_fresh = disk.make_once(folder, "data", lambda beside: _fill(beside, about, make))
    except OSError as error:
        reason = error.strerror or error
        log.warning("data: cannot keep prepared rows in %s (%s); going on without", folder.parent, reason)
        return _make_apart(make)
    return Entry(folder, _read(folder)["account"], is_fresh)


def _make_apart(make: Callable[[Path], Account]) -> Entry:
    folder = make_folder()
    return Entry(folder, make(folder), is_fresh=True)


def _fill(folder: Path, about: str, make: Callable[[Path], Account]) -> None:
    account = make(folder)
    disk.write_json(folder / ACCOUNT, {"about": about, "account": account})


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ACCOUNT).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PreparedData:
    """One entry of the cache."""

    path: Path
    about: str
    pairs: int
    bytes: int
    last_used: float  # seconds since 1970


def list_prepared() -> list[PreparedData]:
    """The prepared data in the cache, the last used first."""
    entries = []
    for marker in prepared_folder().glob(f"[!.]*/{disk.MARKER}"):
        with contextlib.suppress(OSError):
            entries.append(_listed(marker.parent, marker.stat().st_mtime))
    return sorted(entries, key=lambda entry: -entry.last_used)


def _listed(folder: Path, last_used: float) -> PreparedData:
    try:
        facts = _read(folder)
        about, pairs = facts["about"], sum(facts["account"]["kept"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        about, pairs = "damaged; it will be prepared again", 0
    return PreparedData(folder, about, pairs, disk.size_of(folder), last_used)


def clear_prepared() -> int:
    """Removes the prepared data and returns how many bytes that freed; who has it open reads on."""
    return sum(disk.remove(path) for path in prepared_folder().glob("*"))
