"""Files and folders written whole, JSON lines, hashes, seals of what is finished, and one cache; imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from alignlab.errors import MachineError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

MARKER = "COMPLETE.json"  # of a folder: the size and hash of each of its files, written after them
CHECKSUM = "checksum"  # of a JSON record: the hash of all its other fields
LARGE = 1 << 26  # bytes; a larger file is hashed once a process, as long as it is not written
SECONDS_BEFORE_A_LINE = 2  # of waiting for another process
BESIDE = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)(-\w{8}\.tmp)?")  # what `_beside` names, now and earlier
UNNAMED = re.compile(r"tmp\w{8}")  # what `tempfile` names


# Written whole ----------------------------------------------------------------


def sync(path: Path) -> None:
    """Returns when the file is on the disk, and no longer only in the memory of the system."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _beside(path: Path) -> Path:
    """A name in the same folder that tells which process writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and is gone when it does not.

    So a reader sees the old file or the new one, never half of one. What a killed process left of it goes.
    """
    remove_left_behind(path.parent, f".{path.name}.*")
    beside = _beside(path)
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends well, and is gone when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_behind(path.parent, f".{path.name}.*")
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        _make_readable(beside)
        _put_in_place(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Gives files the mode of any other file: safetensors writes for its owner alone, and a cache may be shared."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def _put_in_place(beside: Path, path: Path) -> None:
    old = _beside(path)
    if path.exists():
        path.rename(old)
    beside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path, **needed: type) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; `needed` are keys that each row has, and their types.

    A damaged line is left out with a warning. A last line without an end, cut off by a crash, is left out without one.
    """
    if not path.is_file():
        return []
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if (row := read_row(line, **needed)) is not None:
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if damaged:
        more = f" and {len(damaged) - 1} more of its lines are" if len(damaged) > 1 else " is"
        log.warning("%s:%d%s damaged and left out", path, damaged[0], more)
    return rows


def read_row(line: bytes, **needed: type) -> dict[str, Any] | None:
    """A line as a JSON object with these keys; none where it is something else, or cut off."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    has_all = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in needed.items())
    return row if has_all else None


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """A JSON object with a checksum, by which `read_record` sees whether it was changed."""
    plain = json.loads(json.dumps(facts, default=str))
    write_json(path, {**plain, CHECKSUM: digest(plain)})


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote; ValueError ("not …") where it is no JSON object, or was changed since.

    An object without a checksum is taken as it is: another program wrote it, or a person did.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({e})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    written = record.pop(CHECKSUM, None)
    if written is not None and written != digest(record):
        raise ValueError(f"not as it was written (to keep a change of your own, remove its {CHECKSUM})")
    return record


# Hashes and seals -------------------------------------------------------------


def digest(value: Any) -> str:
    """A hash of plain JSON, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def hash_file(file: Path) -> str:
    facts = file.stat()
    if facts.st_size < LARGE:
        return _hash(file)
    return _hash_large(file.absolute(), facts.st_ino, facts.st_size, facts.st_mtime_ns)


@lru_cache
def _hash_large(file: Path, *facts: int) -> str:
    return _hash(file)


def _hash(file: Path) -> str:
    content = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            content.update(block)
    return content.hexdigest()


def seal(folder: Path, names: Iterable[str] = ("**/*",)) -> None:
    """Writes the marker that calls a folder finished: the size and hash of its files, or of those of these names."""
    files = sorted({file for name in names for file in folder.glob(name) if file.is_file() and file.name != MARKER})
    write_json(folder / MARKER, {str(file.relative_to(folder)): _seal(file) for file in files})


def _seal(file: Path) -> tuple[int, str]:
    return file.stat().st_size, hash_file(file)


def find_damage(folder: Path) -> str | None:
    """The first file of a sealed folder that is not as it was sealed; none where all are."""
    try:
        seals = json.loads((folder / MARKER).read_bytes())
        changed = [name for name, sealed in seals.items() if not _is_as_sealed(folder / name, sealed)]
    except (OSError, ValueError, AttributeError):  # AttributeError: a marker that is no JSON object
        return MARKER
    return changed[0] if changed else None if seals else MARKER


def _is_as_sealed(file: Path, sealed: Any) -> bool:
    return file.is_file() and [*_seal(file)] == sealed


def is_sealed(folder: Path) -> bool:
    return (folder / MARKER).is_file()


# The cache --------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("ALIGNLAB_CACHE") or Path.home() / ".cache" / "alignlab")


def make_once(folder: Path, about: str, make: Callable[[Path], None]) -> bool:
    """Sees to it that a folder of the cache is there and whole; whether it had to be made.

    One process makes it while others wait. A folder that is there is only read, since a shared cache may be ours to
    read alone; one that has changed since it was made is told and made again.
    """
    damaged = find_damage(folder) if folder.is_dir() else None
    if damaged:
        log.warning("%s: %s is damaged (%s); making it again", about, folder, damaged)
    elif folder.is_dir():
        with contextlib.suppress(OSError):
            os.utime(folder / MARKER)  # when it was last used
        return False
    with _locked(folder.with_suffix(".lock"), about):
        if folder.is_dir() and not find_damage(folder):  # another process has made it meanwhile
            return False
        with filling(folder) as beside:
            make(beside)
            seal(beside)
    return True


@contextlib.contextmanager
def _locked(path: Path, about: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=SECONDS_BEFORE_A_LINE)
    except Timeout:
        log.info("%s: another process is making it; waiting", about)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class ResultCache:
    """Results by key in a file of JSON lines, each there as soon as it is known; several threads may add.

    A line that was cut off or changed is told and left out: what it held is made again.
    """

    def __init__(self, path: Path):
        self.path, self.values, self._lock = path, {}, threading.Lock()
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if self._read(line)]
        if len(whole) < len(lines):
            damaged = len(lines) - len(whole)
            log.warning("%s: %d of %d lines are damaged; what they held is made again", path, damaged, len(lines))
            write_bytes(path, b"".join(whole))

    def _read(self, line: bytes) -> bool:
        """Takes in what a line says, where it is whole."""
        try:
            row = json.loads(line)
            key, value, checksum = row["key"], row["value"], row[CHECKSUM]
        except (ValueError, KeyError, TypeError):
            return False
        is_whole = line.endswith(b"\n") and checksum == digest([key, value])
        if is_whole:
            self.values[key] = value
        return is_whole

    def add(self, key: str, value: Any, **facts: Any) -> None:
        row = {"key": key, "value": value, CHECKSUM: digest([key, value]), **facts}
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, row)
            self.values[key] = value

    def complete(
        self,
        wanted: Mapping[str, Item],
        compute: Callable[[list[Item]], Sequence[Any]],
        *,
        at_once: int,
        about: str,
    ) -> list[Any]:
        """The values of all keys, in their order; `compute` gives those not there yet, `at_once` of them at a time."""
        from huggingface_hub.utils import tqdm

        missing = [key for key in wanted if key not in self.values]
        with tqdm(total=len(missing), desc=about, leave=False, disable=None if missing else True) as bar:
            for start in range(0, len(missing), at_once):
                few = missing[start : start + at_once]
                for key, value in zip(few, compute([wanted[key] for key in few]), strict=True):
                    self.add(key, value)
                bar.update(len(few))
        return [self.values[key] for key in wanted]


# Left behind ------------------------------------------------------------------


def remove_left_behind(folder: Path, pattern: str = ".*") -> None:
    """Removes what processes that have ended were writing in a folder, as far as we may."""
    for path in folder.glob(pattern):
        if BESIDE.fullmatch(path.name) and not _is_being_written(path):
            with contextlib.suppress(MachineError):
                remove(path)


def _is_being_written(path: Path) -> bool:
    beside = BESIDE.fullmatch(path.name)
    return beside is not None and _is_running(int(beside["process"]))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def left_in_cache() -> list[Path]:
    """What processes that have ended left half made in the cache.

    Only names that are given here count, and hidden ones in folders of our own: somebody may keep other things there.
    """
    own = [
        path
        for folder in ("prepared", "reference", "judgements", "exports")
        for path in cache_folder().glob(f"{folder}/.*")
    ]
    found = [path for path in cache_folder().glob("*") if BESIDE.fullmatch(path.name) or UNNAMED.fullmatch(path.name)]
    return sorted(path for path in [*own, *found] if not _is_being_written(path))


def size_of(path: Path) -> int:
    """Bytes, of a file or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def check_writable(folder: Path) -> None:
    """Raises PermissionError where nothing can be written into a folder: better before the work than after it."""
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def remove(path: Path) -> int:
    """Removes a file or folder, where it is still there, and returns how many bytes that freed."""
    try:
        size = size_of(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as e:
        raise MachineError(f"{path} cannot be removed ({e.strerror}); remove it as the user who owns it") from None
    return size


# Faults -----------------------------------------------------------------------

# How safetensors and torch.save (torch 2.13) say that the disk is full, in place of ENOSPC
FULL_DISK = ("No space left on device", "iostream error", "PytorchStreamWriter failed", "inline_container")
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


def explain(error: BaseException) -> str | None:
    """What is wrong with a disk or folder, in one line with a remedy; none where an error comes from something else."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    return next((line for cause in causes if (line := _explain(cause))), None)


def _explain(error: BaseException) -> str | None:
    number, path = getattr(error, "errno", None), Path(os.fsdecode(getattr(error, "filename", None) or "the folder"))
    if beside := BESIDE.fullmatch(path.name):
        path = path.with_name(beside["name"])
    if number in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in FULL_DISK):
        return "no space left on the disk; make room, and the same command goes on from where it was"
    if isinstance(error, FileNotFoundError) and _is_working_folder_gone():
        return "the working folder is gone; change into one that is there"
    if number == errno.ENAMETOOLONG:
        return f"the name {path.name[:40]}… is too long for this disk; choose a shorter one"
    if number in IN_THE_WAY:
        file = next((each for each in (path, *path.parents) if each.is_file()), path)
        why = os.strerror(number)
        return f"{file} is in the way ({why}): {path} cannot be written; move it, or name another folder"
    if number in CLOSED:
        return f"{path} cannot be opened or written ({os.strerror(number)}); {_remedy(path)}"
    return None


def _remedy(path: Path) -> str:
    if path.is_relative_to(cache_folder()):
        return "set ALIGNLAB_CACHE to a folder of your own"
    return "work in a folder that is yours to write, or ask its owner"


def _is_working_folder_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
