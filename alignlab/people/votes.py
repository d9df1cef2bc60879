"""Votes as files that people exchange: JSON lines, each a choice between two models' replies to one prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignlab.disk import write_lines
from alignlab.errors import DataError

TIE, BOTH_BAD = "tie", "both_bad"
NEEDED = ("prompt", "models", "winner")


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One choice of one voter; what a tool does not know of it is none or empty."""

    prompt: str  # a transcript up to its last `Assistant:`, or the user's words alone
    models: tuple[str, str]
    winner: str  # a model's name, tie or both_bad
    left: str | None = None  # whose reply stood on the left, or above
    voter: str | None = None
    at: str | None = None  # 2026-01-31T12:00:00Z
    helpfulness: Mapping[str, int] | None = None  # of each model's reply, 1 to 5
    harmlessness: Mapping[str, int] | None = None
    replies: Mapping[str, str] = field(default_factory=dict)  # of each model

    @property
    def outcome(self) -> float:
        """1 where the first model won, 0 where the second did, ½ for a tie; two bad replies are a tie."""
        return {self.models[0]: 1.0, self.models[1]: 0.0}.get(self.winner, 0.5)


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file; DataError names the line, and the field that is missing or wrong."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read as votes ({getattr(e, 'strerror', None) or 'not UTF-8'})") from None
    return [_read_vote(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def write_votes(path: Path, votes: Iterable[Vote]) -> None:
    write_lines(path, map(dataclasses.asdict, votes))


def _read_vote(place: str, line: str) -> Vote:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not JSON; a vote is one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object; a vote is one a line")
    for name in NEEDED:
        if row.get(name) is None:
            raise DataError(f"{place}: {name} is missing; a vote has {', '.join(NEEDED)}")
    models = _two_models(place, row["models"])
    own = (*models, TIE, BOTH_BAD)
    if row["winner"] not in own:
        raise DataError(f"{place}: winner is {row['winner']!r}, and not one of {', '.join(own)}")
    if row.get("left") not in (None, *models):
        raise DataError(f"{place}: left is {row['left']!r}, and not one of {', '.join(models)}")
    return Vote(
        prompt=_text(place, row, "prompt"),
        models=models,
        winner=row["winner"],
        left=row.get("left"),
        voter=_text(place, row, "voter"),
        at=_text(place, row, "at"),
        helpfulness=_scores(place, row, "helpfulness", models),
        harmlessness=_scores(place, row, "harmlessness", models),
        replies=_replies(place, row.get("replies"), models),
    )


def _two_models(place: str, named: Any) -> tuple[str, str]:
    is_list = isinstance(named, list) and len(named) == 2 and all(isinstance(name, str) for name in named)
    if is_list and named[0] != named[1]:
        return named[0], named[1]
    raise DataError(f"{place}: models is {named!r}, and not a list of two different names")


def _text(place: str, row: Mapping[str, Any], name: str) -> Any:
    if not isinstance(row.get(name), str | None):
        raise DataError(f"{place}: {name} is {row[name]!r}, and not text")
    return row.get(name)


def _scores(place: str, row: Mapping[str, Any], name: str, models: tuple[str, str]) -> Mapping[str, int] | None:
    """The scores of each model; of a model that has none they may be missing."""
    given = row.get(name)
    if given is None:
        return None
    if not isinstance(given, dict) or not given.keys() <= {*models}:
        raise DataError(f"{place}: {name} is {given!r}, and not a score from 1 to 5 for {' and '.join(models)}")
    for score in given.values():
        if type(score) is not int or not 1 <= score <= 5:
            raise DataError(f"{place}: {name} is {score!r}, and not a whole number from 1 to 5")
    return given


def _replies(place: str, given: Any, models: tuple[str, str]) -> Mapping[str, str]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(given.get(name), str) for name in models):
        raise DataError(f"{place}: replies does not hold the text of {' and '.join(models)}")
    return {name: given[name] for name in models}
