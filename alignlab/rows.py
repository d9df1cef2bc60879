"""Raw rows from the hub, a folder or a file, one at a time, each with the file and line it came from.

A folder or hub dataset may bring its own splits: names that begin with `data.split`, `data.test_split` or "validation"
(`train-00000-of-00002.parquet`, `test.jsonl.gz`). A single file brings none.
"""

from __future__ import annotations

import difflib
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import DataError, MachineError, RecipeError
from alignlab.recipe import DataSection

log = logging.getLogger(__name__)

PARQUET_ROWS = 1000  # read at a time
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}  # what `datasets` writes beside the rows


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row; `line` is the line of a text file, or the row's number in a table, both from 1."""

    fields: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True)
class Part:
    """Rows that share a split; `split` is none where the rows are still to be carved."""

    split: str | None
    rows: Callable[[], Iterator[Row]]


def find_parts(section: DataSection) -> list[Part]:
    """Where a recipe's rows come from: test rows first, then validation, then the rest."""
    if section.source == "toy":
        return [Part(None, lambda: _toy_rows(section))]
    if section.path is None:
        raise RecipeError(f"data.path is not set: data.source={section.source} needs a hub id, a folder or a file")
    path = Path(section.path).expanduser()
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in _folder_files(path, section)}
        return _parts(files, read_file, section)
    if path.exists():
        if section.subset:
            log.warning("data.subset=%s is not used: data.path names one file", section.subset)
        return [Part(None, lambda: read_file(path))]
    _refuse_missing_path(path, section.path)
    return _parts(_load_hub(section), lambda table: _table_rows(table, section.path), section)


def _toy_rows(section: DataSection) -> Iterator[Row]:
    from alignlab import toy

    for line, fields in enumerate(toy.rows(section.toy), 1):
        yield Row(fields, "toy", line)


# Which split


def split_named(name: str, section: DataSection) -> str | None:
    """The split that a file, hub split or `split` field of this name stands for, if any."""
    names = {"train": section.split, "test": section.test_split, "validation": "validation"}
    for split, beginning in names.items():
        if beginning and re.match(re.escape(beginning) + r"(?![A-Za-z_])", name):
            return split
    return None


def _parts(named: dict[str, Any], read: Callable[[Any], Iterator[Row]], section: DataSection) -> list[Part]:
    splits = {name: split_named(Path(name).name, section) for name in sorted(named)}
    wanted = "train" if "train" in splits.values() else None  # without a train split, what has no name is carved
    chosen = {name: split for name, split in splits.items() if split in ("test", "validation", wanted)}
    if wanted not in chosen.values():
        raise DataError(
            f"{section.path}: no split {section.split!r} among {_listing(splits)}; set data.split to one of them"
            f" (and data.test_split=null where that is the test split)"
        )
    if left_out := splits.keys() - chosen.keys():
        log.info("%s: not read, being of another split: %s", section.path, ", ".join(sorted(left_out)))
    order = ["test", "validation", wanted]
    return [
        Part(None if split == wanted else split, lambda name=name: read(named[name]))
        for name, split in sorted(chosen.items(), key=lambda item: order.index(item[1]))
    ]


def _listing(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# Paths


def _folder_files(folder: Path, section: DataSection) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join('*' + suffix for suffix in READERS)} file in this folder")
    if not section.subset or folder.name == section.subset:
        return files
    inside = [file for file in files if _in_subset(file.relative_to(folder), section.subset)]
    if not inside:
        there = {file.relative_to(folder).parts[0] for file in files}
        raise DataError(
            f"{folder}: no folder {section.subset!r} inside (there are {_listing(there)});"
            " set data.subset to one of them, or to null to read them all"
        )
    return inside


def _in_subset(file: Path, subset: str) -> bool:
    """Holds for `helpful-base/train.jsonl.gz` and for `helpful-base.test.jsonl.gz`."""
    return file.parts[: len(Path(subset).parts)] == Path(subset).parts or str(file).startswith(f"{subset}.")


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name not in _NOT_DATA and _suffix(file) in READERS


def _suffix(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def _refuse_missing_path(path: Path, written: str) -> None:
    """Raises where a path that is not there can be no hub id (`namespace/name`) either."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", written) and _suffix(path) not in READERS
    if is_hub_id and not (path.parent.name and path.parent.is_dir()):
        return
    there = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "give a hub id, a folder or a file as data.path"
    raise DataError(f"{written}: no such file or folder; {hint}")


# Files


def read_file(file: Path) -> Iterator[Row]:
    """The rows of one file, read as they are asked for."""
    reader = READERS.get(_suffix(file))
    if reader is None:
        raise DataError(f"{file}: not a kind of file that is read here ({', '.join(READERS)})")
    for line, fields in reader(file):
        if not isinstance(fields, dict):
            raise DataError(f"{file}:{line}: a row must be a JSON object, not {json.dumps(fields)[:40]}")
        yield Row(fields, str(file), line)


def _read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{number}: not JSON ({error}); mend or remove this line") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file}:{number + 1}: the gzip stream is damaged or cut short ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """A file of one JSON array, or of JSON lines under this name; an array is held in memory as text."""
    with file.open("rb") as lines:
        start = lines.read(1000).lstrip()
    yield from _read_array(file) if start.startswith(b"[") else _read_lines(file)


def _read_array(file: Path) -> Iterator[tuple[int, Any]]:
    line, position = 1, 0
    try:
        text = file.read_text(encoding="utf-8")
        decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[]*")
        while True:
            start = gap.match(text, position).end()
            line += text.count("\n", position, start)
            if text.startswith("]", start):
                return
            row, position = decode(text, start)
            yield line, row
            line += text.count("\n", start, position)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", line)
        raise DataError(f"{file}:{line}: not JSON ({error}); mend the file") from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
            for number, fields in enumerate(batch.to_pylist(), number + 1):  # noqa: B020  goes on counting
                yield number, fields
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a whole parquet file ({str(error).splitlines()[0]}); fetch it again") from error


READERS = {".jsonl": _read_lines, ".jsonl.gz": _read_lines, ".json": _read_json, ".parquet": _read_parquet}


# Hub


def _load_hub(section: DataSection) -> dict[str, Any]:
    """The splits of a hub dataset, downloaded or from the hub's cache."""
    import datasets

    local = "or download it elsewhere and point data.path at the folder"
    try:
        return dict(datasets.load_dataset(section.path, data_dir=section.subset))
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise MachineError(
                f"{section.path}: a gated dataset; ask for access on its page and log in (hf auth login), {local}"
            ) from error
        raise DataError(
            f"{section.path}: neither a file or folder here nor a dataset on the hub (a private one needs"
            " `hf auth login`); check data.path"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(
            f"{section.path}: no such file or folder here, and the hub cannot be reached"
            f" ({str(error).splitlines()[0]}); connect, {local}"
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{section.path}: cannot be loaded from the hub ({str(error).splitlines()[0]})") from error


def _table_rows(table: Any, name: str) -> Iterator[Row]:
    line = 0
    for batch in table.with_format("arrow").iter(PARQUET_ROWS):
        for line, fields in enumerate(batch.to_pylist(), line + 1):  # noqa: B020  goes on counting
            yield Row(fields, f"{name}/{table.split}", line)
