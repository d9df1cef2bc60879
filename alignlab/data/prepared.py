"""Prepared data on disk, by content: a folder for each set of rows, settings and tokenizer; imports no torch.

An entry is written whole or not at all, by one process while others wait for it, and is checked on reading.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alignlab.data.ledger import make_folder
from alignlab.data.rows import hash_content
from alignlab.disk import cache_folder, digest
from alignlab.errors import MachineError

log = logging.getLogger(__name__)

Account = dict[str, Any]  # what became of all rows, as plain JSON

ACCOUNT = "account.json"  # written last
SECONDS_BEFORE_A_LINE = 2  # of waiting for another process


@dataclass(frozen=True)
class Entry:
    """Prepared data: a folder of files, and the account of how they came about."""

    folder: Path
    account: Account
    is_fresh: bool  # made just now


def prepared_folder() -> Path:
    return cache_folder() / "prepared"


def find_or_make(facts: Mapping[str, Any] | None, about: str, make: Callable[[Path], Account]) -> Entry:
    """The entry of these facts; `make` fills its folder where there is none.

    Without facts, or where the cache cannot be written, it is made in a folder that goes when the process ends.
    """
    if facts is None:
        return _make_apart(make)
    folder = prepared_folder() / digest(facts)
    if found := _read(folder):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            return _read(folder, says=True) or _make(folder, about, make)
    except OSError as error:
        reason = error.strerror or error
        log.warning("data: cannot keep prepared rows in %s (%s); going on without", folder.parent, reason)
    return _make_apart(make)


def _make_apart(make: Callable[[Path], Account]) -> Entry:
    folder = make_folder()
    return Entry(folder, make(folder), is_fresh=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=SECONDS_BEFORE_A_LINE)
    except Timeout:
        log.info("data: another process is preparing the same rows; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, about: str, make: Callable[[Path], Account]) -> Entry:
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        account = make(beside)
        files = {file.name: hash_content(file) for file in sorted(beside.iterdir())}
        (beside / ACCOUNT).write_text(json.dumps({"about": about, "files": files, "account": account}))
        os.chmod(beside, 0o755)  # a cache may be shared
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return Entry(folder, account, is_fresh=True)


def _read(folder: Path, says: bool = False) -> Entry | None:
    """The entry in a folder; none where there is none, or where its files are not what was written (then said)."""
    if not folder.is_dir():
        return None
    head = _head(folder)
    if head and all(_is_whole(folder / name, content) for name, content in head["files"].items()):
        with contextlib.suppress(OSError):  # a shared cache may be ours to read only
            os.utime(folder / ACCOUNT)
        return Entry(folder, head["account"], is_fresh=False)
    if says:
        log.warning("data: %s is damaged; preparing its rows again", folder)
    return None


def _is_whole(file: Path, content: str) -> bool:
    return file.is_file() and hash_content(file) == content


def _head(folder: Path) -> dict[str, Any] | None:
    try:
        head = json.loads((folder / ACCOUNT).read_text())
    except (OSError, ValueError):
        return None
    return head if isinstance(head, dict) and {"about", "files", "account"} <= head.keys() else None


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
    for folder in prepared_folder().glob("*"):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        head = _head(folder) or {"about": "damaged; it will be prepared again", "account": {"kept": {}}}
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            used = max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)
            entries.append(PreparedData(folder, head["about"], sum(head["account"]["kept"].values()), size, used))
    return sorted(entries, key=lambda entry: -entry.last_used)


def clear_prepared() -> int:
    """Removes the prepared data and returns how many bytes that freed; who has it open reads on."""
    freed = 0
    for path in prepared_folder().glob("*") if prepared_folder().is_dir() else []:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            continue
        except OSError as e:
            raise MachineError(f"{path} cannot be removed ({e.strerror}); remove it as the user who owns it") from None
        freed += size
    return freed
