"""Prompts to answer: held-out ones, and files of them, recognised by their columns; imports no torch.

| columns of the file | known as | labels |
|---|---|---|
| `turns` | MT-Bench | none; the first turn is asked |
| `forbidden_prompt` | StrongREJECT | all harmful |
| `goal` | AdvBench, or JailbreakBench | all harmful; benign where the file's name says so |
| `Behavior`, `SemanticCategory` | HarmBench | all harmful |
| `prompt`, `type`, `focus` | XSTest | a type that begins with `contrast` is harmful |
| `context`, `question`, `ans0` | BBQ | none: its label is an answer's number |
| a prompt in any usual spelling | prompts | a column of the words in `LABELS`, or of 0 and 1 named `harmful` |

A prompt may be text, messages, an object with `text`, or `instruction` with `input`; what stands beside it as system
text, history or context is asked with it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from alignlab.data.files import Row, read_file
from alignlab.data.format import MARK, Dialogue, Format
from alignlab.data.layouts import Fields, find_asked, plain_name, read_asked
from alignlab.data.splits import words_of
from alignlab.data.transcript import ASSISTANT, Turn, join_turns, split_turns
from alignlab.errors import AlignlabError, DataError
from alignlab.recipe.fields import suggest

HARMFUL, BENIGN = "harmful", "benign"
LABELS = {
    **dict.fromkeys(("unsafe", "harmful", "toxic", "malicious", "bad"), HARMFUL),
    **dict.fromkeys(("safe", "benign", "harmless", "good"), BENIGN),
}
NUMBERS = {  # beside such words, or in a column whose name says what is true
    **dict.fromkeys(("1", "true", "yes"), HARMFUL),
    **dict.fromkeys(("0", "false", "no"), BENIGN),
}
TELLING = ("harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "is_toxic")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as a judge reads it, as the model sees it, and what is known of it."""

    transcript: str  # HH turns up to the last `Assistant:`
    ids: tuple[int, ...]
    label: str | None = None
    text: str = ""  # the same as the model sees it, where that is needed


@dataclass(frozen=True)
class PromptSet:
    name: str
    known_as: str
    prompts: Sequence[Prompt]
    left_out: Mapping[str, int]  # by reason

    def labelled(self, label: str | None) -> list[int]:
        """The numbers of the prompts with this label."""
        return [i for i, prompt in enumerate(self.prompts) if prompt.label == label]


def read_prompts(file: Path, form: Format, most_tokens: int, column: str | None = None) -> PromptSet:
    """The prompts of a file in the recipe's own way of writing; the same prompt twice counts once.

    `column` is that of the prompts where it has an unusual name. Raises DataError where the file has none, or a label
    that is neither harmful nor benign among others that are.
    """
    rows, known = _rows(file, column)
    found: dict[str, Prompt] = {}
    left_out: Counter[str] = Counter()
    for row in rows:
        label = known.label(row)
        try:
            dialogue = known.asked(row.fields)
            key, prompt = repr(dialogue), _prompt(form, dialogue, label, most_tokens)
            if key in found:
                raise DataError("the same prompt again")
        except AlignlabError as reason:
            left_out[str(reason)] += 1
        else:
            found[key] = prompt
    if not found:
        raise DataError(f"{file}: none of its {len(rows)} prompts can be asked ({', '.join(left_out)})")
    return PromptSet(file.stem, known.name, list(found.values()), left_out)


def texts_of(file: Path, column: str | None = None) -> list[str]:
    """What a file of prompts asks, each once."""
    rows, known = _rows(file, column)
    texts = []
    for row in rows:
        with contextlib.suppress(DataError):
            dialogue = known.asked(row.fields)
            texts.append("\n\n".join(filter(None, (dialogue.turns[-1].text.strip(), dialogue.input))))
    return list(dict.fromkeys(texts))


@dataclass(frozen=True)
class Known:
    """What a file of prompts was taken for."""

    name: str
    asked: Callable[[Fields], Dialogue]
    label: Callable[[Row], str | None]


def _rows(file: Path, column: str | None) -> tuple[list[Row], Known]:
    if not file.is_file():
        raise DataError(f"{file}: no such file of prompts")
    rows = list(read_file(file))
    if not rows:
        raise DataError(f"{file} holds no prompts")
    sample: dict[str, list] = {}
    for row in rows:
        for name, value in row.fields.items():
            if value is not None:
                sample.setdefault(name, []).append(value)
    return rows, _known(file, sample, column)


def _known(file: Path, sample: Mapping[str, Sequence], column: str | None) -> Known:
    columns = find_asked(sample, column)
    names = {plain_name(name) for name in sample}
    if column is not None and column not in sample:
        raise DataError(f"{file}: no column {column!r} among {', '.join(sample)}{suggest(column, list(sample))}")
    if columns is None:
        raise DataError(
            f"{file}: no column of prompts among {', '.join(sample) or 'no columns'};"
            " name it with --prompt-column, and a column of labels label"
        )
    asked = lambda fields: read_asked(fields, columns)
    if column is None and {"context", "question", "ans0"} <= names:
        return Known("BBQ", asked, lambda row: None)
    for name, needs in HARMFUL_SETS.items():
        if column is None and needs <= names:
            return Known(name, asked, _is_benign if "benign" in words_of(file.stem) else _is_harmful)
    if column is None and "turns" in names:
        return Known("MT-Bench", asked, lambda row: None)
    if {"type", "focus"} <= names and "label" not in names:
        return Known("XSTest", asked, _by_type)
    label_of = _labels(sample)
    name = "prompts" if label_of is None else "XSTest" if "focus" in names else "labelled prompts"
    return Known(name, asked, label_of or (lambda row: None))


HARMFUL_SETS = {
    "StrongREJECT": {"forbidden_prompt"},
    "JailbreakBench": {"goal", "behavior"},
    "AdvBench": {"goal"},
    "HarmBench": {"behavior", "semantic_category"},
}


def _is_harmful(row: Row) -> str:
    return HARMFUL


def _is_benign(row: Row) -> str:
    return BENIGN


def _by_type(row: Row) -> str:
    return HARMFUL if str(row.fields.get("type")).startswith("contrast") else BENIGN


def _labels(sample: Mapping[str, Sequence]) -> Callable[[Row], str | None] | None:
    """How each row's label is told; none where no column holds words, or a name, that say what is harmful."""
    spelled = {plain_name(name): name for name in reversed([*sample])}
    telling = next((spelled[name] for name in TELLING if name in spelled), None)
    column = telling or spelled.get("label")
    if column is None:
        return None
    words = {_word(value) for value in sample[column]}
    if not (words & LABELS.keys() or (telling and words <= NUMBERS.keys())):
        return None

    def label_of(row: Row) -> str:
        word = _word(row.fields.get(column))
        known = LABELS | NUMBERS
        if word not in known:
            raise DataError(f"{row.file}:{row.line}: {column} is {word!r}, and not one of {', '.join(known)}")
        return known[word]

    return label_of


def _word(value: object) -> str:
    return str("" if value is None else value).strip().lower().removesuffix(".0")


def _prompt(form: Format, dialogue: Dialogue, label: str | None, most_tokens: int) -> Prompt:
    """The prompt as it is asked; raises where it cannot be."""
    if not (dialogue.turns[-1].text.strip() or dialogue.input):
        raise DataError("the prompt is empty")
    prompt = form.prompt(dialogue)
    ids = form.encode([prompt])[0]
    if len(ids) > most_tokens:
        raise DataError("longer than the model takes")
    return Prompt(as_transcript(form, prompt), tuple(ids), label, prompt)


def as_transcript(form: Format, prompt: str) -> str:
    """A prompt that a model sees, as the HH transcript that judges read; as it stands where that cannot be told."""
    dialogue = None if form.name == "hh" else dialogue_in(form, prompt)
    if dialogue is None:
        return prompt
    first, *others = dialogue.turns
    text = f" {dialogue.system}\n\n{first.text.strip()}" if dialogue.system else first.text
    return join_turns([Turn("Human", text), *others]) + ASSISTANT


def dialogue_in(form: Format, prompt: str) -> Dialogue | None:
    """The dialogue that a prompt was written from, in any way but `hh`; none where that cannot be told.

    What a way of writing puts around the turns is read off a dialogue of marks, and the turns found between are
    written again: only where that gives the same prompt are they believed.
    """
    for system in (None, MARK.format("s")):
        with contextlib.suppress(AlignlabError, ValueError):
            dialogue = _between(prompt, *_around(form, system), has_system=bool(system))
            if form.prompt(dialogue) == prompt:
                return dialogue
    return None


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
