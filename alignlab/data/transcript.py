r"""HH transcripts: text with ``\n\nHuman:`` and ``\n\nAssistant:`` turns, to turns and back without losing a character.

A turn begins at a blank line followed by its role and a colon; a bare ``Human:`` inside a turn is text. What follows
the colon belongs to the turn as it stands, the leading space included: cut after that space, and almost every reply
would merge with it into another token.

>>> split_turns("\n\nHuman: Hi\n\nAssistant: Hello.")
[Turn(role='Human', text=' Hi'), Turn(role='Assistant', text=' Hello.')]
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from alignlab.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Turn(NamedTuple):
    """What one side says: `role` is Human or Assistant, `text` all that stands between its colon and the next turn."""

    role: str
    text: str
    reasoning: str | None = None  # what an assistant thought before; only chat templates can write it

    def __repr__(self) -> str:
        thought = "" if self.reasoning is None else f", reasoning={self.reasoning!r}"
        return f"Turn(role={self.role!r}, text={self.text!r}{thought})"


def split_turns(text: str) -> list[Turn]:
    """The turns of a transcript, in order; `join_turns` gives the same text back."""
    _check_beginning(text)
    before, *spoken = text.split(HUMAN)
    turns = [Turn("Assistant", reply) for reply in before.split(ASSISTANT)[1:]]
    for piece in spoken:
        words, *replies = piece.split(ASSISTANT)
        turns += [Turn("Human", words), *(Turn("Assistant", reply) for reply in replies)]
    return turns


def _check_beginning(text: str) -> None:
    if not text.startswith((HUMAN, ASSISTANT)):
        raise DataError("the text does not begin with a Human or Assistant turn")


def join_turns(turns: Iterable[Turn]) -> str:
    """The transcript of these turns; refused where a turn's text would read as a further turn."""
    return "".join(f"\n\n{turn.role}:{one_turn(turn.text)}" for turn in turns)


def one_turn(text: str) -> str:
    """The text as it is; refused where a transcript would read it as more than one turn."""
    if HUMAN in text or ASSISTANT in text:
        raise DataError("a turn holds the beginning of another turn")
    return text


def split_last_turn(text: str) -> tuple[str, str]:
    """A transcript cut behind its last `\\n\\nAssistant:`, into (prompt, reply)."""
    _check_beginning(text)
    start = text.rfind(ASSISTANT)
    if start < 0:
        raise DataError("the dialogue has no Assistant turn")
    if text.find(HUMAN, start) >= 0:
        raise DataError("the dialogue ends with a Human turn")
    if text.find(HUMAN, 0, start) < 0:
        raise DataError("no Human turn stands before the reply")
    cut = start + len(ASSISTANT)
    return text[:cut], text[cut:]


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt that two transcripts share, and the last Assistant turn of each: prompt + reply is a transcript again.

    Raises `DataError` with the reason where they are no pair of different, non-empty answers to one prompt.
    """
    prompt, chosen_reply = split_last_turn(chosen)
    other_prompt, rejected_reply = split_last_turn(rejected)
    if prompt != other_prompt:
        raise DataError("chosen and rejected answer different prompts")
    check_replies(chosen_reply, rejected_reply)
    return prompt, chosen_reply, rejected_reply


def check_replies(chosen: str, rejected: str | None) -> None:
    """Raises `DataError` where a reply is empty, or two replies hold no preference, being the same."""
    if not chosen.strip() or not (rejected is None or rejected.strip()):
        raise DataError("a reply is empty")
    if chosen == rejected:
        raise DataError("the two replies are identical")


def dialogue_key(turns: Iterable[Turn], at_least: int = 0) -> str:
    """The first Human turn: rows that share it are one dialogue, and must not stand in two splits.

    With fewer characters than `at_least` it is a greeting, and the next Human turns belong to the key as well.
    """
    said = [turn.text.strip() for turn in turns if turn.role == "Human"]
    if not said:
        raise DataError("no Human turn stands before the reply")
    key = said[0]
    for text in said[1:]:
        if len(key) >= at_least:
            break
        key = f"{key}\n\n{text}"
    return key


def shorten(turns: Sequence[Turn], fits: Callable[[Sequence[Turn]], bool]) -> Sequence[Turn] | None:
    """The longest run of last turns that begins with a Human turn and fits; none where not even the last one does.

    Asks `fits` about the logarithm of the number of turns: what fits must still fit with fewer turns.
    """
    starts = [number for number, turn in enumerate(turns) if turn.role == "Human"]
    first = bisect_left(starts, True, key=lambda start: fits(turns[start:]))
    return turns[starts[first] :] if first < len(starts) else None
