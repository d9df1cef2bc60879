"""JSON of any hand and version → a dataclass, or one line that names the file and the field."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from alignlab.disk import read_record
from alignlab.errors import RunError

T = TypeVar("T")
SHOWN_CHARACTERS = 60  # of a value that is not what was expected


def read(kind: type[T], content: bytes | str, where: object, remedy: str) -> T:
    """The JSON in `content` as this kind of dataclass; nothing is cast, and keys that it does not know are ignored.

    RunError says what was expected, such as `manifest.json: steps is 'abc', expected a valid integer; REMEDY`.
    """
    try:
        return _adapter(kind).validate_json(content, strict=True)  # type: ignore[arg-type]  # a class can be hashed
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise RunError(f"{where}{_describe(fault)}; {remedy}") from None


def read_file(kind: type[T], file: Path, remedy: str) -> T:
    """The same of a file; RunError also where it cannot be read, or was changed since it was written."""
    try:
        record = read_record(file)
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise RunError(f"{file} is {error}; {remedy}") from None
    return read(kind, json.dumps(record), file, remedy)


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _describe(fault: Any) -> str:
    if fault["type"] == "json_invalid":
        return f" is not JSON ({fault['ctx']['error']})"
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f": {place} is missing"
    if fault["type"] == "value_error":
        return f": {place}: {fault['ctx']['error']}"
    value = repr(fault["input"])
    shown = value if len(value) <= SHOWN_CHARACTERS else f"{value[: SHOWN_CHARACTERS - 1]}…"
    expected = fault["msg"].removeprefix("Input should be ")
    return f"{': ' * bool(place)}{place} is {shown}, expected {expected}"
