"""What was computed once is not computed again: results by content in a file of JSON lines; imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignlab.errors import MachineError

Item = TypeVar("Item")


class Kept:
    """Results by key, each in the file as soon as it is there; a line that a crash has cut off is computed again."""

    def __init__(self, path: Path):
        self.path, self.values = path, {}
        self._ends_whole = True
        if path.is_file():
            content = path.read_bytes()
            self._ends_whole = not content or content.endswith(b"\n")
            for line in content.splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    self.values[row["key"]] = row["value"]

    def add(self, key: str, value: Any) -> None:
        row = json.dumps({"key": key, "value": value}, ensure_ascii=False).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write((b"" if self._ends_whole else b"\n") + row + b"\n")
        except PermissionError as e:
            raise MachineError(f"{self.path} cannot be written ({e.strerror}); evaluate a copy of the run") from None
        self._ends_whole = True
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
        from tqdm.auto import tqdm

        missing = [key for key in wanted if key not in self.values]
        with tqdm(total=len(missing), desc=about, leave=False, disable=None if missing else True) as bar:
            for start in range(0, len(missing), at_once):
                few = missing[start : start + at_once]
                for key, value in zip(few, compute([wanted[key] for key in few]), strict=True):
                    self.add(key, value)
                bar.update(len(few))
        return [self.values[key] for key in wanted]
