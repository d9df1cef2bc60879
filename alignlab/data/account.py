"""The account of one preparation: what was read, kept and left out, and the Arrow files that the pairs go to."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from alignlab.data.files import Row
from alignlab.data.pairing import Pair
from alignlab.data.rows import Part
from alignlab.data.splits import SPLITS

if TYPE_CHECKING:
    import datasets
    import pyarrow

REPLY_COLUMNS = {"prompt": "string", "chosen": "string", "prompt_ids": "ids", "chosen_ids": "ids"}
PAIR_COLUMNS = {
    "prompt": "string",
    "chosen": "string",
    "rejected": "string",
    "prompt_ids": "ids",
    "chosen_ids": "ids",
    "rejected_ids": "ids",
}
LABEL = {"label": "flag"}  # of a reply that stands alone
CONFIDENCE = {"confidence": "number"}  # a column beside them, where a source has it
ORIGIN = {"file": "count", "line": "count"}  # columns of every pair: the number of its file, and the line there
KEY_BYTES = 8  # of a dialogue
OF_THE_PAIRS = {split: f"dialogue also in the {split} split of the pairs" for split in SPLITS}  # a reason


class RowAccount:
    """Counts what becomes of each row, and takes the pairs that are kept; a context manager that closes its files."""

    def __init__(
        self,
        folder: Path,
        columns: Mapping[str, str],
        parts: Sequence[Part],
        apart_from: Mapping[str, frozenset[bytes]],
    ):
        """Dialogues of `apart_from` (of other data, by split) stand in no other split here."""
        self.folder, self.columns, self.parts, self.apart_from = folder, columns, parts, apart_from
        self.rows = self.pairs = 0
        self.kept, self.dropped, self.repaired = Counter(), Counter(), Counter()
        self.not_read = Counter()  # rows by the column, or key of a message, that holds what is not read
        self.by_part: defaultdict[str, Counter[Part]] = defaultdict(Counter)  # of rows, kept, dropped
        self.dialogues = {split: set() for split in SPLITS}
        self.first_dropped: dict[str, Row] = {}  # by reason
        self._of_prompt: Counter[bytes] = Counter()
        self._content = xxhash.xxh3_128()
        self._number = {part: number for number, part in enumerate(parts)}
        self._pending: dict[str, list[tuple[Pair, int, int]]] = {split: [] for split in SPLITS}
        self._files = ExitStack()

    def __enter__(self) -> RowAccount:
        self._dropped = self._files.enter_context((self.folder / "dropped.jsonl").open("w", encoding="utf-8"))
        self._tables = {
            split: self._files.enter_context(arrow_writer(self.folder / f"{split}.arrow", self.columns | ORIGIN))
            for split in SPLITS
        }
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def read(self, part: Part) -> None:
        self.rows += 1
        self.by_part["rows"][part] += 1

    def drop(self, part: Part, row: Row, reason: str) -> None:
        """Leaves out a pair, or a row that holds none."""
        self.pairs += 1
        self.dropped[reason] += 1
        self.by_part["dropped"][part] += 1
        self.first_dropped.setdefault(reason, row)
        entry = {"reason": reason, "file": row.file, "line": row.line, "row": row.fields}
        self._dropped.write(json.dumps(entry, default=str) + "\n")

    def keep(self, pair: Pair, part: Part, row: Row, most_of_a_prompt: int | None) -> None:
        """Takes a pair into its split, unless its dialogue stands in another one, or its prompt has enough."""
        if reason := self._refusal(pair, most_of_a_prompt):
            return self.drop(part, row, reason)
        self.pairs += 1
        self.kept[pair.split] += 1
        self.by_part["kept"][part] += 1
        self.dialogues[pair.split].add(pair.key)
        self.repaired.update(pair.repaired)
        self._pending[pair.split].append((pair, self._number[part], row.line))
        self._content.update(_bytes(pair))

    def _refusal(self, pair: Pair, most_of_a_prompt: int | None) -> str | None:
        for split in SPLITS:
            if split == pair.split:
                continue
            if pair.key in self.dialogues[split]:
                return f"dialogue also in the {split} split"
            if pair.key in self.apart_from.get(split, ()):
                return OF_THE_PAIRS[split]
        if most_of_a_prompt is not None:
            prompt = xxhash.xxh3_128_digest(pair.prompt.encode())
            if self._of_prompt[prompt] >= most_of_a_prompt:
                return f"its prompt has {most_of_a_prompt} pairs already"
            self._of_prompt[prompt] += 1
        return None

    def flush(self) -> None:
        """Writes the pairs taken so far to their Arrow files."""
        for split, pending in self._pending.items():
            if pending:
                rows = [{**pair.columns(), "file": file, "line": line} for pair, file, line in pending]
                wanted = self.columns | ORIGIN
                batch = record_batch({name: [row[name] for row in rows] for name in wanted}, wanted)
                self._tables[split].write_batch(batch)
                pending.clear()

    def account(self) -> dict[str, Any]:
        """What became of all rows, as plain JSON; "files" and "parts" follow the order of the parts."""
        assert not any(self.dialogues[a] & self.dialogues[b] for a, b in combinations(SPLITS, 2)), (
            "splits share dialogues"
        )
        assert self.pairs == self.kept.total() + self.dropped.total(), "a pair is neither kept nor dropped"
        (self.folder / "dialogues.bin").write_bytes(b"".join(b"".join(self.dialogues[split]) for split in SPLITS))
        return {
            "rows": self.rows,
            "kept": {split: self.kept[split] for split in SPLITS if self.dialogues[split]},
            "dropped": dict(self.dropped),
            "first_dropped": {reason: [row.file, row.line] for reason, row in self.first_dropped.items()},
            "repaired": dict(self.repaired),
            "files": [part.name for part in self.parts],
            "parts": [{what: of[part] for what, of in self.by_part.items()} for part in self.parts],
            "dialogues": {split: len(keys) for split, keys in self.dialogues.items()},
            "fingerprint": self._content.hexdigest(),
            "not_read": dict(self.not_read),
        }


def _bytes(pair: Pair) -> bytes:
    label = () if pair.label is None else (str(pair.label),)
    texts = [text.encode() for text in (pair.split, pair.prompt, *pair.replies, *label)]
    ids = [ids.tobytes() for ids in (pair.prompt_ids, *pair.reply_ids)]
    return b"".join([piece for one in (*texts, *ids) for piece in (len(one).to_bytes(8, "little"), one)])


def read_dialogues(folder: Path, counts: Mapping[str, int]) -> dict[str, frozenset[bytes]]:
    """The hashes of the dialogues in each split, as `RowAccount.account` has written them."""
    content, start, found = (folder / "dialogues.bin").read_bytes(), 0, {}
    for split in SPLITS:
        end = start + KEY_BYTES * counts[split]
        found[split] = frozenset(content[at : at + KEY_BYTES] for at in range(start, end, KEY_BYTES))
        start = end
    return found


# Arrow files


def make_folder() -> Path:
    """A folder for this process's Arrow files, under $ALIGNLAB_CACHE where that can be written; removed at exit."""
    parent = os.environ.get("ALIGNLAB_CACHE")
    try:
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".data.{os.getpid()}-", suffix=".tmp", dir=parent))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="alignlab-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def arrow_writer(path: Path, columns: Mapping[str, str]) -> pyarrow.RecordBatchStreamWriter:
    import pyarrow

    return pyarrow.RecordBatchStreamWriter(path, _schema(columns))


def _schema(columns: Mapping[str, str]) -> pyarrow.Schema:
    import pyarrow

    kinds = {
        "string": pyarrow.string(),
        "ids": pyarrow.list_(pyarrow.int32()),
        "number": pyarrow.float32(),
        "count": pyarrow.int32(),
        "flag": pyarrow.bool_(),
    }
    return pyarrow.schema({name: kinds[kind] for name, kind in columns.items()})


def record_batch(values: Mapping[str, Sequence[Any]], columns: Mapping[str, str]) -> pyarrow.RecordBatch:
    """Columns as lists (of strings, of int32 arrays, of numbers) → Arrow, without a pass over single ids."""
    import pyarrow

    schema = _schema(columns)
    arrays = [
        _list_array(values[name]) if kind == "ids" else pyarrow.array(values[name], schema.field(name).type)
        for name, kind in columns.items()
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)


def _list_array(ids: Sequence[np.ndarray]) -> pyarrow.ListArray:
    import pyarrow

    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flat = np.concatenate([*ids, np.empty(0, np.int32)]).astype(np.int32, copy=False)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))


def id_arrays(batch: pyarrow.RecordBatch | pyarrow.Table, name: str) -> list[np.ndarray]:
    """A column of token ids as one int32 array a row, views of the column's memory."""
    column = batch.column(name)
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    found = []
    for chunk in chunks:
        offsets, flat = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        found += [flat[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return found


def open_arrow(path: Path) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_file(str(path))
