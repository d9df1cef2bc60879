"""One preparation: all raw rows → pairs in Arrow files, and every row that is left out counted by reason.

Many rows are prepared by several processes, each a batch at a time; the order of the pairs does not depend on it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from alignlab.data.account import CONFIDENCE, LABEL, OF_THE_PAIRS, PAIR_COLUMNS, REPLY_COLUMNS, RowAccount
from alignlab.data.format import ALPACA_HEADING
from alignlab.data.layouts import INVERTED, SAME_SCORE, UNORDERED
from alignlab.data.pairing import (
    EMPTY_PROMPT,
    LONG_PROMPT,
    LONG_REPLY,
    Job,
    PreparedBatch,
    RawRow,
    make_pairs,
    shares_of,
)
from alignlab.data.prepared import Account
from alignlab.data.rows import names_of
from alignlab.data.splits import OTHER, larger_shares
from alignlab.errors import DataError

BATCH_ROWS = 1000  # rows tokenized in one call and written in one piece: what is held in memory
SERIAL_ROWS = 5000  # before others are asked to help: they then begin with the words that these have taught
MOST_PROCESSES = 4  # one reads, writes and counts for all: more would wait for it

PROMPT_CAPS = {"shp": 5}  # pairs of one prompt where the recipe says nothing: SHP's own advice
OTHER_PROMPTS = (
    "its prompts are those that the pairs hold out: bring rows with other prompts, or leave data.sft.path out, and SFT"
    " learns the chosen replies"
)


def prepare_rows(job: Job, folder: Path) -> Account:
    """Prepares all rows into Arrow files in a folder."""
    columns = (PAIR_COLUMNS if job.has_pairs else REPLY_COLUMNS) | (CONFIDENCE if job.has_confidence else {})
    columns |= LABEL if job.has_labels else {}
    caps = [job.section.max_pairs_per_prompt or PROMPT_CAPS.get(part.source) for part in job.parts]
    with _collector_off(), RowAccount(folder, columns, job.parts, job.apart_from) as counts:
        for batch, made in _made(job, _batches(_progress(_read_rows(job, counts)))):
            counts.not_read.update(made.unread)
            for place, reason in made.refused:
                counts.drop(job.parts[batch[place].part], batch[place].row, reason)
            for pair in made.pairs:
                raw = batch[pair.place]
                counts.keep(pair, job.parts[raw.part], raw.row, caps[raw.part])
            counts.flush()
    _check_splits(counts, job)
    return counts.account()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Without Python's search for cycles: rows hold none, and it took a sixth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_rows(job: Job, counts: RowAccount) -> Iterator[RawRow]:
    """Raw rows with the split that they bring, if any; at most `max_pairs` of each part and split."""
    most = job.section.max_pairs
    for number, part in enumerate(job.parts):
        read = Counter()
        for row in part.rows():
            split = part.split_of(row)
            if split != OTHER and (most is None or read[split] < most):
                read[split] += 1
                counts.read(part)
                yield RawRow(number, row, split)


# Processes


def _made(job: Job, batches: Iterator[list[RawRow]]) -> Iterator[tuple[list[RawRow], PreparedBatch]]:
    """Each batch with its pairs, in order."""
    for batch in islice(batches, SERIAL_ROWS // BATCH_ROWS):
        yield batch, make_pairs(batch, job)
    processes = spare_processes()
    first = next(batches, None) if processes > 1 else None
    if first is None:
        for batch in batches:
            yield batch, make_pairs(batch, job)
        return
    context = multiprocessing.get_context("fork")  # the tokenizer and its words need no copying
    with ProcessPoolExecutor(processes, context, _begin, (job,)) as pool:
        waiting = deque([(first, pool.submit(_make, first))])
        try:
            while waiting:
                waiting.extend(
                    (batch, pool.submit(_make, batch)) for batch in islice(batches, 2 * processes - len(waiting))
                )
                batch, future = waiting.popleft()
                yield batch, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def spare_processes(most: int = MOST_PROCESSES) -> int:
    """How many processes may work, this one among them; a process whose children would not be its own has no others."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), most)


_job: Job  # of a process that helps


def _begin(job: Job) -> None:
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along


def _make(batch: list[RawRow]) -> PreparedBatch:
    return make_pairs(batch, _job)


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _progress(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    from huggingface_hub.utils import tqdm

    quiet = os.environ.get("LOCAL_RANK", "0") != "0" or None  # none: shown on a terminal only
    return iter(tqdm(rows, desc="preparing pairs", unit=" rows", leave=False, disable=quiet))


def _check_splits(counts: RowAccount, job: Job) -> None:
    """Raises `DataError` where there is nothing to train on, to choose by or to test on."""
    where, kept = names_of(job.parts), counts.kept.total()
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.dropped.most_common(3)) or "nothing"
    if not counts.rows:
        raise DataError(f"{where}: no rows: the data is empty")
    if not kept:
        raise DataError(f"{where}: not one usable row of {counts.rows}: {reasons}; {_remedy(counts, job)}")
    if empty := [split for split in job.wanted if not counts.kept[split]]:
        raise DataError(
            f"{where}: no {' and no '.join(empty)} rows among {kept} pairs (dropped: {reasons});"
            f" {_larger_shares(counts, job, empty)}"
        )


# What to do about a reason for which most rows are left out; about one of no line here, to look at the columns
REMEDIES = {
    LONG_REPLY: "set data.max_reply_tokens higher, or data.long_replies=cut",
    LONG_PROMPT: "set data.max_prompt_tokens higher",
    UNORDERED: (
        "name what orders them as data.columns: {scores: COLUMN} (the more, the better) or {ranks: COLUMN} (1 is best),"
        " or write data.source=ranked where the best answer stands first"
    ),
    EMPTY_PROMPT: "write data.columns: {prompt: COLUMN} where another column holds it",
    **dict.fromkeys((SAME_SCORE, INVERTED), "data.source=pairs takes such pairs without a look at their scores"),
    ALPACA_HEADING: "data.format=plain takes prompts as they are that stand in Alpaca's sections already",
    **dict.fromkeys(OF_THE_PAIRS.values(), OTHER_PROMPTS),
}


def _remedy(counts: RowAccount, job: Job) -> str:
    most, _ = counts.dropped.most_common(1)[0]
    row = counts.first_dropped[most]
    has = f"{row.file}:{row.line} has {', '.join(row.fields) or 'no field'}"
    if most in REMEDIES:
        return f"{REMEDIES[most]}; {has}"
    reader = next(part.reader for part in job.parts if part.reader)
    needs = f"{job.key}.source={reader.source} needs {reader.layout.holds}"
    return f"{needs}; {has}; {job.key}.columns says which is which"


def _larger_shares(counts: RowAccount, job: Job, empty: list[str]) -> str:
    if "train" in empty and any(reason in OF_THE_PAIRS.values() for reason in counts.dropped):
        return OTHER_PROMPTS
    keys = [key for keys in counts.dialogues.values() for key in keys]
    shares = shares_of(replace(job.parts[0], brought=frozenset()), job.section)
    brought = frozenset().union(*(part.brought for part in job.parts))
    return larger_shares(keys, empty, shares, brought)
