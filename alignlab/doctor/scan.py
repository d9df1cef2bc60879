"""What a function makes of all pairs, a thousand at a time: by several processes where they pay, and in order.

Each batch is worked on alone, so that the results do not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from alignlab.data.preparation import BATCH_ROWS, spare_processes
from alignlab.data.prepare import Prepared
from alignlab.data.splits import SPLITS

SERIAL_PAIRS = 5000  # up to which one process is done before others have begun
MOST_PROCESSES = 2  # what they hold in memory counts

T = TypeVar("T")
Columns = dict[str, list[Any]]
Work = Callable[[Columns], T]  # defined in a module: processes find it by its name, and its arguments are pickled


def scan(prepared: Prepared, columns: Sequence[str], work: Work[T]) -> Iterator[tuple[str, int, T]]:
    """Of each batch its split, the number of its first pair there, and what `work` makes of its columns."""
    processes = spare_processes(MOST_PROCESSES) if sum(prepared.kept.values()) > SERIAL_PAIRS else 1
    if processes == 1:
        for split, start, batch in prepared.batches(columns):
            yield split, start, work(batch)
        return
    places = [(split, start) for split in SPLITS for start in range(0, len(getattr(prepared, split)), BATCH_ROWS)]
    context = multiprocessing.get_context("fork")  # the pairs are mapped into memory once
    with ProcessPoolExecutor(processes, context, _begin, (prepared, columns, work)) as pool:
        try:
            for place, found in zip(places, pool.map(_work_at, places), strict=True):
                yield *place, found
        finally:
            pool.shutdown(cancel_futures=True)


_task: tuple[Prepared, Sequence[str], Work[Any]]  # of a process that helps


def _begin(*task: Any) -> None:
    global _task
    _task = task


def _work_at(place: tuple[str, int]) -> Any:
    prepared, columns, work = _task
    split, start = place
    rows = getattr(prepared, split).select_columns(list(columns))
    return work(rows[start : start + BATCH_ROWS])
