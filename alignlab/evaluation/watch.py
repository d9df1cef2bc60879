"""What replies look like, whatever a loss or a judge says of them, and when text gets worse; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from alignlab.evaluation.estimates import distinct_values, table_row
from alignlab.measure.quality import grams, repetition
from alignlab.runs.evaluation import LESS_LIKELY, PERPLEXITY
from alignlab.text.estimate import Estimate
from alignlab.text.tables import SHARE, Row, beyond_chance
from alignlab.train.guards import FEWER_ENDS, LESS_DISTINCT, LONGER, MORE_REPEATED

LOOPS = 0.5  # share of repeated 4-grams from which a reply goes round in circles
COPY_TOKENS = 8  # a run of so many tokens that stands in the prompt too is copied
COPIED = 0.5  # share of a reply's runs from which it is a copy
MORE_COPIES = MORE_EMPTY = 0.05  # share of replies
GROUP = "replies"


class Reply(Protocol):
    ids: Sequence[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class TextSigns:
    """What one model's replies look like, a value a reply."""

    tokens: np.ndarray
    ended: np.ndarray
    empty: np.ndarray
    repeated: np.ndarray  # share of 4-grams that stood in the reply before
    loops: np.ndarray
    copied: np.ndarray
    distinct_1: np.ndarray
    distinct_2: np.ndarray
    distinct_3: np.ndarray


def look_at(prompts: Sequence[Sequence[int]], replies: Sequence[Reply]) -> TextSigns:
    ids = [list(reply.ids) for reply in replies]
    repeated = np.array([repetition(reply) for reply in ids])
    return TextSigns(
        tokens=np.array([len(reply) for reply in ids], dtype=float),
        ended=np.array([float(reply.ended) for reply in replies]),
        empty=np.array([float(not reply.text.strip()) for reply in replies]),
        repeated=repeated,
        loops=(repeated >= LOOPS).astype(float),
        copied=np.array([float(copies(p, r) > COPIED) for p, r in zip(prompts, ids, strict=True)]),
        **{f"distinct_{n}": distinct_values(ids, n) for n in (1, 2, 3)},
    )


def copies(prompt: Sequence[int], reply: Sequence[int]) -> float:
    """The share of a reply's runs of eight tokens that stand in the prompt; 0 where it is shorter.

    >>> copies(range(20), [*range(5, 15), 99, 98])
    0.6
    """
    runs, there = grams(list(reply), COPY_TOKENS), set(grams(list(prompt), COPY_TOKENS))
    return sum(run in there for run in runs) / len(runs) if runs else 0.0


def watch_rows(looks: Mapping[str, TextSigns], against: str) -> list[Row]:
    """Rows of the table."""
    measures = (
        ("length", "tokens", "tokens", None, False, ""),
        ("ended by itself", "ended", SHARE, "higher", True, "an EOS or the next turn, not the limit"),
        ("empty", "empty", SHARE, "lower", True, ""),
        ("repeated 4-grams", "repeated", SHARE, "lower", False, "that stood in the same reply before"),
        ("loops", "loops", SHARE, "lower", True, f"replies of which {LOOPS:.0%} of the 4-grams are repeated"),
        (
            "copies of the prompt",
            "copied",
            SHARE,
            "lower",
            True,
            f"most of its runs of {COPY_TOKENS} tokens are there",
        ),
        ("distinct-1", "distinct_1", SHARE, None, False, "over all replies; falls as they grow longer"),
        ("distinct-2", "distinct_2", SHARE, None, False, "as distinct-1"),
        ("distinct-3", "distinct_3", SHARE, None, False, "as distinct-1"),
    )
    return [
        table_row(
            GROUP,
            measure,
            {name: getattr(look, key) for name, look in looks.items()},
            against,
            unit=unit,
            better=better,
            share=share,
            note=note,
        )
        for measure, key, unit, better, share, note in measures
    ]


def what_got_worse(rows: Sequence[Row], name: str, against: str) -> list[str]:
    """The signs, beyond chance and beyond the monitor's thresholds, that a model's replies are worse than before.

    `rows` are those of the table; that of the perplexity of chosen replies counts where it is among them.
    """
    by_measure = {row.measure: row for row in rows}
    before = lambda row: row.values[against].mean
    signs = (
        ("ended by itself", -1, FEWER_ENDS, "replies that end by themselves {0:.0%} → {1:.0%}"),
        ("empty", 1, MORE_EMPTY, "empty replies {0:.0%} → {1:.0%}"),
        ("repeated 4-grams", 1, MORE_REPEATED, "repeated 4-grams {0:.0%} → {1:.0%}"),
        ("copies of the prompt", 1, MORE_COPIES, "replies that copy the prompt {0:.0%} → {1:.0%}"),
        (
            "distinct-2",
            -1,
            (1 - LESS_DISTINCT) * before(by_measure["distinct-2"]),
            "different bigrams {0:.0%} → {1:.0%}",
        ),
        ("length", 1, (LONGER - 1) * before(by_measure["length"]), "length {0:.0f} → {1:.0f} tokens"),
    )
    if dear := by_measure.get(PERPLEXITY):
        limit = (LESS_LIKELY - 1) * before(dear)
        signs += ((PERPLEXITY, 1, limit, "perplexity of the chosen replies {0:.3g} → {1:.3g}"),)
    return [
        text.format(before(by_measure[measure]), by_measure[measure].values[name].mean)
        for measure, worse, limit, text in signs
        if _beyond(by_measure[measure].change.get(name), worse, limit)
    ]


def _beyond(change: Estimate | None, worse: int, limit: float) -> bool:
    """Whether the change is for the worse (its sign) by more than the limit, and its interval does not reach zero."""
    return beyond_chance(change) and worse * change.mean > limit


def worse_text(name: str, against: str, signs: Sequence[str], loss: float | None, loss_before: float) -> list[str]:
    """`Loss falls and quality falls`, where it does; quality alone, where only that falls."""
    if not signs:
        return []
    seen = "; ".join(signs)
    remedy = "stop earlier, or try a larger dpo.beta or a smaller dpo.learning_rate"
    if loss is not None and loss < loss_before:
        return [
            f"loss falls and quality falls: {name}'s held-out DPO loss is {loss:.3g} ({loss_before:.3g} before), while"
            f" its replies are worse than {against}'s: {seen}; {remedy}"
        ]
    return [f"{name}'s replies are worse than {against}'s: {seen}; {remedy}"]
