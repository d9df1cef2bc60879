"""Bradley–Terry ratings of several models on the Elo scale; for two models they say the win rate in other words."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from alignlab.errors import lacks
from alignlab.text.estimate import LEVEL, Estimate

log = logging.getLogger(__name__)

ANCHOR = 1000.0
ELO = 400 / np.log(10)  # 400 points more are odds of 10 to 1

Outcomes = Mapping[tuple[str, str], Sequence[float | None]]


def rate(outcomes: Outcomes, anchor: str, *, seed: int = 0, resamples: int = 1000) -> dict[str, Estimate]:
    """Each model's rating, 1000 being the anchor's by definition, with a percentile bootstrap over prompts.

    `outcomes` holds for each pair of models (a, b) what came of each prompt, the same prompts in the same order for
    all pairs: 1, 0, ½, any value between, or none where it was not judged. A tie is half a win for each. Every pair
    that was compared counts as having drawn once more, so that a model that wins all has a finite rating; the
    bootstrap draws from the prompts and from two more, one won by every pair's first model and one by its second, so
    that it has an interval too. A model that no comparison links with the anchor is left out, and named. Without
    evalica, which is optional, there are no ratings.
    """
    if line := lacks("rating models", "judge", "evalica"):
        log.warning("no ratings: %s", line)
        return {}
    from scipy.stats import bootstrap

    linked = _linked(outcomes, anchor)
    pairs = [pair for pair in outcomes if pair[0] in linked]
    models = sorted(linked)
    table = np.array([[np.nan if y is None else y for y in outcomes[pair]] for pair in pairs], dtype=float)
    wider = np.column_stack([table, np.ones(len(pairs)), np.zeros(len(pairs))])
    found = bootstrap(
        (np.arange(wider.shape[1]),),
        lambda prompts: _elo(wider[:, prompts], pairs, models, anchor),
        vectorized=False,
        n_resamples=resamples,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    n = int((~np.isnan(table)).any(0).sum())
    points = _elo(table, pairs, models, anchor)
    return {
        name: Estimate(float(points[i]), float(found.standard_error[i]), n, float(low[i]), float(high[i]))
        for i, name in enumerate(models)
    }


def _elo(table: np.ndarray, pairs: Sequence[tuple[str, str]], models: Sequence[str], anchor: str) -> np.ndarray:
    """Ratings in the order of `models`, from outcomes of shape (pairs, prompts)."""
    from evalica import Winner, bradley_terry

    firsts, seconds = zip(*pairs, strict=True)
    wins, losses = np.nansum(table, 1), np.nansum(1 - table, 1)
    strengths = bradley_terry(
        firsts * 2,
        seconds * 2,
        [Winner.X] * len(pairs) + [Winner.Y] * len(pairs),
        weights=np.concatenate([wins, losses]) + 0.5,
        tolerance=1e-9,
        limit=10_000,
    ).scores
    return ANCHOR + ELO * np.log([strengths[name] / strengths[anchor] for name in models])


def _linked(outcomes: Outcomes, anchor: str) -> set[str]:
    """The models that a chain of judged comparisons connects with the anchor, itself included."""
    judged = [pair for pair, values in outcomes.items() if any(y is not None for y in values)]
    linked = {anchor}
    while more := {name for pair in judged if linked & set(pair) for name in pair} - linked:
        linked |= more
    if apart := sorted({name for pair in outcomes for name in pair} - linked):
        log.warning("ratings: no judged comparison links %s with %s; left out", ", ".join(apart), anchor)
    return linked
