"""A source of preference pairs → the columns TRL trains on, with every dropped row counted by reason.

Rows are read, tokenized and written a batch at a time; what grows with the data lies in Arrow files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from alignlab.errors import DataError
from alignlab.format import Format
from alignlab.ledger import SPLITS, Draft, Ledger, arrow_writer, make_folder, open_arrow, record_batch
from alignlab.recipe import DataSection
from alignlab.rows import Part, find_parts, split_named
from alignlab.sources import NEEDS, SOURCES, Example
from alignlab.transcript import Turn, check_replies, dialogue_key, shorten

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SFT_COLUMNS = {"input_ids": "ids", "labels": "ids"}
BATCH_ROWS = 1000  # rows tokenized in one call and written in one piece: what is held in memory
SHORTENED, CUT, FOLDED = "prompt shortened by whole turns", "reply cut", "system turn put into the first Human turn"


@dataclass(frozen=True)
class Prepared:
    """Preference pairs ready for TRL, and the account of how they came about.

    Each split has `prompt`, `chosen`, `rejected` (what the model sees, without BOS and EOS unless a chat template
    writes them into the prompt) and `prompt_ids`, `chosen_ids`, `rejected_ids`: what TRL's `DPOTrainer` makes of these
    strings, but that a reply that was cut carries no EOS (it would teach the model to stop anywhere).
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    rows: int  # raw rows read
    kept: Mapping[str, int]  # pairs in each split
    dropped: Mapping[str, int]  # rows left out, by reason
    repaired: Mapping[str, int]  # kept rows (for "reply cut": replies) that were changed, by what was done
    dropped_rows: Path  # JSON lines: reason, file, line, row
    dialogues: Mapping[str, frozenset[bytes]]  # hashes of the dialogues in each split (see `_dialogue_of`)
    fingerprint: str  # of the prepared rows: equal where each split holds the same strings and ids in the same order
    folder: Path  # the Arrow files; gone when the process ends


def prepare(section: DataSection, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> Prepared:
    """All pairs of a recipe's `data` section for this tokenizer, split by dialogue.

    Raises `DataError` where a file cannot be read, nothing is usable, or a split comes out empty.
    """
    form = Format(section.format, tokenizer, chat_template)
    parts = find_parts(section)
    shares = _carved_shares(parts, section)
    with Ledger(make_folder()) as ledger:
        for batch in _batches(_progress(_read_rows(parts, section, ledger))):
            drafts = list(_each(batch, ledger, lambda draft: _understood(draft, section, form, shares)))
            for draft in _with_replies(_with_prompts(drafts, section, form, ledger), section, form, ledger):
                ledger.keep(draft)
            ledger.flush()
    _check_splits(ledger, shares, section)
    return _prepared(ledger)


def _each(drafts: Iterable[Draft], ledger: Ledger, step: Callable[[Draft], Draft]) -> Iterator[Draft]:
    """What `step` makes of each row; a row that it refuses is dropped with the reason."""
    for draft in drafts:
        try:
            yield step(draft)
        except DataError as reason:
            ledger.drop(draft.row, str(reason))


def _read_rows(parts: Sequence[Part], section: DataSection, ledger: Ledger) -> Iterator[Draft]:
    """Raw rows with the split that they bring, if any; at most `max_pairs` of each part and split."""
    for part in parts:
        read = Counter()
        for row in part.rows():
            named = row.fields.get("split")
            named = split_named(named, section) if isinstance(named, str) else None
            split = named or part.split
            if section.max_pairs is None or read[split] < section.max_pairs:
                read[split] += 1
                ledger.rows += 1
                yield Draft(row, split, names_split=named is not None)


def _understood(draft: Draft, section: DataSection, form: Format, shares: Mapping[str, float]) -> Draft:
    example = SOURCES[section.source](draft.row.fields)
    example = replace(
        example, chosen=example.chosen.removesuffix(form.eos), rejected=example.rejected.removesuffix(form.eos)
    )
    check_replies(example.chosen, example.rejected)
    for text in _texts(example):
        _check_text(text, form)
    key = _hash(_dialogue_of(example, draft), section.seed)
    repaired = (FOLDED,) if form.name == "hh" and example.dialogue.system else ()
    return replace(draft, example=example, key=key, split=draft.split or _carve(key, shares), repaired=repaired)


def _dialogue_of(example: Example, draft: Draft) -> str:
    """What rows must not share across splits: the first Human turn, which all rows of one dialogue have.

    Where every row names its own split on purpose, a greeting may open dialogues of several splits; whole prompts are
    held apart.
    """
    first = dialogue_key(example.dialogue.turns)
    return repr(example.dialogue.turns) if draft.names_split else first


def _texts(example: Example) -> Iterator[str]:
    yield from (turn.text for turn in example.dialogue.turns)
    yield from (example.dialogue.system or "", example.chosen, example.rejected)


def _check_text(text: str, form: Format) -> None:
    """Refuses what no tokenizer takes, and text that spells a special token: it would end a reply in its middle."""
    if token := form.special_token_in(text):
        raise DataError(f"the text spells the special token {token}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("the text is not valid Unicode") from error


def _with_prompts(drafts: Iterable[Draft], section: DataSection, form: Format, ledger: Ledger) -> Iterator[Draft]:
    """Drafts with a prompt of at most `max_prompt_tokens`, whole oldest turns taken off where need be."""
    spelled = list(_each(drafts, ledger, lambda draft: replace(draft, prompt=form.prompt(draft.example.dialogue))))
    ids = form.encode([draft.prompt for draft in spelled])
    encoded = [replace(draft, prompt_ids=prompt_ids) for draft, prompt_ids in zip(spelled, ids, strict=True)]
    return _each(encoded, ledger, lambda draft: _shortened(draft, section.max_prompt_tokens, form))


def _shortened(draft: Draft, limit: int, form: Format) -> Draft:
    if len(draft.prompt_ids) <= limit:
        return draft

    def encode(turns: Sequence[Turn]) -> tuple[str, list[int]]:
        prompt = form.prompt(replace(draft.example.dialogue, turns=turns))
        return prompt, form.encode([prompt])[0]

    turns = shorten(draft.example.dialogue.turns, lambda turns: len(encode(turns)[1]) <= limit)
    if turns is None:
        raise DataError("prompt too long")
    example = replace(draft.example, dialogue=replace(draft.example.dialogue, turns=turns))
    prompt, prompt_ids = encode(turns)
    return replace(draft, example=example, prompt=prompt, prompt_ids=prompt_ids, repaired=(*draft.repaired, SHORTENED))


def _with_replies(drafts: Iterable[Draft], section: DataSection, form: Format, ledger: Ledger) -> Iterator[Draft]:
    """Drafts with both replies as text and ids: prompt + reply + EOS tokenized as one text, cut behind the prompt."""
    spelled = list(_each(drafts, ledger, lambda draft: _spelled(draft, form)))
    ids = form.encode([draft.prompt + draft.chosen + form.eos for draft in spelled])
    other_ids = form.encode([draft.prompt + draft.rejected + form.eos for draft in spelled])
    encoded = [
        replace(draft, chosen_ids=chosen, rejected_ids=rejected)
        for draft, chosen, rejected in zip(spelled, ids, other_ids, strict=True)
    ]
    return _each(encoded, ledger, lambda draft: _limited(draft, section, form))


def _spelled(draft: Draft, form: Format) -> Draft:
    dialogue, chosen, rejected = draft.example.dialogue, draft.example.chosen, draft.example.rejected
    return replace(
        draft,
        chosen=form.reply(dialogue, draft.prompt, chosen),
        rejected=form.reply(dialogue, draft.prompt, rejected),
    )


def _limited(draft: Draft, section: DataSection, form: Format) -> Draft:
    chosen, chosen_ids = _reply(draft, draft.chosen, draft.chosen_ids, section, form)
    rejected, rejected_ids = _reply(draft, draft.rejected, draft.rejected_ids, section, form)
    if chosen_ids == rejected_ids:
        raise DataError("the two replies are identical once cut")
    cuts = (chosen != draft.chosen) + (rejected != draft.rejected)
    return replace(
        draft,
        chosen=chosen,
        chosen_ids=chosen_ids,
        rejected=rejected,
        rejected_ids=rejected_ids,
        repaired=draft.repaired + (CUT,) * cuts,
    )


def _reply(draft: Draft, text: str, whole: Sequence[int], section: DataSection, form: Format) -> tuple[str, list[int]]:
    begins = len(draft.prompt_ids)
    if whole[:begins] != draft.prompt_ids:
        raise DataError("prompt and reply merge into one token")
    if len(whole) - begins <= section.max_reply_tokens:
        return text, whole[begins:]
    if section.long_replies == "drop":
        raise DataError("reply too long")
    return form.cut(draft.prompt, draft.prompt_ids, text, section.max_reply_tokens)


def _batches(drafts: Iterator[Draft]) -> Iterator[list[Draft]]:
    while batch := list(islice(drafts, BATCH_ROWS)):
        yield batch


def _progress(drafts: Iterator[Draft]) -> Iterator[Draft]:
    from tqdm.auto import tqdm

    quiet = os.environ.get("LOCAL_RANK", "0") != "0" or None  # none: shown on a terminal only
    return iter(tqdm(drafts, desc="preparing pairs", unit=" rows", leave=False, disable=quiet))


# Splits


def _carved_shares(parts: Sequence[Part], section: DataSection) -> dict[str, float]:
    """The shares of the dialogues that rows without a split of their own give to test and validation."""
    brought = {part.split for part in parts}
    wanted = {"test": section.test_share, "validation": section.validation_share}
    return {split: 0.0 if split in brought else share for split, share in wanted.items()}


def _hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()


def _place(key: bytes) -> float:
    """Where a dialogue stands between 0 and 1: by its own text and the seed, whatever other rows there are."""
    return int.from_bytes(key, "big") / 2**64


def _carve(key: bytes, shares: Mapping[str, float]) -> str:
    place = _place(key)
    if place < shares["test"]:
        return "test"
    return "validation" if place < shares["test"] + shares["validation"] else "train"


def _check_splits(ledger: Ledger, shares: Mapping[str, float], section: DataSection) -> None:
    """Raises `DataError` where there is nothing to train on, to choose by or to test on."""
    where, kept = section.path or section.source, ledger.kept.total()
    reasons = ", ".join(f"{reason} ({count})" for reason, count in ledger.dropped.most_common(3)) or "nothing"
    empty = [split for split in SPLITS if not ledger.kept[split]]
    if not ledger.rows:
        raise DataError(f"{where}: no rows: the data is empty")
    if not kept:
        raise DataError(
            f"{where}: not one usable row of {ledger.rows}: {reasons}; data.source={section.source} needs"
            f" {NEEDS[section.source]}; {ledger.first_dropped}"
        )
    if empty:
        remedy = _larger_shares(ledger, empty, shares)
        raise DataError(f"{where}: no {' and no '.join(empty)} rows among {kept} pairs (dropped: {reasons}); {remedy}")


def _larger_shares(ledger: Ledger, empty: Sequence[str], shares: Mapping[str, float]) -> str:
    """What to set so that every split holds at least one dialogue of this data."""
    if "train" in empty:
        return "lower data.validation_share or data.test_share, or bring more rows"
    if not all(shares[split] for split in empty):
        return "bring rows of that split, or let the dialogues' shares make it (data.test_split=null)"
    places = sorted(_place(key) for keys in ledger.dialogues.values() for key in keys)
    wanted, start = dict(shares), 0.0
    for split in ("test", "validation"):
        later = [place for place in places if place >= start]
        if split in empty and later:
            wanted[split] = math.ceil(100 * (later[0] - start) + 1e-9) / 100
        start += wanted[split]
    if start > 1 or not any(place >= start for place in places):
        return "bring more rows"
    return "set " + " and ".join(f"data.{split}_share={wanted[split]:g}" for split in empty) + ", or bring more rows"


def _prepared(ledger: Ledger) -> Prepared:
    assert not any(ledger.dialogues[a] & ledger.dialogues[b] for a, b in combinations(SPLITS, 2)), (
        "splits share dialogues"
    )
    assert ledger.rows == ledger.kept.total() + ledger.dropped.total(), "a row is neither kept nor dropped"
    log.info("%d rows read: %d kept, %d dropped", ledger.rows, ledger.kept.total(), ledger.dropped.total())
    return Prepared(
        **{split: open_arrow(ledger.folder / f"{split}.arrow") for split in SPLITS},
        rows=ledger.rows,
        kept=dict(ledger.kept),
        dropped=dict(ledger.dropped),
        repaired=dict(ledger.repaired),
        dropped_rows=ledger.folder / "dropped.jsonl",
        dialogues={split: frozenset(keys) for split, keys in ledger.dialogues.items()},
        fingerprint=ledger.fingerprint(),
        folder=ledger.folder,
    )


def sft_rows(pairs: datasets.Dataset) -> datasets.Dataset:
    """The chosen replies of a split as `input_ids` and `labels`, for TRL's `SFTTrainer`.

    Labels are -100 on the prompt, so that only the reply is learned. A reply that is chosen over several others stands
    in several pairs and here once: there are `len(pairs) - len(sft_rows(pairs))` doubles. TRL takes these rows with
    `dataset_kwargs={"skip_prepare_dataset": True}`.
    """
    path, seen = make_folder() / "sft.arrow", set()
    with arrow_writer(path, SFT_COLUMNS) as table:
        for batch in pairs.select_columns(["prompt_ids", "chosen_ids"]).iter(BATCH_ROWS):
            rows = []
            for prompt_ids, chosen_ids in zip(batch["prompt_ids"], batch["chosen_ids"], strict=True):
                key = xxhash.xxh3_128_digest(array("i", [len(prompt_ids), *prompt_ids, *chosen_ids]).tobytes())
                if key not in seen:
                    seen.add(key)
                    labels = [-100] * len(prompt_ids) + chosen_ids
                    rows.append({"input_ids": prompt_ids + chosen_ids, "labels": labels})
            table.write_batch(record_batch(rows, SFT_COLUMNS))
    return open_arrow(path)


def write_pairs(prepared: Prepared, path: Path) -> None:
    """Writes every pair as a JSON line of `split`, `prompt`, `chosen`, `rejected`; source `pairs` reads them again."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as lines:
            for split in SPLITS:
                for pair in getattr(prepared, split).select_columns(["prompt", "chosen", "rejected"]):
                    lines.write(json.dumps({"split": split, **pair}, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
