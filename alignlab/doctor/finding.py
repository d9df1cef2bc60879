"""One sign that something is wrong with preference data: how many rows show it, three of them, and what to set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from alignlab.errors import lacks

Level = Literal["wrong", "doubtful", "note"]  # must be mended; look at it; good to know

LEVELS: tuple[Level, ...] = ("wrong", "doubtful", "note")
NAMES = (  # of all that is looked for, as `--fail-on` takes them; that of a prompt file goes on with its name
    *("dropped-rows", "shortened-prompts", "cut-replies", "not-read", "different-prompts", "prompt-in-reply"),
    *("few-pairs", "unbalanced-sources"),
    *("repeated-pairs", "like-replies", "both-orders", "contradictions", "chosen-and-rejected"),
    *("overlap", "dialogue-overlap", "near-duplicates", "near-overlap", "prompt-overlap"),
    *("role-words", "role-words-rejected", "role-words-prompts", "mojibake", "control-characters"),
    *("empty-replies", "messages-in-replies", "one-word-replies", "cut-off-replies"),
    *("refusal-only-replies", "refusals-preferred", "refusals-rejected", "length-bias", "shallow-features"),
)
NEEDS = {"datasketch": ("near-duplicates", "near-overlap", "prompt-overlap"), "ftfy": ("mojibake",)}  # of the extra
SHOWN = 3  # rows that stand for all


class Shown(NamedTuple):
    """A pair that shows a finding: its split, its number there from 0, and what is to be seen in it."""

    split: str
    number: int
    what: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was looked for; a count of 0 says that it was, and is not there."""

    name: str  # as `--fail-on` takes it
    level: Level
    says: str  # one sentence, with its figures
    count: int  # of pairs
    of: int  # pairs that were looked at
    shown: Sequence[Shown] = ()
    advice: str = ""  # what to set, or to do

    @property
    def share(self) -> float:
        return self.count / max(self.of, 1)


def few(shown: Iterable[Shown]) -> tuple[Shown, ...]:
    """The first of them that stand for all; the rest is not read."""
    return tuple(one for one, _ in zip(shown, range(SHOWN), strict=False))


@cache
def left_out() -> tuple[str, ...]:
    """The findings that are not looked for, since the optional library that makes them is not installed."""
    return tuple(name for module, names in NEEDS.items() if lacks("", "doctor", module) for name in names)


def why_left_out() -> str | None:
    """One line that names what is not looked for, and what to install."""
    return lacks(f"looking for {', '.join(left_out())}", "doctor", *NEEDS)
