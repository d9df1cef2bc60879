"""A batch of raw rows → preference pairs as text and token ids, and the rows that hold none with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from alignlab.data.files import Row
from alignlab.data.format import Dialogue, Format
from alignlab.data.layouts import Example
from alignlab.data.rows import Part
from alignlab.data.splits import SPLITS, carve, dialogue_hash
from alignlab.data.transcript import Turn, check_replies, dialogue_key, shorten
from alignlab.errors import DataError
from alignlab.recipe.load import DataSection

# Reasons for leaving a pair out
EMPTY_PROMPT, LONG_PROMPT, LONG_REPLY = "the prompt is empty", "prompt too long", "reply too long"
GREETING = 20  # characters: a shorter turn at the head of a `history` begins many dialogues
SHORTENED, CUT, FOLDED = "prompt shortened by whole turns", "reply cut", "system turn put into the first Human turn"


@dataclass(frozen=True)
class Job:
    """What is to be prepared, and how."""

    section: DataSection
    form: Format
    parts: Sequence[Part]
    key: str = "data"  # the recipe's section: `data.sft` holds replies to learn
    apart_from: Mapping[str, frozenset[bytes]] = field(default_factory=dict)  # dialogues that the pairs hold out

    @property
    def has_pairs(self) -> bool:
        return self.key == "data" and not self.has_labels

    @property
    def has_labels(self) -> bool:
        """Whether each row is one reply that is called good or bad."""
        return any(part.reader.layout.kind == "labels" for part in self.parts if part.reader)

    @property
    def wanted(self) -> Sequence[str]:
        """The splits that must not come out empty."""
        return SPLITS if self.key == "data" else SPLITS[:2]

    @property
    def has_confidence(self) -> bool:
        return self.has_pairs and any(part.source == "summarize-from-feedback" for part in self.parts)


class RawRow(NamedTuple):
    """A row, the number of its part, and the split that it brings, if any."""

    part: int
    row: Row
    split: str | None


class Pair(NamedTuple):
    """A pair on its way: what its row tells, and what the model will see.

    A single reply, to learn or with a label, has no rejected one.
    """

    place: int  # of its row in the batch
    example: Example | None  # none once it is done: the rest is all that is written
    split: str
    key: bytes  # of the dialogue
    prompt: str
    repaired: tuple[str, ...] = ()
    prompt_ids: Sequence[int] = ()
    replies: Sequence[str] = ()  # the chosen one, and the rejected one
    reply_ids: Sequence[np.ndarray] = ()
    confidence: float | None = None
    label: bool | None = None

    def columns(self) -> dict[str, Any]:
        """What is written of the pair."""
        texts, ids = (dict(zip(("chosen", "rejected"), both, strict=False)) for both in (self.replies, self.reply_ids))
        named = {f"{name}_ids": own for name, own in ids.items()}
        told = {"confidence": self.confidence, "label": self.label}
        return {"prompt": self.prompt, **texts, "prompt_ids": self.prompt_ids, **named, **told}


@dataclass
class PreparedBatch:
    """What became of a batch."""

    pairs: list[Pair] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)  # places of rows, and why one of their pairs is none
    unread: Counter[str] = field(default_factory=Counter)  # rows by column or key that holds what is not read

    def keep(self, pairs: Iterable[Pair], make: Callable[[Pair], Pair]) -> list[Pair]:
        """What `make` gives for each pair; why it gives none is noted."""
        found = []
        for pair in pairs:
            try:
                found.append(make(pair))
            except DataError as reason:
                self.refused.append((pair.place, str(reason)))
        return found


def make_pairs(batch: Sequence[RawRow], job: Job) -> PreparedBatch:
    """The pairs of a batch in the order of its rows, why others are none, and what was not read."""
    made = PreparedBatch()
    encoder = job.form.encoder
    pairs = [pair for place, raw in enumerate(batch) for pair in _understood(place, raw, job, made)]
    ids = encoder.prompts([pair.prompt for pair in pairs])
    pairs = [pair._replace(prompt_ids=own) for pair, own in zip(pairs, ids, strict=True)]
    pairs = made.keep(pairs, lambda pair: _shortened(pair, job))
    pairs = made.keep(pairs, lambda pair: _with_replies(pair, job))
    prompts, prompt_ids = [pair.prompt for pair in pairs], [pair.prompt_ids for pair in pairs]
    sides = [encoder.replies(prompts, prompt_ids, side) for side in zip(*(pair.replies for pair in pairs), strict=True)]
    pairs = [pair._replace(reply_ids=own) for pair, own in zip(pairs, zip(*sides, strict=True), strict=True)]
    pairs = made.keep(pairs, lambda pair: _limited(pair, job))
    made.unread.update(name for _, name in {found for pair in pairs for found in _unwritten(pair)})
    made.pairs = [
        pair._replace(example=None, confidence=pair.example.confidence, label=pair.example.label) for pair in pairs
    ]
    return made


def _understood(place: int, raw: RawRow, job: Job, made: PreparedBatch) -> Iterator[Pair]:
    """The pairs of a row, each with the split it is in."""
    part, form = job.parts[raw.part], job.form
    made.unread.update(part.reader.unread(raw.row.fields))
    try:
        examples = list(part.reader.read(raw.row.fields, job.section))
    except DataError as reason:
        made.refused.append((place, str(reason)))
        return
    for example in examples:
        try:
            example = _checked(example, job)
            key = dialogue_hash(_dialogue_of(example.dialogue, part), job.section.seed)
            split = _split_of(key, raw.split, part, job)
            repaired = (FOLDED,) if form.folds_system and example.dialogue.system else ()
            yield Pair(place, example, split, key, form.prompt(example.dialogue), repaired)
        except DataError as reason:
            made.refused.append((place, str(reason)))


def _split_of(key: bytes, named: str | None, part: Part, job: Job) -> str:
    if key in job.apart_from.get("validation", ()):
        return "validation"
    return named or carve(key, shares_of(part, job.section))


def _checked(example: Example, job: Job) -> Example:
    """The example with its replies free of an EOS; refused where it holds no preference, or text no model may see."""
    dialogue, eos = example.dialogue, job.form.eos
    replies = [reply for reply in (example.chosen, example.rejected if job.has_pairs else None) if reply]
    chosen, *rejected = [reply._replace(text=reply.text.removesuffix(eos)) for reply in replies]
    check_replies(*[reply.text for reply in (chosen, *rejected)], *[None] * (not rejected))
    if not (dialogue.turns[-1].text.strip() or dialogue.input):
        raise DataError(EMPTY_PROMPT)
    for turn in (*dialogue.turns, chosen, *rejected):
        _check_text(turn.text, job.form)
        if turn.reasoning:
            _check_text(turn.reasoning, job.form)
    _check_text(f"{dialogue.system or ''} {dialogue.input or ''}", job.form)
    return replace(example, chosen=chosen, rejected=rejected[0] if rejected else None)


def _check_text(text: str, form: Format) -> None:
    """Refuses what no tokenizer takes, and text that spells a special token: it would end a reply in its middle."""
    if token := form.special_token_in(text):
        raise DataError(f"the text spells the special token {token}")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("the text is not valid Unicode") from error


def _dialogue_of(dialogue: Dialogue, part: Part) -> str:
    """What rows must not share across splits: the first Human turn, which all rows of one dialogue have.

    Where every row names its own split on purpose, a greeting may open dialogues of several splits; whole prompts are
    held apart.
    """
    if part.names_all_splits:
        return repr(dialogue.turns)
    first = dialogue_key(dialogue.turns, GREETING if "history" in part.reader.columns else 0)
    return (
        f"{first}\n\n{dialogue.input}" if dialogue.input else first
    )  # many Alpaca rows ask the same about another text


def shares_of(part: Part, section: DataSection) -> dict[str, float]:
    """The shares of the dialogues that rows without a split of their own give to test and validation."""
    wanted = {"test": section.test_share, "validation": section.validation_share}
    return {split: 0.0 if split in part.brought else share for split, share in wanted.items()}


def _shortened(pair: Pair, job: Job) -> Pair:
    """The pair with a prompt of at most `max_prompt_tokens`, whole oldest turns taken off where need be."""
    limit, dialogue = job.section.max_prompt_tokens, pair.example.dialogue
    if len(pair.prompt_ids) <= limit:
        return pair

    def encode(turns: Sequence[Turn]) -> tuple[str, np.ndarray]:
        prompt = job.form.prompt(replace(dialogue, turns=turns))
        return prompt, job.form.encoder.prompts([prompt])[0]

    turns = shorten(dialogue.turns, lambda turns: len(encode(turns)[1]) <= limit)
    if turns is None:
        raise DataError(LONG_PROMPT)
    prompt, prompt_ids = encode(turns)
    example = replace(pair.example, dialogue=replace(dialogue, turns=turns))
    return pair._replace(example=example, prompt=prompt, prompt_ids=prompt_ids, repaired=(*pair.repaired, SHORTENED))


def _with_replies(pair: Pair, job: Job) -> Pair:
    dialogue = pair.example.dialogue
    replies = [reply for reply in (pair.example.chosen, pair.example.rejected) if reply]
    return pair._replace(
        replies=[job.form.reply(dialogue, pair.prompt, reply.text, reply.reasoning) for reply in replies]
    )


def _limited(pair: Pair, job: Job) -> Pair:
    """The pair with replies of at most `max_reply_tokens`."""
    limited = [_limit(pair, text, ids, job) for text, ids in zip(pair.replies, pair.reply_ids, strict=True)]
    replies, reply_ids = zip(*limited, strict=True)
    if len(replies) == 2 and np.array_equal(*reply_ids):
        raise DataError("the two replies are identical once cut")
    cut = sum(len(ids) > job.section.max_reply_tokens for ids in pair.reply_ids)
    return pair._replace(replies=replies, reply_ids=reply_ids, repaired=pair.repaired + (CUT,) * cut)


def _limit(pair: Pair, text: str, ids: np.ndarray | None, job: Job) -> tuple[str, np.ndarray]:
    if ids is None:
        raise DataError("prompt and reply merge into one token")
    limit = job.section.max_reply_tokens
    if len(ids) <= limit:
        return text, ids
    if job.section.long_replies == "drop":
        raise DataError(LONG_REPLY)
    text, cut = job.form.cut(pair.prompt, pair.prompt_ids, text, limit)
    return text, np.array(cut, np.int32)


def _unwritten(pair: Pair) -> Iterator[tuple[int, str]]:
    """What the row holds and the format does not write: reasoning, and tools."""
    example = pair.example
    written = "".join((pair.prompt, *pair.replies))
    for turn in (*example.dialogue.turns, example.chosen, example.rejected):
        if turn and turn.reasoning and turn.reasoning.strip() not in written:
            yield pair.place, "reasoning_content"
    if example.dialogue.tools and not all(_name(tool) in pair.prompt for tool in example.dialogue.tools):
        yield pair.place, "tools"


def _name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
