"""A batch of raw rows → preference pairs as text and token ids, and the rows that hold none with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from alignlab.data.rows import Part
from alignlab.data.sources import SOURCES, Example
from alignlab.data.splits import SPLITS, carve, dialogue_hash
from alignlab.errors import DataError
from alignlab.files import Row
from alignlab.format import Format
from alignlab.recipe import DataSection
from alignlab.transcript import Turn, check_replies, dialogue_key, shorten

LONG_PROMPT, LONG_REPLY = "prompt too long", "reply too long"  # reasons for leaving a pair out
SHORTENED, CUT, FOLDED = "prompt shortened by whole turns", "reply cut", "system turn put into the first Human turn"


@dataclass(frozen=True)
class Job:
    """What is to be prepared, and how."""

    section: DataSection
    form: Format
    parts: Sequence[Part]
    apart_from: Mapping[str, frozenset[bytes]]  # dialogues that other data holds out, by split
    wanted: Sequence[str] = SPLITS  # the splits that must not come out empty
    has_pairs: bool = True  # or replies to learn

    @property
    def has_confidence(self) -> bool:
        return self.has_pairs and any(part.source == "summarize-from-feedback" for part in self.parts)


class Source(NamedTuple):
    """A raw row and where it comes from; `split` is what it brings, if anything."""

    part: int  # of the job's
    row: Row
    split: str | None


class Refusal(NamedTuple):
    """Why a row, or one of its pairs, is left out."""

    place: int  # of the row in its batch
    reason: str


class Pair(NamedTuple):
    """A finished pair; ids are int32 arrays. A reply to learn has no `rejected`."""

    place: int  # of its row in the batch
    split: str
    key: bytes  # of the dialogue
    prompt: str
    chosen: str
    rejected: str | None
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray | None
    confidence: float | None
    repaired: Sequence[str]


class Draft(NamedTuple):
    """A pair on its way."""

    place: int
    example: Example
    split: str
    key: bytes
    repaired: tuple[str, ...]
    prompt: str
    prompt_ids: Sequence[int] = ()


def make_pairs(batch: Sequence[Source], job: Job) -> tuple[list[Pair], list[Refusal]]:
    """The pairs of a batch in the order of its rows, and why others are none."""
    refused: list[Refusal] = []  # the steps below add to it
    drafts = [draft for place, source in enumerate(batch) for draft in _understood(place, source, job, refused)]
    pairs = list(_with_replies(_with_prompts(drafts, job, refused), job, refused))
    return pairs, refused


def _understood(place: int, source: Source, job: Job, refused: list[Refusal]) -> Iterator[Draft]:
    """The pairs of a row, each with the split it is in."""
    part, form = job.parts[source.part], job.form
    try:
        examples = list(SOURCES[part.source](source.row.fields, job.section))
    except DataError as reason:
        refused.append(Refusal(place, str(reason)))
        return
    for example in examples:
        try:
            example = _checked(example, job)
            key = dialogue_hash(_dialogue_of(example, part.names_all_splits), job.section.seed)
            split = _split_of(key, source.split, part, job)
            repaired = (FOLDED,) if form.folds_system and example.dialogue.system else ()
            yield Draft(place, example, split, key, repaired, form.prompt(example.dialogue))
        except DataError as reason:
            refused.append(Refusal(place, str(reason)))


def _split_of(key: bytes, named: str | None, part: Part, job: Job) -> str:
    if key in job.apart_from.get("validation", ()):
        return "validation"
    return named or carve(key, shares_of(part, job.section))


def _checked(example: Example, job: Job) -> Example:
    """The example with its replies free of an EOS; refused where it holds no preference, or text no model may see."""
    eos = job.form.eos
    chosen = example.chosen.removesuffix(eos)
    rejected = example.rejected.removesuffix(eos) if job.has_pairs and example.rejected is not None else None
    if job.has_pairs and rejected is None:
        raise DataError("a reply to learn, which is no pair")
    check_replies(chosen, rejected)
    for text in (*(turn.text for turn in example.dialogue.turns), chosen, rejected):
        _check_text(text or "", job.form)
    _check_text(f"{example.dialogue.system or ''} {example.dialogue.input or ''}", job.form)
    return Example(example.dialogue, chosen, rejected, example.confidence)


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


def _dialogue_of(example: Example, names_split: bool) -> str:
    """What rows must not share across splits: the first Human turn, which all rows of one dialogue have.

    Where every row names its own split on purpose, a greeting may open dialogues of several splits; whole prompts are
    held apart.
    """
    first = dialogue_key(example.dialogue.turns)
    if example.dialogue.input:  # many Alpaca rows ask the same about another text
        first = f"{first}\n\n{example.dialogue.input}"
    return repr(example.dialogue.turns) if names_split else first


def shares_of(part: Part, section: DataSection) -> dict[str, float]:
    """The shares of the dialogues that rows without a split of their own give to test and validation."""
    wanted = {"test": section.test_share, "validation": section.validation_share}
    return {split: 0.0 if split in part.brought else share for split, share in wanted.items()}


def _with_prompts(drafts: Sequence[Draft], job: Job, refused: list[Refusal]) -> list[Draft]:
    """Drafts with a prompt of at most `max_prompt_tokens`, whole oldest turns taken off where need be."""
    found = []
    for draft, ids in zip(drafts, job.form.encoder.prompts([draft.prompt for draft in drafts]), strict=True):
        draft = draft._replace(prompt_ids=ids)
        try:
            found.append(draft if len(ids) <= job.section.max_prompt_tokens else _shortened(draft, job))
        except DataError as reason:
            refused.append(Refusal(draft.place, str(reason)))
    return found


def _shortened(draft: Draft, job: Job) -> Draft:
    def encode(turns: Sequence[Turn]) -> tuple[str, np.ndarray]:
        prompt = job.form.prompt(replace(draft.example.dialogue, turns=turns))
        return prompt, job.form.encoder.prompts([prompt])[0]

    limit = job.section.max_prompt_tokens
    turns = shorten(draft.example.dialogue.turns, lambda turns: len(encode(turns)[1]) <= limit)
    if turns is None:
        raise DataError(LONG_PROMPT)
    example = replace(draft.example, dialogue=replace(draft.example.dialogue, turns=turns))
    prompt, prompt_ids = encode(turns)
    return draft._replace(example=example, prompt=prompt, prompt_ids=prompt_ids, repaired=(*draft.repaired, SHORTENED))


def _with_replies(drafts: Sequence[Draft], job: Job, refused: list[Refusal]) -> Iterator[Pair]:
    """Pairs with their replies as text and ids, the ids as they stand behind the prompt."""
    spelled = []
    for draft in drafts:
        try:
            replies = (draft.example.chosen, draft.example.rejected) if job.has_pairs else (draft.example.chosen,)
            dialogue = draft.example.dialogue
            spelled.append((draft, [job.form.reply(dialogue, draft.prompt, reply) for reply in replies]))
        except DataError as reason:
            refused.append(Refusal(draft.place, str(reason)))
    prompts, prompt_ids = [draft.prompt for draft, _ in spelled], [draft.prompt_ids for draft, _ in spelled]
    sides = [list(side) for side in zip(*(replies for _, replies in spelled), strict=True)]
    ids = [job.form.encoder.replies(prompts, prompt_ids, side) for side in sides]
    for number, (draft, replies) in enumerate(spelled):
        try:
            yield _pair(
                draft, [_limited(draft, *both, job) for both in zip(replies, (i[number] for i in ids), strict=True)]
            )
        except DataError as reason:
            refused.append(Refusal(draft.place, str(reason)))


def _limited(draft: Draft, text: str, ids: np.ndarray | None, job: Job) -> tuple[str, np.ndarray, bool]:
    """A reply of at most `max_reply_tokens`, and whether it was cut."""
    if ids is None:
        raise DataError("prompt and reply merge into one token")
    if len(ids) <= job.section.max_reply_tokens:
        return text, ids, False
    if job.section.long_replies == "drop":
        raise DataError(LONG_REPLY)
    text, cut = job.form.cut(draft.prompt, draft.prompt_ids, text, job.section.max_reply_tokens)
    return text, np.array(cut, np.int32), True


def _pair(draft: Draft, replies: Sequence[tuple[str, np.ndarray, bool]]) -> Pair:
    (chosen, chosen_ids, _), (rejected, rejected_ids, _) = (
        replies if len(replies) == 2 else (*replies, (None, None, False))
    )
    if rejected_ids is not None and np.array_equal(chosen_ids, rejected_ids):
        raise DataError("the two replies are identical once cut")
    repaired = draft.repaired + (CUT,) * sum(cut for _, _, cut in replies)
    ids = (draft.prompt_ids, chosen_ids, rejected_ids)
    texts = (draft.prompt, chosen, rejected)
    return Pair(draft.place, draft.split, draft.key, *texts, *ids, draft.example.confidence, repaired)
