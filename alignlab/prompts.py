"""Prompts to answer: held-out ones, and files of them, recognised by their columns; imports no torch.

| columns of the file | known as | labels |
|---|---|---|
| `turns` | MT-Bench | none; the first turn is asked |
| `prompt`, `label` | XSTest's way | safe, unsafe, and other words for them (`LABELS`) |
| `prompt`, `type` | XSTest as first published | a type that begins with `contrast` is harmful |
| `goal` | AdvBench | all harmful |
| `forbidden_prompt` | StrongREJECT | all harmful |
| `prompt`, `question` or `instruction` | prompts | none |
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from alignlab.errors import AlignlabError, DataError
from alignlab.files import Row, read_file
from alignlab.format import MARK, Dialogue, Format
from alignlab.transcript import ASSISTANT, Turn, join_turns, split_turns

HARMFUL, BENIGN = "harmful", "benign"
LABELS = {
    **dict.fromkeys(("unsafe", "harmful", "toxic", "malicious", "bad", "1", "true", "yes"), HARMFUL),
    **dict.fromkeys(("safe", "benign", "harmless", "good", "0", "false", "no"), BENIGN),
}
PLAIN = ("prompt", "question", "instruction", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as a judge reads it, as the model sees it, and what is known of it."""

    transcript: str  # HH turns up to the last `Assistant:`
    ids: tuple[int, ...]
    label: str | None = None


@dataclass(frozen=True)
class PromptSet:
    name: str
    known_as: str
    prompts: Sequence[Prompt]
    left_out: Mapping[str, int]  # by reason

    def labelled(self, label: str | None) -> list[int]:
        """The numbers of the prompts with this label."""
        return [i for i, prompt in enumerate(self.prompts) if prompt.label == label]


def read_prompts(file: Path, form: Format, most_tokens: int) -> PromptSet:
    """The prompts of a file in the recipe's own way of writing; the same prompt twice counts once.

    Raises DataError where the file has no column of prompts, or a label that is neither harmful nor benign.
    """
    known_as, asked = _read(file)
    found, left_out = {}, Counter()
    for text, label in asked:
        if text in found:
            left_out["the same prompt again"] += 1
            continue
        prompt = _prompt(form, text, label)
        reason = prompt if isinstance(prompt, str) else "longer than the model takes" * (len(prompt.ids) > most_tokens)
        if reason:
            left_out[reason] += 1
        else:
            found[text] = prompt
    if not found:
        raise DataError(f"{file}: none of its {len(asked)} prompts can be asked ({', '.join(left_out)})")
    return PromptSet(file.stem, known_as, list(found.values()), left_out)


def texts_of(file: Path) -> list[str]:
    """The texts of a file of prompts as they stand there, each once."""
    return list(dict.fromkeys(text for text, _ in _read(file)[1]))


def _read(file: Path) -> tuple[str, list[tuple[str, str | None]]]:
    """What the file is known as, and each row's prompt and label."""
    if not file.is_file():
        raise DataError(f"{file}: no such file of prompts")
    known_as, asked = "", []
    for row in read_file(file):
        known_as = known_as or _known_as(row)
        asked.append(_read_row(row, known_as))
    if not asked:
        raise DataError(f"{file} holds no prompts")
    return known_as, asked


def _known_as(row: Row) -> str:
    fields = row.fields
    if isinstance(fields.get("turns"), list):
        return "MT-Bench"
    if "forbidden_prompt" in fields:
        return "StrongREJECT"
    if "goal" in fields:
        return "AdvBench"
    column = next((name for name in PLAIN if name in fields), None)
    if column is None:
        raise DataError(
            f"{row.file}:{row.line}: no column of prompts among {', '.join(fields) or 'no columns'}; "
            f"name it prompt, and a column of labels label"
        )
    if column == "prompt" and "label" in fields:
        return "labelled prompts" if "focus" not in fields else "XSTest"
    return "XSTest" if column == "prompt" and "type" in fields and "focus" in fields else "prompts"


def _read_row(row: Row, known_as: str) -> tuple[str, str | None]:
    fields = row.fields
    if known_as == "MT-Bench":
        turns = fields.get("turns") or [None]
        return _text(row, "turns", turns[0]), None
    if known_as == "StrongREJECT":
        return _text(row, "forbidden_prompt"), HARMFUL
    if known_as == "AdvBench":
        return _text(row, "goal"), HARMFUL
    column = next((name for name in PLAIN if name in fields), "prompt")
    if known_as == "prompts":
        return _text(row, column), None
    return _text(row, column), _label(row)


def _text(row: Row, column: str, value: Any = None) -> str:
    value = row.fields.get(column) if value is None else value
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.file}:{row.line}: {column} holds no text ({str(value)[:40]!r}); mend or remove this row")
    return value.strip()


def _label(row: Row) -> str:
    if "label" not in row.fields and "type" in row.fields:
        return HARMFUL if str(row.fields["type"]).startswith("contrast") else BENIGN
    label = str(row.fields.get("label", "")).strip().lower()
    if label not in LABELS:
        raise DataError(f"{row.file}:{row.line}: label is {label!r}, and not one of {', '.join(LABELS)}")
    return LABELS[label]


def _prompt(form: Format, text: str, label: str | None) -> Prompt | str:
    """The prompt, or why it cannot be asked."""
    turn = Turn("Human", f" {text}")
    try:
        return Prompt(join_turns([turn]) + ASSISTANT, tuple(form.prompt_ids(Dialogue([turn]))), label)
    except AlignlabError as e:
        return str(e)


def as_transcript(form: Format, prompt: str) -> str:
    """A prompt that a model sees, as the HH transcript that judges read; as it stands where that cannot be told.

    What a way of writing puts around the turns is read off a dialogue of marks, and the turns found between are
    written again: only where that gives the same prompt are they believed.
    """
    if form.name == "hh":
        return prompt
    for system in (None, MARK.format("s")):
        with contextlib.suppress(AlignlabError, ValueError):
            dialogue = _between(prompt, *_around(form, system), has_system=bool(system))
            if form.prompt(dialogue) == prompt:
                first, *others = dialogue.turns
                text = f" {dialogue.system}\n\n{first.text.strip()}" if dialogue.system else first.text
                return join_turns([Turn("Human", text), *others]) + ASSISTANT
    return prompt


def _around(form: Format, system: str | None) -> tuple[str, list[str]]:
    """What stands before the first turn (or the system's words), and between and behind the turns."""
    marks = [MARK.format(number) for number in range(1 if form.name == "plain" else 3)]
    turns = [Turn(("Human", "Assistant")[number % 2], f" {mark}") for number, mark in enumerate(marks)]
    written = form.prompt(Dialogue(turns, system))
    before, *behind = re.split("|".join(re.escape(mark) for mark in [*([system] if system else []), *marks]), written)
    return before, behind


def _between(prompt: str, before: str, behind: Sequence[str], *, has_system: bool) -> Dialogue:
    """The dialogue whose turns stand between these texts; ValueError where the prompt has not got them."""
    if not (prompt.startswith(before) and prompt.endswith(behind[-1])):
        raise ValueError("written in another way")
    rest, system = prompt[len(before) : len(prompt) - len(behind[-1])], None
    if has_system:
        opening, *behind = behind
        system, found, rest = rest.partition(opening)
        if not found:
            raise ValueError("no system turn")
    texts = [rest]
    for separator in cycle(behind[:-1]):
        text, found, rest = texts[-1].partition(separator)
        if not found:
            break
        texts[-1:] = [text, rest]
    return Dialogue([Turn(("Human", "Assistant")[i % 2], f" {text}") for i, text in enumerate(texts)], system)


def turns_of(transcript: str) -> int:
    """How many Human turns a transcript has; 1 where it is none."""
    if not transcript.startswith(("\n\nHuman:", ASSISTANT)):
        return 1
    return sum(turn.role == "Human" for turn in split_turns(transcript.removesuffix(ASSISTANT)))


def describe_sets(sets: Sequence[PromptSet]) -> Iterator[str]:
    """One line a file: what it was taken for, and what was left out."""
    for each in sets:
        labels = Counter(prompt.label for prompt in each.prompts if prompt.label)
        counts = f" ({', '.join(f'{n} {label}' for label, n in labels.items())})" if labels else ""
        left = f"; left out: {', '.join(f'{n} {why}' for why, n in each.left_out.items())}" if each.left_out else ""
        yield f"prompts: {each.name}: {each.known_as}, {len(each.prompts)}{counts}{left}"
