"""Where a recipe's raw rows come from: the hub, folders and files, each a part with the split that it stands for.

A folder or hub dataset may bring its own splits: names that begin with `data.split`, `data.test_split` or "validation"
(`train-00000-of-00002.parquet`, `test.jsonl.gz`). A single file brings none.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.disk import hash_file
from alignlab.errors import DataError, MachineError, RecipeError
from alignlab.files import READERS, TABLE_ROWS, Row, read_file, suffix
from alignlab.recipe import DataSection

log = logging.getLogger(__name__)

_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json"}  # what `datasets` writes beside the rows
_SPLIT_FIELDS = {"valid1": "validation", "valid2": "test"}  # of rows: summarize-from-feedback's names


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that share a split; `split` is none where the rows are still to be carved."""

    path: str  # as the recipe has it
    name: str  # of the file or table, as dropped rows name it
    split: str | None
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]  # of the content
    brought: frozenset[str] = frozenset()  # the splits that its path brings
    source: str | None = None  # what its rows mean


def find_parts(section: DataSection) -> list[Part]:
    """Where a recipe's rows come from: test rows first, then validation, then the rest."""
    if section.source == "toy":
        return [Part("toy", "toy", None, lambda: _toy_rows(section), lambda: "toy", source="toy")]
    if not section.path:
        raise RecipeError("data.path is not set: it needs a hub id, a folder or a file")
    paths = [section.path] if isinstance(section.path, str) else section.path
    order = ["test", "validation", None]
    return sorted(
        (part for path in paths for part in _parts_of(path, section)), key=lambda part: order.index(part.split)
    )


def _parts_of(written: str, section: DataSection) -> list[Part]:
    path = Path(written).expanduser()
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in _folder_files(path, section)}
        return _parts(written, {name: _file_part(written, file) for name, file in files.items()}, section)
    if path.exists():
        if section.subset:
            log.warning("data.subset=%s is not used: data.path names one file", section.subset)
        return [_file_part(written, path)]
    _refuse_missing_path(path, written)
    tables = _load_hub(written, section.subset)
    return _parts(written, {name: _table_part(written, table) for name, table in tables.items()}, section)


def _file_part(written: str, file: Path) -> Part:
    return Part(written, str(file), None, lambda: read_file(file), lambda: hash_content(file))


def _table_part(written: str, table: Any) -> Part:
    files = [Path(file["filename"]) for file in table.cache_files]
    digest = lambda: "".join(map(hash_content, files)) or table._fingerprint
    name = f"{written}/{table.split}"
    return Part(written, name, None, lambda: _table_rows(table, name), digest)


def _toy_rows(section: DataSection) -> Iterator[Row]:
    from alignlab import toy

    for line, fields in enumerate(toy.rows(section.toy), 1):
        yield Row(fields, "toy", line)


def hash_content(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


# Which split


def split_named(name: str, section: DataSection) -> str | None:
    """The split that a file, hub split or `split` field of this name stands for, if any."""
    names = {"train": section.split, "test": section.test_split, "validation": "validation"}
    for split, beginning in names.items():
        if beginning and re.match(re.escape(beginning) + r"(?![A-Za-z_])", name):
            return split
    return _SPLIT_FIELDS.get(name)


def _parts(written: str, named: dict[str, Part], section: DataSection) -> list[Part]:
    splits = {name: split_named(Path(name).name, section) for name in sorted(named)}
    wanted = "train" if "train" in splits.values() else None  # without a train split, what has no name is carved
    chosen = {name: split for name, split in splits.items() if split in ("test", "validation", wanted)}
    if wanted not in chosen.values():
        raise DataError(
            f"{written}: no split {section.split!r} among {_listing(splits)}; set data.split to one of them"
            f" (and data.test_split=null where that is the test split)"
        )
    if left_out := splits.keys() - chosen.keys():
        log.info("%s: not read, being of another split: %s", written, ", ".join(sorted(left_out)))
    brought = frozenset(chosen.values()) & {"test", "validation"}
    return [
        Part(part.path, part.name, None if split == wanted else split, part.rows, part.digest, brought)
        for name, split in chosen.items()
        if (part := named[name])
    ]


def _listing(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# Paths


def _folder_files(folder: Path, section: DataSection) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join('*' + kind for kind in READERS)} file in this folder")
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
    return not hidden and file.name not in _NOT_DATA and suffix(file) in READERS


def _refuse_missing_path(path: Path, written: str) -> None:
    """Raises where a path that is not there can be no hub id (`namespace/name`) either."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", written) and suffix(path) not in READERS
    if is_hub_id and not (path.parent.name and path.parent.is_dir()):
        return
    there = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "give a hub id, a folder or a file as data.path"
    raise DataError(f"{written}: no such file or folder; {hint}")


# Hub


def _load_hub(name: str, subset: str | None) -> dict[str, Any]:
    """The splits of a hub dataset, downloaded or from the hub's cache."""
    import datasets

    local = "or download it elsewhere and point data.path at the folder"
    try:
        return dict(datasets.load_dataset(name, data_dir=subset))
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise MachineError(
                f"{name}: a gated dataset; ask for access on its page and log in (hf auth login), {local}"
            ) from error
        raise DataError(
            f"{name}: neither a file or folder here nor a dataset on the hub (a private one needs"
            " `hf auth login`); check data.path"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(
            f"{name}: no such file or folder here, and the hub cannot be reached"
            f" ({str(error).splitlines()[0]}); connect, {local}"
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: cannot be loaded from the hub ({str(error).splitlines()[0]})") from error


def _table_rows(table: Any, name: str) -> Iterator[Row]:
    line = 0
    for batch in table.with_format("arrow").iter(TABLE_ROWS):
        for line, fields in enumerate(batch.to_pylist(), line + 1):  # noqa: B020  goes on counting
            yield Row(fields, name, line)


def names_of(parts: Sequence[Part]) -> str:
    """The paths that parts are of, for a line of log."""
    return ", ".join(dict.fromkeys(part.path for part in parts))
