"""A source of preference pairs → the columns TRL trains on, with every dropped row counted by reason.

Rows are read, tokenized and written a batch at a time; what grows with the data lies in Arrow files, which are kept in
the cache by content.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from alignlab.data.account import arrow_writer, id_arrays, make_folder, open_arrow, read_dialogues, record_batch
from alignlab.data.format import Format
from alignlab.data.identity import identify
from alignlab.data.pairing import Job
from alignlab.data.preparation import BATCH_ROWS, prepare_rows
from alignlab.data.prepared import Entry, find_or_make
from alignlab.data.rows import Part, find_parts, names_of, with_readers
from alignlab.data.splits import SPLITS
from alignlab.disk import writing
from alignlab.recipe.load import DataSection

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SFT_COLUMNS = {"input_ids": "ids", "labels": "ids"}
KTO_COLUMNS = {"prompt_ids": "ids", "completion_ids": "ids", "KL_completion_ids": "ids", "label": "flag"}


@dataclass(frozen=True)
class Prepared:
    """Preference pairs ready for TRL, and the account of how they came about.

    Each split has `prompt`, `chosen`, `rejected` (what the model sees, without BOS and end unless a chat template
    writes them into the prompt) and `prompt_ids`, `chosen_ids`, `rejected_ids`: what TRL's `DPOTrainer` makes of these
    strings, but that a reply ends with `Format.end`, and one that was cut with nothing (it would teach the model to
    stop anywhere). Where the source has it, `confidence` is that of the person who preferred. `file` and `line` say
    which row a pair comes from: the number of its name in `files`, and the line or row there.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    rows: int  # raw rows read
    kept: Mapping[str, int]  # pairs in each split
    dropped: Mapping[str, int]  # rows and pairs left out, by reason
    repaired: Mapping[str, int]  # kept rows (for "reply cut": replies) that were changed, by what was done
    not_read: Mapping[str, int]  # rows by the column, or key of a message, that holds what is not read
    parts: Sequence[Mapping[str, Any]]  # of each path: path, source, rows, kept, dropped
    files: Sequence[str]  # names of the files and tables that `file` counts, from 0
    dropped_rows: Path  # JSON lines: reason, file, line, row
    dialogues: Mapping[str, frozenset[bytes]]  # hashes of the dialogues in each split (see `pairing`)
    fingerprint: str  # of the prepared rows: equal where each split holds the same strings and ids in the same order
    folder: Path  # the Arrow files: in the cache, or gone when the process ends

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[str, int, dict[str, list[Any]]]]:
        """All pairs a thousand at a time: the split, the number of the first of them there, and their columns."""
        for split in SPLITS:
            rows = getattr(self, split).select_columns(list(columns))
            for number, batch in enumerate(rows.iter(BATCH_ROWS)):
                yield split, number * BATCH_ROWS, batch

    def token_counts(self, split: str, text: str) -> np.ndarray:
        """How many tokens each pair's `prompt`, `chosen` or `rejected` has, a reply with its EOS; shape (pairs,)."""
        import pyarrow.compute

        ids = getattr(self, split).data.column(f"{text}_ids")
        return pyarrow.compute.list_value_length(ids).to_numpy().astype(int)


def prepare(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    *,
    labels: bool = False,
) -> Prepared:
    """All pairs of a recipe's `data` section for this tokenizer, split by dialogue.

    With `labels` they may be single replies that are called good or bad, in a column `label` beside `chosen`.
    Raises `DataError` where a file cannot be read, nothing is usable, or a split comes out empty.
    """
    form = Format(section.format, tokenizer, chat_template)
    return _prepared(Job(section, form, with_readers(find_parts(section), section, labels=labels)))


def prepare_replies(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, pairs: Prepared, chat_template: str | None = None
) -> Prepared:
    """What SFT learns: the replies of `data.sft`, or the pairs as they are, whose chosen replies it learns then.

    The columns are `prompt`, `chosen`, `prompt_ids`, `chosen_ids`. What the pairs hold out must be new to SFT as well:
    dialogues that they test on are left out, those that they validate on are for validation here too. Nothing is kept
    apart for a test of their own.
    """
    if not section.sft.path:
        return pairs
    sft = section.sft
    own = {name: getattr(sft, name) for name in ("source", "path", "subset", "config", "split", "columns")}
    other = replace(section, **own, test_split=None, test_share=0.0)
    form = Format(section.format, tokenizer, chat_template)
    held_out = {split: pairs.dialogues[split] for split in ("validation", "test")}
    parts = with_readers(find_parts(other, "data.sft"), other, "data.sft")
    return _prepared(Job(other, form, parts, "data.sft", held_out))


def _prepared(job: Job) -> Prepared:
    began = time.perf_counter()
    about = f"{names_of(job.parts)} as {job.section.format}, {job.form.tokenizer.name_or_path or 'a tokenizer'}"
    held_out = [sorted(key.hex() for key in keys) for keys in job.apart_from.values()]
    facts = identify(job.section, job.form, job.parts, [job.has_pairs, held_out])
    entry = find_or_make(facts, about, lambda folder: prepare_rows(job, folder))
    account, names = entry.account, dict(zip(entry.account["files"], (part.name for part in job.parts), strict=True))
    log.info("data: %s: %s, in %.1f s", names_of(job.parts), _sentence(entry, names), time.perf_counter() - began)
    if account["not_read"]:
        told = ", ".join(f"{name} ({count:,} rows)" for name, count in account["not_read"].items())
        log.info("data: %s: not read: %s", names_of(job.parts), told)
    return Prepared(
        **{split: open_arrow(entry.folder / f"{split}.arrow") for split in SPLITS},
        **{name: account[name] for name in ("rows", "kept", "dropped", "repaired", "not_read", "fingerprint")},
        files=[part.name for part in job.parts],
        parts=_by_path(job.parts, account["parts"]),
        dropped_rows=_dropped_rows(entry, names),
        dialogues=read_dialogues(entry.folder, account["dialogues"]),
        folder=entry.folder,
    )


def _sentence(entry: Entry, names: Mapping[str, str]) -> str:
    """`2354 rows read: 2339 kept, 15 dropped (7 a reply is empty, first at rows.jsonl:12), from the cache`."""
    account = entry.account
    rows, kept, dropped = account["rows"], sum(account["kept"].values()), account["dropped"]
    first = {reason: f"{names[file]}:{line}" for reason, (file, line) in account["first_dropped"].items()}
    most = sorted(dropped, key=lambda reason: -dropped[reason])[:2]
    why = "; ".join(f"{dropped[reason]} {reason}, first at {first[reason]}" for reason in most)
    counts = f"{rows} rows read: {kept} kept, {sum(dropped.values())} dropped" + (f" ({why})" if why else "")
    return counts if entry.is_fresh else f"{counts}, from the cache"


def _by_path(parts: Sequence[Part], counts: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """What became of the rows of each path of the recipe, and what they were read as."""
    sums: dict[tuple[str, str | None], Counter] = {}
    for part, count in zip(parts, counts, strict=True):
        sums.setdefault((part.path, part.source), Counter()).update(count)
    what = ("rows", "kept", "dropped")
    return [{"path": p, "source": s, **{name: count[name] for name in what}} for (p, s), count in sums.items()]


def _dropped_rows(entry: Entry, names: Mapping[str, str]) -> Path:
    """The rows left out, under the names that their files have here: an entry serves a copy of the data as well."""
    if all(before == name for before, name in names.items()):
        return entry.folder / "dropped.jsonl"
    path = make_folder() / "dropped.jsonl"
    with (entry.folder / "dropped.jsonl").open(encoding="utf-8") as old, path.open("w", encoding="utf-8") as new:
        for line in old:
            row = json.loads(line)
            new.write(json.dumps({**row, "file": names[row["file"]]}) + "\n")
    return path


# What is made of the pairs


def sft_rows(pairs: datasets.Dataset) -> datasets.Dataset:
    """The chosen replies of a split as `input_ids` and `labels`, for TRL's `SFTTrainer`.

    Labels are -100 on the prompt, so that only the reply is learned. A reply that is chosen over several others stands
    in several pairs and here once: there are `len(pairs) - len(sft_rows(pairs))` doubles. Of replies with a label the
    good ones are learned. TRL takes these rows with `dataset_kwargs={"skip_prepare_dataset": True}`.
    """
    path, seen = make_folder() / "sft.arrow", set()
    with arrow_writer(path, SFT_COLUMNS) as table:
        for batch in (
            good_replies(pairs).select_columns(["prompt_ids", "chosen_ids"]).with_format("arrow").iter(BATCH_ROWS)
        ):
            inputs, labels = [], []
            for prompt, chosen in zip(id_arrays(batch, "prompt_ids"), id_arrays(batch, "chosen_ids"), strict=True):
                ids = np.concatenate([prompt, chosen])
                key = xxhash.xxh3_128_digest(len(prompt).to_bytes(8, "little") + ids.tobytes())
                if key not in seen:
                    seen.add(key)
                    inputs.append(ids)
                    labels.append(np.concatenate([np.full(len(prompt), -100, np.int32), chosen]))
            table.write_batch(record_batch({"input_ids": inputs, "labels": labels}, SFT_COLUMNS))
    return open_arrow(path)


def good_replies(rows: datasets.Dataset) -> datasets.Dataset:
    """All pairs, or of single replies those that are called good."""
    return rows.select(np.flatnonzero(list(rows["label"]))) if is_labelled(rows) else rows


def is_labelled(rows: datasets.Dataset) -> bool:
    """Whether they are single replies that are called good or bad, and no pairs."""
    return "label" in rows.column_names


def kto_rows(rows: datasets.Dataset, batch: int, seed: int) -> datasets.Dataset:
    """Each reply by itself with its label, for TRL's `KTOTrainer`: a pair is a good reply and a bad one.

    TRL reads them in their order, so that they are shuffled here. Beside each stands another row's reply, the one
    before it in its micro-batch of `batch` rows, as TRL pairs them for its estimate of the KL.
    """
    sides = ("chosen_ids",) if is_labelled(rows) else ("chosen_ids", "rejected_ids")
    count = len(rows)
    order = np.random.default_rng(seed).permutation(count * len(sides))
    others = np.concatenate([np.roll(few, 1) for few in np.split(order, range(batch, len(order), batch))])
    path = make_folder() / "kto.arrow"
    with arrow_writer(path, KTO_COLUMNS) as table:
        for at in range(0, len(order), BATCH_ROWS):
            own, other = order[at : at + BATCH_ROWS], others[at : at + BATCH_ROWS]
            found, beside = rows[own % count], rows[other % count]
            reply = lambda row, number, of: np.array(of[sides[number // count]][row], np.int32)
            columns = {
                "prompt_ids": [np.array(ids, np.int32) for ids in found["prompt_ids"]],
                "completion_ids": [reply(row, number, found) for row, number in enumerate(own)],
                "KL_completion_ids": [reply(row, number, beside) for row, number in enumerate(other)],
                "label": found["label"] if is_labelled(rows) else [number < count for number in own],
            }
            table.write_batch(record_batch(columns, KTO_COLUMNS))
    return open_arrow(path)


def write_pairs(prepared: Prepared, path: Path) -> None:
    """Writes every pair as a JSON line of `split`, `prompt`, `chosen`, `rejected`; source `pairs` reads them again."""
    with writing(path) as lines:
        for split in SPLITS:
            for pair in getattr(prepared, split).select_columns(["prompt", "chosen", "rejected"]):
                lines.write(json.dumps({"split": split, **pair}, ensure_ascii=False).encode() + b"\n")
