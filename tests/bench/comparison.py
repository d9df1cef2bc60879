"""One DPO step computed several ways on the same batches: what each takes, and the ratios between them.

A step is the forward and backward of one batch, with the reference's forward where its log-probabilities are not
stored. The ways take turns in random order, batch by batch, in one process. Ratios of time are theirs ÷ ours, so that
above 1 is a win; ratios of positions and of peak memory are ours ÷ theirs, so that below 1 is a win. Peaks are measured
apart from time, with the weights of the reference in memory in every way: of tensors on a CPU, torch's own on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from batches import MEGA_BATCH, Rows, grouped_batches, length, needed_positions, padded_positions, random_batches
from datasets import Dataset
from trl import DPOTrainer

from alignlab.models.packing import PrefixSharing, share_prefixes
from alignlab.train.probe import measured

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 2_000
Way = Callable[[DPOTrainer, Sequence[PrefixSharing]], contextlib.AbstractContextManager]

BOTH = "shared prefixes and a stored reference"
COMPARISONS = {  # variant: theirs, ours, and what is compared
    "shared": ("stock", "shared", "stock TRL; shared prefixes"),
    "shared-stored": ("stock", "shared-stored", f"stock TRL; {BOTH}"),
    "stored": ("stock", "stored", "stock TRL; stock TRL with precompute_ref_log_probs, nothing of ours"),
    "shared-stored-to-stored": ("stored", "shared-stored", f"stock TRL with precompute_ref_log_probs; {BOTH}"),
    "shared-to-grouped": ("grouped", "shared", "stock TRL on length-grouped batches; shared prefixes on random ones"),
    "shared-to-flash": ("flash", "shared", "stock TRL with FlashAttention 2; shared prefixes with SDPA"),
    "shared-stored-to-flash": (
        "flash",
        "shared-stored",
        "stock TRL with FlashAttention 2; shared prefixes with SDPA and a stored reference",
    ),
}


# The ways -----------------------------------------------------------------------


@contextlib.contextmanager
def stock(trainer: DPOTrainer, handles: Sequence[PrefixSharing]) -> Iterator[None]:
    """TRL's own step: the paused handles pass each call on."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle.paused())
        yield


@contextlib.contextmanager
def shared(trainer: DPOTrainer, handles: Sequence[PrefixSharing]) -> Iterator[None]:
    yield


@contextlib.contextmanager
def stored_reference(trainer: DPOTrainer) -> Iterator[None]:
    """`_compute_loss` takes the reference's log-probabilities from the batch."""
    trainer.precompute_ref_logps = True
    try:
        yield
    finally:
        trainer.precompute_ref_logps = False


@contextlib.contextmanager
def stored(trainer: DPOTrainer, handles: Sequence[PrefixSharing]) -> Iterator[None]:
    with stock(trainer, handles), stored_reference(trainer):
        yield


@contextlib.contextmanager
def shared_stored(trainer: DPOTrainer, handles: Sequence[PrefixSharing]) -> Iterator[None]:
    with stored_reference(trainer):
        yield


WAYS: dict[str, Way] = {
    "stock": stock,
    "shared": shared,
    "stored": stored,
    "shared-stored": shared_stored,
    "grouped": stock,  # on other batches
}


# Measuring ----------------------------------------------------------------------


@dataclass
class Found:
    """What each way took so far; the lists are as long as the batches measured."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    positions: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # of one forward, all batches
    peaks: dict[str, float] = field(default_factory=dict)  # bytes, on the batch with the longest pair
    needed: int = 0  # positions that any forward must compute


class Bench:
    """A trainer whose models share prefixes, except in the ways that say otherwise."""

    def __init__(self, trainer: DPOTrainer, ways: Mapping[str, Way]):
        self.trainer, self.ways = trainer, ways
        models = [trainer.model, *([trainer.ref_model] if trainer.ref_model is not None else [])]
        self.handles = [share_prefixes(model) for model in models]
        trainer.model.train()

    def measure(self, rows: Dataset, pairs: int, count: int, found: Found) -> Iterator[str]:
        """Fills `found`, and yields a line for each batch."""
        if len(rows) < (least := MEGA_BATCH * pairs):
            raise SystemExit(f"{len(rows)} pairs are too few: batches of {pairs} need {least}")
        grouped = grouped_batches(rows, pairs, count)
        with only_new_garbage():
            self.step("shared", [grouped[-1][0]])  # is computed both ways
            self._measure_peaks(rows, pairs, found)
            for handle in self.handles:
                handle.standard_positions = handle.computed_positions = 0
            random.Random(0).shuffle(grouped)
            for number, batch in zip(range(count), random_batches(rows, pairs), strict=False):
                self._measure_batch(number, {"grouped": grouped[number]}, batch, found)
                took = (f"{name} {found.seconds[name][-1]:.2f} s" for name in self.ways)
                yield f"batch {number + 1} of {count}: {', '.join(took)}"
        for handle in self.handles:
            assert handle.enabled and not handle.fallbacks, handle.fallbacks

    def _measure_peaks(self, rows: Dataset, pairs: int, found: Found) -> None:
        """Each way's peak on the batch of the mega-batch's longest pair; this warms each up, too."""
        heaviest = max(random_batches(rows, pairs), key=lambda batch: max(map(length, batch)))
        for name in self.ways:
            batch = grouped_batches(rows, pairs, MEGA_BATCH)[0] if name == "grouped" else heaviest
            with measured(self.trainer.model, self.trainer) as took:
                self.step(name, batch)
            found.peaks[name] = took["peak"]

    def _measure_batch(self, number: int, others: Mapping[str, Rows], batch: Rows, found: Found) -> None:
        order = sorted(self.ways)
        random.Random(number).shuffle(order)
        took = {name: self.step(name, others.get(name, batch)) for name in order}
        for name, (seconds, loss) in took.items():  # only here, so that a stopped run has as many of each
            found.seconds[name].append(seconds)
            found.losses[name].append(loss)
            found.positions[name] += padded_positions(others.get(name, batch))
        found.needed += needed_positions(batch)
        share = self.handles[0].computed_positions / self.handles[0].standard_positions
        for name in filter(lambda name: name.startswith("shared"), self.ways):
            found.positions[name] = round(share * found.positions["stock"])

    def step(self, name: str, rows: Rows) -> tuple[float, float]:
        """Wall seconds of one step's forwards and backward, and its loss."""
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
        if "stored" in name:
            logps = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
            batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))
        gc.collect()
        with self.ways[name](trainer, self.handles):
            wait()
            began = time.perf_counter()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            wait()
            seconds = time.perf_counter() - began
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        return seconds, loss.item()


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Collecting garbage passes over what is there already: half a second each time, most of a toy's step."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# What was found -----------------------------------------------------------------


def cells(found: Found) -> dict[str, dict[str, Any]]:
    """By variant, each comparison of which both sides were measured."""
    return {
        variant: cell(found, theirs, ours, what)
        for variant, (theirs, ours, what) in COMPARISONS.items()
        if theirs in found.seconds and ours in found.seconds
    }


def cell(found: Found, theirs: str, ours: str, what: str) -> dict[str, Any]:
    paired = theirs != "grouped"
    mine, others = found.seconds[ours], found.seconds[theirs]
    ratios = [other / one for one, other in zip(mine, others, strict=True)] if paired else resampled(others, mine)
    low, median, high = statistics.quantiles(ratios, n=4)
    losses = zip(found.losses[ours], found.losses[theirs], strict=True)
    return {
        "compared": what,
        "ratio_median": round(median, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "ratio": "seconds for the same batch" if paired else "seconds for as many pairs, batches drawn again",
        "n": len(mine),
        "seconds_median": [round(statistics.median(times), 4) for times in (others, mine)],
        "positions_ratio": round(found.positions[ours] / found.positions[theirs], 4),
        "positions_floor": round(found.needed / found.positions[theirs], 4),
        "loss_difference": max(abs(one - other) for one, other in losses) if paired else None,
        "peak_memory_ratio": round(found.peaks[ours] / found.peaks[theirs], 4),
        "peak_memory_gib": [round(found.peaks[name] / 2**30, 3) for name in (theirs, ours)],
    }


def resampled(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """The ratio of total seconds, for batches of each side drawn again with replacement."""
    generator = random.Random(0)
    total = lambda seconds: sum(generator.choices(seconds, k=len(seconds)))
    return [total(theirs) / total(ours) for _ in range(RESAMPLES)]


def report(
    found: Found, facts: Mapping[str, Any], machine: Mapping[str, Any], folder: Path | None, device: str
) -> None:
    """A line for each cell, and a file in `folder` where there is one; nothing where batches are fewer than two."""
    if min(map(len, found.seconds.values()), default=0) < 2:
        return
    for variant, one in cells(found).items():
        entry = {**facts, "variant": variant, **one, "machine": machine}
        print(line(entry), flush=True)
        if folder:
            folder.mkdir(exist_ok=True)
            name = re.sub("[^a-z0-9]+", "-", f"step {device} {facts['model']} {facts['pairs']} {variant}".lower())
            (folder / f"{name}.json").write_text(json.dumps(entry, indent=2) + "\n")


def line(cell: Mapping[str, Any]) -> str:
    low, high = cell["ratio_quartiles"]
    differ = cell["loss_difference"]
    return (
        f"{cell['model']}, {cell['pairs']} pairs, {cell['variant']}: {cell['ratio_median']:.2f} "
        f"({low:.2f} to {high:.2f}, n={cell['n']}), so {1 / cell['ratio_median']:.0%} of the time; "
        f"{cell['positions_ratio']:.0%} of the positions, {cell['positions_floor']:.0%} must be computed; "
        f"{cell['peak_memory_ratio']:.0%} of the peak memory; "
        + ("other batches" if differ is None else f"loss differs by at most {differ:.1g}")
    )
