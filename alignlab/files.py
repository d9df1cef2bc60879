"""One file → its raw rows, each with its line: JSON lines, plain or gzipped, JSON, CSV, parquet and Arrow.

A file that cannot be read to its end raises a `DataError` that names the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alignlab.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TABLE_ROWS = 1000  # of parquet and Arrow, read at a time
NUMBERS = {"labels", "choice", "score_A", "score_B", "score_chosen", "score_rejected"}  # CSV writes all as text


class Row(NamedTuple):
    """One raw row; `line` is the line of a text file, or the row's number in a table, both from 1."""

    fields: dict[str, Any]
    file: str
    line: int


def suffix(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


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


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV file with a header; an empty cell is no field, and all but `NUMBERS` is text."""
    csv.field_size_limit(sys.maxsize)
    line = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            begins = 2
            for cells in reader:
                line = reader.line_num
                if None in cells or None in cells.values():
                    raise DataError(
                        f"{file}:{begins}: {_cells(cells)} cells under {len(reader.fieldnames)} column names;"
                        " mend this row"
                    )
                yield begins, {name: _number(name, cell) for name, cell in cells.items() if cell}
                begins = line + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}:{line + 1}: not CSV ({error}); mend this row") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _cells(cells: dict) -> int:
    return sum(cell is not None for name, cell in cells.items() if name is not None) + len(cells.get(None, ()))


def _number(name: str, cell: str) -> Any:
    if name not in NUMBERS:
        return cell
    try:
        return int(cell) if re.fullmatch(r"[-+]?\d+", cell) else float(cell)
    except ValueError:
        return cell


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
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
