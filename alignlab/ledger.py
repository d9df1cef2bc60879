"""The account of one preparation: what was read, kept and left out, and the Arrow files that the pairs go to."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from alignlab.rows import Row
from alignlab.sources import Example

if TYPE_CHECKING:
    import datasets
    import pyarrow

SPLITS = ("train", "validation", "test")
PAIR_COLUMNS = {
    "prompt": "string",
    "chosen": "string",
    "rejected": "string",
    "prompt_ids": "ids",
    "chosen_ids": "ids",
    "rejected_ids": "ids",
}


@dataclass(frozen=True, slots=True)
class Draft:
    """One row on its way to a pair."""

    row: Row
    split: str | None  # what the row brings; then what it is in
    names_split: bool = False  # by a field of its own
    example: Example | None = None
    key: bytes = b""  # of the dialogue
    prompt: str = ""
    prompt_ids: Sequence[int] = ()
    chosen: str = ""
    chosen_ids: Sequence[int] = ()
    rejected: str = ""
    rejected_ids: Sequence[int] = ()
    repaired: tuple[str, ...] = ()


class Ledger:
    """Counts what becomes of each row, and takes the pairs that are kept; a context manager that closes its files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = 0
        self.kept, self.dropped, self.repaired = Counter(), Counter(), Counter()
        self.dialogues = {split: set() for split in SPLITS}
        self.first_dropped = ""
        self._content = xxhash.xxh3_128()
        self._pending = {split: [] for split in SPLITS}
        self._files = ExitStack()

    def __enter__(self) -> Ledger:
        self._dropped = self._files.enter_context((self.folder / "dropped.jsonl").open("w", encoding="utf-8"))
        self._tables = {
            split: self._files.enter_context(arrow_writer(self.folder / f"{split}.arrow", PAIR_COLUMNS))
            for split in SPLITS
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def drop(self, row: Row, reason: str) -> None:
        self.dropped[reason] += 1
        self.first_dropped = self.first_dropped or f"{row.file}:{row.line} has {', '.join(row.fields) or 'no field'}"
        entry = {"reason": reason, "file": row.file, "line": row.line, "row": row.fields}
        self._dropped.write(json.dumps(entry, default=str) + "\n")

    def keep(self, draft: Draft) -> None:
        """Takes a finished pair into its split, unless its dialogue stands in another one already."""
        home = next((split for split in SPLITS if draft.key in self.dialogues[split]), draft.split)
        if home != draft.split:
            return self.drop(draft.row, f"dialogue also in the {home} split")
        self.dialogues[home].add(draft.key)
        self.kept[home] += 1
        self.repaired.update(draft.repaired)
        self._pending[home].append({name: getattr(draft, name) for name in PAIR_COLUMNS})
        self._content.update(_bytes(draft))

    def flush(self) -> None:
        """Writes the pairs taken so far to their Arrow files."""
        for split, pairs in self._pending.items():
            if pairs:
                self._tables[split].write_batch(record_batch(pairs, PAIR_COLUMNS))
                pairs.clear()

    def fingerprint(self) -> str:
        return self._content.hexdigest()


def _bytes(draft: Draft) -> bytes:
    texts = (draft.split, draft.prompt, draft.chosen, draft.rejected)
    ids = (draft.prompt_ids, draft.chosen_ids, draft.rejected_ids)
    parts = [text.encode() for text in texts] + [array("i", one).tobytes() for one in ids]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


# Arrow files


def make_folder() -> Path:
    """A folder for this process's Arrow files, under $ALIGNLAB_CACHE where that is set; removed at exit."""
    parent = os.environ.get("ALIGNLAB_CACHE")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="alignlab-data-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _schema(columns: Mapping[str, str]) -> pyarrow.Schema:
    import pyarrow

    kinds = {"string": pyarrow.string(), "ids": pyarrow.list_(pyarrow.int32())}
    return pyarrow.schema({name: kinds[kind] for name, kind in columns.items()})


def arrow_writer(path: Path, columns: Mapping[str, str]) -> pyarrow.RecordBatchStreamWriter:
    import pyarrow

    return pyarrow.RecordBatchStreamWriter(path, _schema(columns))


def record_batch(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pyarrow.RecordBatch:
    import pyarrow

    return pyarrow.RecordBatch.from_pydict(
        {name: [row[name] for row in rows] for name in columns}, schema=_schema(columns)
    )


def open_arrow(path: Path) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_file(str(path))
