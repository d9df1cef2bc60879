"""Held-out preference in numbers: loss, margin and accuracy of the implicit reward, by slice, and what length explains.

Everything is a pure function of log-probabilities and counts; figures are over prompts (see `estimates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.evaluation.estimates import clustered, estimate, table_row
from alignlab.evaluation.winrate import length_controlled
from alignlab.text.estimate import Estimate
from alignlab.text.tables import SHARE, Row

GROUP = "held-out preference"


@dataclass(frozen=True)
class Pairs:
    """What is known of the held-out pairs before any model is asked; each a value a pair."""

    prompts: Sequence[str]  # pairs of one prompt are one draw
    turns: np.ndarray  # Human turns of the prompt
    prompt_tokens: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    parts: Sequence[str] | None = None  # the subset that a pair comes from, where the data says so

    @property
    def longer_by(self) -> np.ndarray:
        return self.chosen_tokens - self.rejected_tokens


@dataclass(frozen=True)
class Rewards:
    """The implicit rewards β (log π − log π_ref) of the pairs' replies."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        return self.chosen - self.rejected

    @property
    def correct(self) -> np.ndarray:
        """Whether the chosen reply's reward is strictly larger, as TRL counts it."""
        return (self.margin > 0).astype(float)

    @property
    def loss(self) -> np.ndarray:
        """−log σ(margin), the sigmoid DPO loss, whatever was trained with."""
        return np.logaddexp(0, -self.margin)


def preference_rows(pairs: Pairs, rewards: Mapping[str, Rewards], against: str) -> list[Row]:
    """Rows of the table: the pairs as a whole."""
    n = len(pairs.prompts)
    note = f"{n} pairs of {len(set(pairs.prompts))} prompts; n counts prompts"
    over = lambda values: {name: clustered(values(its), pairs.prompts) for name, its in rewards.items()}
    rows = [
        table_row(
            GROUP, "accuracy", over(lambda r: r.correct), against, unit=SHARE, better="higher", share=True, note=note
        ),
        table_row(GROUP, "margin", over(lambda r: r.margin), against, better="higher"),
        table_row(GROUP, "reward of chosen", over(lambda r: r.chosen), against),
        table_row(GROUP, "reward of rejected", over(lambda r: r.rejected), against),
        table_row(GROUP, "loss", over(lambda r: r.loss), against, better="lower", note="sigmoid; ln 2 before training"),
    ]
    fair = {name: length_controlled(its.correct, pairs.longer_by) for name, its in rewards.items()}
    return [*rows, _equal_length_row(fair)]


def _equal_length_row(fair: Mapping[str, Estimate | None]) -> Row:
    return Row(
        group=GROUP,
        measure="accuracy at equal length",
        unit=SHARE,
        better="higher",
        values={name: its for name, its in fair.items() if its},
        note="logistic fit on the difference in tokens, read at zero; n counts pairs",
    )


@dataclass(frozen=True)
class LengthFacts:
    """How far length alone goes."""

    accuracy: Estimate
    accuracy_of_the_longer: Estimate  # what always preferring the longer reply scores
    prefers_the_longer: Estimate | None  # how often the model does that, where the lengths differ
    accuracy_at_equal_length: Estimate | None
    correlation_of_margin_and_length: float | None


def length_facts(pairs: Pairs, rewards: Rewards) -> LengthFacts:
    longer = (np.sign(pairs.longer_by) + 1) / 2  # ½ where both are equally long
    unequal = pairs.longer_by != 0
    prefers_longer = (rewards.margin > 0) == (pairs.longer_by > 0)
    differ = rewards.margin.std() > 0 and pairs.longer_by.std() > 0
    correlation = float(np.corrcoef(rewards.margin, pairs.longer_by)[0, 1]) if differ else None
    return LengthFacts(
        estimate(clustered(rewards.correct, pairs.prompts), share=True),
        estimate(clustered(longer, pairs.prompts), share=True),
        _where(unequal, prefers_longer.astype(float), pairs, share=True) if unequal.any() else None,
        length_controlled(rewards.correct, pairs.longer_by),
        correlation,
    )


def _where(there: np.ndarray, values: np.ndarray, pairs: Pairs, share: bool = False) -> Estimate:
    """Over the pairs that are there."""
    prompts = [prompt for prompt, kept in zip(pairs.prompts, there, strict=True) if kept]
    return estimate(clustered(values[there], prompts), share)


def subsets(files: Sequence[str], of_pairs: Sequence[int]) -> list[str] | None:
    """Which file each pair comes from, by the part of its path in which files differ; none where all come from one.

    >>> subsets(["hh/helpful-base/test.jsonl", "hh/harmless-base/test.jsonl"], [0, 0, 1])
    ['helpful-base', 'helpful-base', 'harmless-base']
    """
    paths = {number: Path(files[number]).parts for number in set(of_pairs)}
    if len(paths) < 2:
        return None
    same = _as_begins(list(paths.values()))
    behind = _as_begins([path[same:][::-1] for path in paths.values()])
    names = {number: path[same : len(path) - behind] or path for number, path in paths.items()}
    return [Path(*names[number]).as_posix() for number in of_pairs]


def _as_begins(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts all paths begin with alike."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def slices(pairs: Pairs) -> dict[str, dict[str, np.ndarray]]:
    """Which pairs belong to each slice: by turns, by the prompt's length, by which reply is longer, by subset."""
    low, high = np.quantile(pairs.prompt_tokens, (1 / 3, 2 / 3))
    tokens, longer, turns = pairs.prompt_tokens, pairs.longer_by, pairs.turns
    found = {
        "turns": {"1": turns == 1, "2": turns == 2, "3 or more": turns >= 3},
        "prompt tokens": {
            f"at most {low:.0f}": tokens <= low,
            f"{low:.0f} to {high:.0f}": (tokens > low) & (tokens <= high),
            f"more than {high:.0f}": tokens > high,
        },
        "chosen reply": {"longer": longer > 0, "shorter": longer < 0, "as long": longer == 0},
    }
    if pairs.parts is not None:
        parts = np.array(pairs.parts)
        found["subset"] = {part: parts == part for part in sorted(set(pairs.parts))}
    return {name: {value: its for value, its in of.items() if its.any()} for name, of in found.items()}


def slice_rows(pairs: Pairs, rewards: Mapping[str, Rewards]) -> list[dict[str, Any]]:
    """Accuracy and margin of each model on each slice that holds a pair; slices that hold all pairs say nothing."""
    rows = []
    for name, of in slices(pairs).items():
        for value, there in of.items() if len(of) > 1 else ():
            accuracy = {model: _where(there, its.correct, pairs, share=True) for model, its in rewards.items()}
            margin = {model: _where(there, its.margin, pairs) for model, its in rewards.items()}
            counted = {"slice": name, "value": value, "pairs": int(there.sum())}
            rows.append({**counted, "accuracy": accuracy, "margin": margin})
    return rows


def slices_as_table(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The slices' accuracies as rows of the table."""
    return [
        Row(
            group="accuracy by slice",
            measure=f"{row['slice']}: {row['value']}",
            unit=SHARE,
            better="higher",
            values=row["accuracy"],
            note=f"{row['pairs']} pairs",
        )
        for row in rows
    ]


def length_warnings(name: str, facts: LengthFacts) -> list[str]:
    """What the reader of an accuracy should know about length."""
    plain, fair, longer = facts.accuracy, facts.accuracy_at_equal_length, facts.accuracy_of_the_longer
    side = "longer" if longer.mean >= 0.5 else "shorter"
    always, said = max(longer.mean, 1 - longer.mean), []
    if always >= plain.mean > 0.5:
        said.append(
            f"always preferring the {side} reply would be right in {always:.0%} of the held-out pairs, no less often "
            f"than {name}'s implicit reward ({plain.mean:.0%})"
        )
    if fair and plain.low is not None and plain.low > 0.5 >= fair.low:
        said.append(
            f"{name}'s accuracy on held-out pairs ({plain.mean:.0%}) cannot be told from chance at equal length "
            f"({fair.mean:.0%}, {fair.low:.0%} to {fair.high:.0%}): length may be all it has learned"
        )
    return said
