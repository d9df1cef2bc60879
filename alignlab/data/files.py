"""One file → its raw rows, each with its line: JSON lines, JSON, CSV, parquet and Arrow, text also gzipped.

A file that cannot be read to its end raises a `DataError` that names the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignlab.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TABLE_ROWS = 1000  # of parquet and Arrow, read at a time
DELIMITERS = ",;\t|"
WRAPPERS = {"data", "rows", "examples", "instances", "records", "items", "pairs", "dataset"}  # around a list of rows
_DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


class Row(NamedTuple):
    """One raw row; `line` is the line of a text file, or the row's number in a table, both from 1."""

    fields: dict[str, Any]
    file: str
    line: int


def suffix(file: Path) -> str:
    """The kind of a file, as `READERS` has it.

    >>> suffix(Path("my rows.JSONL.gz"))
    '.jsonl.gz'
    """
    kinds = [kind.lower() for kind in file.suffixes[-2:]]
    return "".join(kinds if kinds[-1:] == [".gz"] else kinds[-1:])


def read_file(file: Path) -> Iterator[Row]:
    """The rows of one file, read as they are asked for."""
    reader = READERS.get(suffix(file))
    if reader is None:
        raise DataError(f"{file}: not a kind of file that is read here ({', '.join(READERS)})")
    name = str(file)
    for line, fields in reader(file):
        if not isinstance(fields, dict):
            raise DataError(f"{name}:{line}: a row must be a JSON object, not {json.dumps(fields)[:40]}")
        yield Row(fields, name, line)


def _open(file: Path) -> Any:
    """The bytes of a text file, unpacked; refused where they are UTF-16."""
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
            new = f"iconv -f UTF-16 -t UTF-8 {file.name} > new{file.suffix}"
            raise DataError(f"{file}: UTF-16 text; save it as UTF-8 ({new})")
        return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _damaged_gzip(file: Path, line: int, error: Exception) -> DataError:
    return DataError(f"{file}:{line}: the gzip stream is damaged or cut short ({error}); fetch it again")


# JSON


def _read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except _DAMAGED_GZIP as error:
        raise _damaged_gzip(file, number + 1, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{number}: not JSON ({error}); mend or remove this line") from error


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """A file of one JSON value, which is held in memory, or of JSON lines under this name."""
    try:
        with _open(file) as stream:
            first, second = (next(filter(bytes.strip, stream), b"").strip() for _ in range(2))
        if first.endswith(b"}") and second.startswith(b"{"):
            yield from _read_lines(file)
            return
        with _open(file) as stream:
            text = stream.read().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            yield from _array_rows(text, 0)
        elif text.strip():
            yield from _wrapped_rows(json.loads(text), text)
    except _DAMAGED_GZIP as error:
        raise _damaged_gzip(file, 1, error) from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{file}:{line}: not JSON ({error}); mend the file") from error


def _array_rows(text: str, position: int) -> Iterator[tuple[int, Any]]:
    """The items of the array that begins at a position, each with its line."""
    line = 1 + text.count("\n", 0, position)
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[]*")
    while True:
        found = gap.match(text, position)
        assert found is not None, "it matches nothing as well"
        start = found.end()
        line += text.count("\n", position, start)
        if text.startswith("]", start):
            return
        row, position = decode(text, start)
        yield line, row
        line += text.count("\n", start, position)


def _wrapped_rows(value: Any, text: str) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON object: those of the list that it wraps, of its columns, or itself as the only one."""
    if not isinstance(value, dict):
        return iter([(1, value)])
    lists = {key: rows for key, rows in value.items() if _are_rows(rows)}
    wraps = [key for key in lists if key.lower() in WRAPPERS or len(value) == 1]
    if len(wraps) == 1:
        begins = re.search(re.escape(json.dumps(wraps[0], ensure_ascii=False)) + r"\s*:\s*\[", text)
        return _array_rows(text, begins.end() - 1) if begins else enumerate(lists[wraps[0]], 1)
    if len(lists) == len(value) > 0:  # {"train": [...], "test": [...]}
        return enumerate(({"split": key, **row} for key, rows in lists.items() for row in rows), 1)
    columns = [_column(values) for values in value.values()]
    if all(columns) and len({*map(len, columns)}) == 1:
        return enumerate((dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)), 1)
    return iter([(1, value)])


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    are_objects = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return are_objects and not any(row.keys() & {"role", "from"} for row in value)


def _column(values: Any) -> list[Any]:
    """The values of a column as pandas writes one: a list, or an object of numbered values; empty where it is none."""
    if isinstance(values, Mapping) and all(key.isdecimal() for key in values):
        return list(values.values())
    is_list = isinstance(values, list) and not any(isinstance(item, dict) for item in values)
    return values if is_list else []


# CSV


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV file with a header, all of them text; an empty cell is no field."""
    csv.field_size_limit(sys.maxsize)
    line = 0
    try:
        with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as text:
            delimiter = _delimiter(text.readline())
            text.seek(0)
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            begins = 2
            for cells in reader:
                line = reader.line_num
                if None in cells or None in cells.values():
                    raise DataError(
                        f"{file}:{begins}: {_cells(cells)} cells under {len(reader.fieldnames or ())} column names;"
                        " mend this row"
                    )
                yield begins, {name: cell for name, cell in cells.items() if cell}
                begins = line + 1
    except _DAMAGED_GZIP as error:
        raise _damaged_gzip(file, line + 1, error) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}:{line + 1}: not CSV in UTF-8 ({error}); mend this row") from error


def _delimiter(header: str) -> str:
    """The delimiter that finds the most names in a header."""
    return max(DELIMITERS, key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter), ())))


def _cells(cells: dict) -> int:
    return sum(cell is not None for name, cell in cells.items() if name is not None) + len(cells.get(None, ()))


# Tables


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    yield from _read_table(file, "parquet", lambda: pyarrow.parquet.ParquetFile(file).iter_batches(TABLE_ROWS))


def _read_arrow(file: Path) -> Iterator[tuple[int, Any]]:
    """Arrow's file format, and its stream format, which `datasets` writes."""

    def batches() -> Iterator[pyarrow.RecordBatch]:
        import pyarrow

        with pyarrow.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(source)

    yield from _read_table(file, "Arrow", batches)


def _read_table(file: Path, kind: str, batches: Any) -> Iterator[tuple[int, Any]]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for start in range(0, len(batch), TABLE_ROWS):
                for number, fields in enumerate(batch.slice(start, TABLE_ROWS).to_pylist(), number + 1):  # noqa: B020
                    yield number, fields
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a whole {kind} file ({str(error).splitlines()[0]}); fetch it again") from error


READERS = {
    ".jsonl": _read_lines,
    ".jsonl.gz": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
