"""Where a recipe's raw rows come from: the hub, folders and files, each a part with the split that it stands for.

A folder or hub dataset may bring its own splits, by the names below `data.path` (`alignlab.data.splits`). A single file
brings none, but its rows may, in a field `split`.
"""

from __future__ import annotations

import ast
import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from alignlab.data.files import READERS, TABLE_ROWS, Row, read_file, suffix
from alignlab.data.hub import stay_offline_without_hub
from alignlab.data.layouts import LAYOUTS, NAMES, Fields, Layout, Reader, find_reader, is_red_team, plain_name
from alignlab.data.splits import HELD_OUT, SPLITS, absent_split, splits_named
from alignlab.disk import hash_file
from alignlab.errors import DataError, MachineError, RecipeError
from alignlab.recipe.fields import suggest
from alignlab.recipe.load import DataSection, Recipe
from alignlab.recipe.written import shown

log = logging.getLogger(__name__)

# what `datasets` writes beside the rows
_NOT_DATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_READ_BYTES = 2**22
SAMPLE_ROWS = 200  # of a part, by which it is told what its rows are


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that share a split; `split` is none where the rows are still to be carved."""

    path: str  # as the recipe has it
    name: str  # of the file or table, as dropped rows name it
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]  # of the content
    split: str | None = None
    is_named: bool = False  # whether its name says which split it is
    brought: frozenset[str] = frozenset()  # the held-out splits that its path brings
    row_splits: Mapping[str, str | None] = field(
        default_factory=dict
    )  # what each value of the field `split` stands for, where that decides
    reader: Reader | None = None  # how its rows are read; none where it has no rows

    @property
    def source(self) -> str | None:
        return self.reader and self.reader.source

    def split_of(self, row: Row) -> str | None:
        """The split that the part or the row brings; none where its dialogue's share decides."""
        said = row.fields.get("split")
        split = self.split or (self.row_splits.get(said) if isinstance(said, str) else None)
        return None if split == "train" and not self.names_all_splits else split

    @property
    def names_all_splits(self) -> bool:
        """Whether each row says on purpose where it belongs."""
        return {*SPLITS} <= {*self.row_splits.values()}


def find_parts(section: DataSection, key: str = "data") -> list[Part]:
    """Where a recipe's rows come from: test rows first, then validation, then the rest; `key` is also `data.sft`."""
    if section.source == "toy":
        rows, splits = lambda: _toy_rows(section), {split: split for split in SPLITS}
        toy = Reader("toy", LAYOUTS["hh-rlhf"], {"chosen": "chosen", "rejected": "rejected"})
        return [Part("toy", "toy", rows, lambda: "toy", brought=frozenset(HELD_OUT), row_splits=splits, reader=toy)]
    if not section.path:
        raise RecipeError("data.path is not set: it needs a hub id, a folder or a file")
    if "[" in section.split:
        what = f"data.split is {section.split!r}, and shares of a split are not read"
        raise RecipeError(f"{what}; set data.max_pairs to a number of rows, or cut the file")
    paths = [section.path] if isinstance(section.path, str) else section.path
    parts = [part for path in paths for part in _parts_of(path, section, key)]
    parts = _with_row_splits(_with_listed_splits(parts, section, key), section, key)
    order = [*HELD_OUT, None]
    return sorted(parts, key=lambda part: order.index(part.split))


def _parts_of(written: str, section: DataSection, key: str) -> list[Part]:
    path = Path(written).expanduser()
    if path.exists() and section.config:
        raise DataError(
            f"{written}: {key}.config is of a hub dataset, and this is here; {key}.subset names a folder in it"
        )
    if path.is_dir():
        files = _folder_files(path, section)
        named = {file.relative_to(path).as_posix(): _file_part(written, file) for file in files}
        if section.subset and [file.parent for file in files] == [path]:  # it names this one file
            return [*named.values()]
        return _parts(written, named, section, key)
    if path.exists():
        if section.subset:
            log.warning("data.subset=%s is not used: data.path names one file", section.subset)
        return [_file_part(written, path)]
    _refuse_missing_path(written, key)
    tables = _load_hub(written, section, key)
    return _parts(written, {name: _table_part(written, table) for name, table in tables.items()}, section, key)


def _file_part(written: str, file: Path) -> Part:
    return Part(written, str(file), lambda: read_file(file), lambda: hash_content(file))


def _table_part(written: str, table: Any) -> Part:
    files = [Path(file["filename"]) for file in table.cache_files]
    digest = lambda: "".join(map(hash_content, files)) or table._fingerprint
    name = f"{written}/{table.split}"
    return Part(written, name, lambda: _table_rows(table, name), digest)


def _toy_rows(section: DataSection) -> Iterator[Row]:
    from alignlab.data import toy

    for line, fields in enumerate(toy.rows(section.toy), 1):
        yield Row(fields, "toy", line)


def hash_content(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


# Which split


def _parts(written: str, named: dict[str, Part], section: DataSection, key: str) -> list[Part]:
    return _chosen(written, named, splits_named(named, section, key), section, key)


def _chosen(
    written: str, named: Mapping[str, Part], splits: Mapping[str, str | None], section: DataSection, key: str
) -> list[Part]:
    """The parts of the splits that a recipe asks for."""
    if any(splits.values()):
        _refuse_absent_split(written, splits, section, key)
    wanted = "train" if "train" in splits.values() else None  # without a train split, what has no name is carved
    chosen = {name: split for name, split in splits.items() if split in (*HELD_OUT, wanted)}
    if left_out := splits.keys() - chosen.keys():
        log.info("%s: not read, being of another split: %s", written, listing(left_out))
    brought = frozenset(chosen.values()) & {*HELD_OUT}
    return [
        replace(named[name], split=split if split in HELD_OUT else None, is_named=bool(split), brought=brought)
        for name, split in chosen.items()
    ]


def _refuse_absent_split(where: str, found: Mapping[str, str | None], section: DataSection, key: str) -> None:
    """Raises where a recipe names a split that none of these names stands for."""
    absent = absent_split(found, section)
    if absent is None:
        return
    setting = f"{key}.{absent}"
    if not found:
        raise DataError(
            f"{where}: {setting} names a split, and this is one file whose rows have no field split; leave it out"
        )
    name = section.split if absent == "split" else section.test_split
    remedy = {
        "data.split": " (and data.test_split=null where that is the test split)",
        "data.test_split": ", or to null: then a share of the dialogues is kept for the test",
    }.get(setting, "")
    raise DataError(f"{where}: no split {name!r} among {listing(found)}; set {setting} to one of them{remedy}")


def _with_listed_splits(parts: list[Part], section: DataSection, key: str) -> list[Part]:
    """Single files of a list of paths are splits where their names tell training from held-out ones."""
    files = {part.path: part for part in parts if part.path == part.name}
    of_name = splits_named({Path(path).name for path in files}, section, key)
    splits = {path: of_name[Path(path).name] for path in files}
    if "train" not in splits.values() or not {*splits.values()} & {*HELD_OUT}:
        return parts
    others = [part for part in parts if part.path not in files]
    return others + _chosen(", ".join(files), files, splits, section, key)


def _with_row_splits(parts: list[Part], section: DataSection, key: str) -> list[Part]:
    """The parts with the splits that their rows name in a field `split`; where that decides, it is said."""
    unnamed = [part for part in parts if not part.is_named and not part.row_splits]
    counts = {part: _count_row_splits(part, section) for part in unnamed}
    found = {part: splits_named(names, section, key) for part, names in counts.items()}
    everything = {name: split for splits in found.values() for name, split in splits.items()}
    if unnamed and (everything or absent_split({}, section)):
        without = {part.name: None for part in unnamed if not found[part]} if everything else {}
        _refuse_absent_split(names_of(unnamed), everything | without, section, key)
    return [_with_splits(part, everything, counts[part]) if found.get(part) else part for part in parts]


def _count_row_splits(part: Part, section: DataSection) -> Counter[str]:
    """How many rows have each text in a field `split`; all are read where the first ones have it, or a recipe asks."""
    first = islice(part.rows(), SAMPLE_ROWS)
    if not absent_split({}, section) and not any("split" in row.fields for row in first):
        return Counter()
    values = (row.fields.get("split") for row in part.rows())
    return Counter(value for value in values if isinstance(value, str) and value)


def _with_splits(part: Part, found: Mapping[str, str | None], counts: Mapping[str, int]) -> Part:
    if not {*found.values()} - {"train", None}:
        return part
    sums: Counter[str] = Counter()
    for name, count in counts.items():
        sums[found[name] or "none"] += count
    told = ", ".join(f"{split} {count:,}" for split, count in sums.items())
    log.info("%s: the field split says what its rows are for: %s", part.name, told)
    return replace(part, row_splits=found, brought=part.brought | {*found.values()} & {*HELD_OUT})


def listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# What their rows are


def with_readers(parts: Sequence[Part], section: DataSection, key: str = "data", *, labels: bool = False) -> list[Part]:
    """The parts with how their rows are read: as `source` says, or as the columns of the first ones do.

    HH-RLHF's red-team file is left out beside others, and refused alone. Rows with labels are refused unless `labels`.
    """
    found, red_team = [], []
    for part in parts:
        first = [row.fields for row in islice(part.rows(), SAMPLE_ROWS)] if part.reader is None else []
        if first and all(map(is_red_team, first)):
            red_team.append(part)
        elif first:
            found.append(replace(part, reader=_reader(part, first, section, key, labels)))
        else:
            found.append(part)
    if red_team and not any(part.reader for part in found):
        raise DataError(
            f"{red_team[0].name}: HH-RLHF's red-team transcripts hold no pairs; set data.subset to harmless-base,"
            " helpful-base, helpful-online or helpful-rejection-sampled"
        )
    if len({part.reader.layout.kind == "labels" for part in found if part.reader}) > 1:
        raise DataError(f"{names_of(found)}: some hold pairs and some single replies with a label; keep one kind")
    for part in red_team:
        log.info("%s: not read: red-team transcripts hold no pairs", part.name)
    if section.source is None:
        for path, reader in {part.path: part.reader for part in found if part.reader}.items():
            log.info("%s: %s.source=%s, by its columns%s", path, key, reader.source, _renamed(reader))
    return found


def _renamed(reader: Reader) -> str:
    """What a column of another name was taken for, and what numbers in one mean."""
    others = [f"{column} as {name}" for name, column in reader.columns.items() if plain_name(column) != name]
    first, second = (reader.columns.get(name, name) for name in ("first", "second"))
    if "index" in reader.columns:
        others.append(f"where 0 prefers {first}, 1 {second}, and 2 is a tie")
    if "number" in reader.columns:
        others.append(f"where 1 prefers {first}, 2 {second}, and 0 is a tie")
    return f" ({', '.join(others)})" if others else ""


def _reader(part: Part, first: Sequence[Fields], section: DataSection, key: str, labels: bool) -> Reader:
    there = dict.fromkeys(column for row in first for column in row)
    for name, column in section.columns.items():
        if name not in NAMES:
            known = f"which is none of {', '.join(NAMES)}{suggest(name, NAMES)}"
            raise DataError(f"{key}.columns names a column {name!r}, {known}")
        if column not in there:
            what = f"{key}.columns gives {name} to {column!r}, which is no column of {', '.join(there)}"
            raise DataError(f"{part.name}: {what}{suggest(column, there)}")
    reader = find_reader(first, section.source, section.columns)
    if reader is None:
        raise DataError(
            f"{part.name}: rows of the columns {', '.join(there) or '(none)'} are of no layout that is known; say what"
            f" they hold as {key}.columns: {{prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}}, or set {key}.source to"
            f" one of {', '.join(LAYOUTS)}"
        )
    if problem := _unfit(reader.layout, key, labels):
        raise DataError(f"{part.name}: {problem}")
    return reader


def _unfit(layout: Layout, key: str, labels: bool) -> str | None:
    """Why a stage cannot learn from a layout."""
    if layout.kind == "labels" and not (labels and key == "data"):
        return (
            "unpaired labels (a prompt, one reply, and whether it is good) are what KTO learns from (alignlab kto); DPO"
            " and ORPO need two replies to a prompt, and data.sft good ones without a label"
        )
    if layout.kind == "replies" and key == "data":
        return (
            f"{layout.holds} are replies to learn and no pairs; write data.sft: {{path: …}}, and the pairs as data.path"
        )
    return None


# Paths


def _folder_files(folder: Path, section: DataSection) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if _is_data(file, folder) and file.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join('*' + kind for kind in READERS)} file in this folder")
    if not section.subset or folder.name == section.subset:
        return files
    inside = [file for file in files if _in_subset(file.relative_to(folder), section.subset)]
    if not inside:
        there = {file.relative_to(folder).parts[0] for file in files}
        raise DataError(
            f"{folder}: no folder {section.subset!r} inside (there are {listing(there)});"
            " set data.subset to one of them, or to null to read them all"
        )
    return inside


def _in_subset(file: Path, subset: str) -> bool:
    """Holds for `helpful-base/train.jsonl.gz` and for `helpful-base.test.jsonl.gz`."""
    return file.parts[: len(Path(subset).parts)] == Path(subset).parts or str(file).startswith(f"{subset}.")


def _is_data(file: Path, folder: Path) -> bool:
    below = file.relative_to(folder)
    if any(part.startswith(".") for part in below.parts) or file.name in _NOT_DATA or suffix(file) not in READERS:
        return False
    return _is_saved(file) if (file.parent / "state.json").is_file() else True


def _is_saved(file: Path) -> bool:
    """Whether a file beside a `state.json` is one that `Dataset.save_to_disk` wrote, and not a cache of `datasets`."""
    try:
        state = json.loads((file.parent / "state.json").read_bytes())
        return file.name in {saved["filename"] for saved in state["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return True


def refuse_missing_paths(recipe: Recipe) -> None:
    """Raises, before anything is loaded, where a path of the recipe is neither here nor can be a dataset of the hub."""
    for key, section in (("data", recipe.data), ("data.sft", recipe.data.sft)):
        paths = [section.path] if isinstance(section.path, str) else section.path or []
        where = recipe.sources.get(f"{key}.path", "")
        beside = [] if where.startswith("command line") else [recipe.path.parent]
        for written in paths:
            if not Path(written).expanduser().exists():
                _refuse_missing_path(written, key, beside, f" ({where})" * bool(where))


def _refuse_missing_path(written: str, key: str, beside: Sequence[Path] = (), where: str = "") -> None:
    """Raises where a path that is not there can be no hub id (`namespace/name`) either."""
    path = Path(written).expanduser()
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", written) and suffix(path) not in READERS
    if is_hub_id and not (path.parent.name and path.parent.is_dir()):
        return
    folders = list(dict.fromkeys((folder / path.parent).absolute() for folder in (*beside, Path())))
    there = [sibling for folder in folders if folder.is_dir() for sibling in folder.iterdir()]
    near = difflib.get_close_matches(path.name, [sibling.name for sibling in there], n=1)
    found = next((shown(sibling) for sibling in there if [sibling.name] == near), None)
    hint = f"did you mean {found}?" if found else f"give a hub id, a folder or a file as {key}.path"
    looked = " and ".join("the working folder" if folder == Path.cwd() else shown(folder) for folder in folders)
    raise DataError(f"{key}.path is {written!r}{where}: no such file or folder in {looked}; {hint}")


# Hub


def _load_hub(name: str, section: DataSection, key: str) -> dict[str, Any]:
    """The splits of a hub dataset, downloaded or from the hub's cache."""
    import datasets

    stay_offline_without_hub()
    local = f"or download it elsewhere and point {key}.path at the folder"
    try:
        return dict(datasets.load_dataset(name, section.config, data_dir=section.subset))
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise MachineError(
                f"{name}: a gated dataset; ask for access on its page and log in (hf auth login), {local}"
            ) from error
        raise DataError(
            f"{name}: neither a file or folder here nor a dataset on the hub (a private one needs"
            f" `hf auth login`); check {key}.path"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(
            f"{name}: no such file or folder here, and the hub cannot be reached"
            f" ({str(error).splitlines()[0]}); connect, {local}"
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        if configs := configs_named(str(error)):
            near = suggest(section.config, configs) if section.config else ""
            raise DataError(f"{name}: set {key}.config to one of {', '.join(configs)}{near}") from error
        raise DataError(f"{name}: cannot be loaded from the hub ({str(error).splitlines()[0]})") from error


def configs_named(message: str) -> list[str]:
    """The configs that `datasets` lists where one is missing or unknown."""
    listed = re.search(r"(?:available configs|Available): (\[.*?\])", message, re.DOTALL)
    return ast.literal_eval(listed[1]) if listed else []


def _table_rows(table: Any, name: str) -> Iterator[Row]:
    line = 0
    for batch in table.with_format("arrow").iter(TABLE_ROWS):
        for line, fields in enumerate(batch.to_pylist(), line + 1):  # noqa: B020  goes on counting
            yield Row(fields, name, line)


def names_of(parts: Sequence[Part]) -> str:
    """The paths that parts are of, for a line of log."""
    return ", ".join(dict.fromkeys(part.path for part in parts))
