"""Files written whole, JSON lines, hashes and the cache folder; imports no torch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

log = logging.getLogger(__name__)


def read_lines(path: Path, **needed: type) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; `needed` are keys that each row has, and their types.

    A damaged line is left out with a warning. A last line without an end, cut off by a crash, is left out without one.
    """
    if not path.is_file():
        return []
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if (row := _row(line, needed)) is not None:
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if damaged:
        more = f" and {len(damaged) - 1} more of its lines are" if len(damaged) > 1 else " is"
        log.warning("%s:%d%s damaged and left out", path, damaged[0], more)
    return rows


def _row(line: bytes, needed: Mapping[str, type]) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    has_all = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in needed.items())
    return row if has_all else None


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def sync(path: Path) -> None:
    """Returns when the file is on the disk, and no longer only in the memory of the system."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def hash_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """A hash of plain JSON, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def cache_folder() -> Path:
    return Path(os.environ.get("ALIGNLAB_CACHE") or Path.home() / ".cache" / "alignlab")
