"""One value a prompt for every figure, so that each has an interval, and a difference of two models a paired one.

A mean over pairs, a ratio of sums, a perplexity, a corpus's share of different n-grams: each is written as values whose
mean is the figure itself and whose scatter is that of the figure (its linearisation, or the jackknife). Values of two
models on the same prompts can then be subtracted. Rows that share a prompt are one draw, not several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from alignlab.measure.quality import grams
from alignlab.text.estimate import Estimate, mean_estimate, share_estimate
from alignlab.text.tables import Row

Values = np.ndarray  # one a prompt


def ratio_values(numerators: Sequence[float], denominators: Sequence[float]) -> Values:
    """Of R = Σ a ÷ Σ b: the values R + (a − R b) ÷ b̄, whose mean is R and whose error is R's (the delta method)."""
    a, b = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    ratio = a.sum() / b.sum()
    return ratio + (a - ratio * b) / b.mean()


def clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> Values:
    """One value a cluster, in order of appearance: their mean is that of all values, their scatter that of clusters."""
    sums, counts = cluster_sums(values, clusters), cluster_sums(np.ones(len(values)), clusters)
    return ratio_values(sums, counts)


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> np.ndarray:
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return np.bincount([number[c] for c in clusters], weights=np.asarray(values, dtype=float), minlength=len(number))


def perplexity_values(logps: Sequence[float], tokens: Sequence[float]) -> Values:
    """Of exp(−Σ log p ÷ Σ tokens): by the chain rule, the perplexity plus itself times the scatter of its logarithm."""
    logs = ratio_values(-np.asarray(logps, dtype=float), tokens)
    perplexity = math.exp(logs.mean())
    return perplexity + perplexity * (logs - logs.mean())


def distinct_values(replies: Sequence[Sequence[int]], n: int) -> Values:
    """Of the share of different n-grams of all replies together: the jackknife's values, moved to that mean.

    Without one reply the different n-grams are fewer by those that stand in no other reply.
    """
    found = [Counter(grams(reply, n)) for reply in replies]
    owners = Counter(gram for counts in found for gram in counts)
    total, different = sum(sum(counts.values()) for counts in found), len(owners)
    share = different / total if total else 1.0
    without = []
    for counts in found:
        left, own = total - sum(counts.values()), sum(owners[gram] == 1 for gram in counts)
        without.append((different - own) / left if left else share)
    values = len(replies) * share - (len(replies) - 1) * np.array(without)
    return values - values.mean() + share


def estimate(values: Sequence[float], share: bool = False) -> Estimate:
    return share_estimate(values) if share else mean_estimate(values)


def table_row(
    group: str,
    measure: str,
    values: Mapping[str, Sequence[float] | None],
    against: str,
    *,
    unit: str = "",
    better: str | None = None,
    share: bool = False,
    note: str = "",
) -> Row:
    """A row of the table: the figure of each model, and the paired change from the model `against`."""
    known = {name: np.asarray(its, dtype=float) for name, its in values.items() if its is not None and len(its)}
    change = {
        name: mean_estimate(its - known[against]) if against in known else None
        for name, its in known.items()
        if name != against
    }
    figures = {name: estimate(its, share) for name, its in known.items()}
    return Row(group=group, measure=measure, unit=unit, better=better, values=figures, change=change, note=note)
