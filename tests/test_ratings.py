"""Bradley–Terry ratings: against a plain maximum of the likelihood, and where a textbook fit has none."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from scipy.optimize import minimize

from alignlab.evaluation.ratings import rate
from alignlab.evaluation.winrate import share_estimate

ELO = 400 / math.log(10)


def test_two_models_rating_is_the_win_rate_in_other_words():
    """69.5 wins of 99, and one draw more: 70 of 100, odds of 7 to 3, 400 log₁₀(7/3) = 147 points."""
    found = rate({("dpo", "sft"): [1] * 69 + [0.5] + [0] * 29}, "sft")
    assert found["dpo"].mean == pytest.approx(1000 + 400 * math.log10(7 / 3))
    assert (found["sft"].mean, found["sft"].low, found["sft"].high) == (1000, 1000, 1000)
    assert found["dpo"].n == 99


def test_ratings_maximize_the_likelihood():
    """Four models with three gaps in the comparisons, against scipy on the plain sum of log-probabilities."""
    draws, strength = np.random.default_rng(0), dict(zip("abcd", (0, 0.4, 0.7, 2.0), strict=True))
    pairs = [("a", "b"), ("c", "a"), ("b", "d"), ("c", "d"), ("d", "a")]
    chance = lambda a, b: 1 / (1 + math.exp(strength[b] - strength[a]))
    outcomes = {(a, b): list((draws.random(80) < chance(a, b)).astype(float)) for a, b in pairs}
    outcomes["c", "a"][:30] = [None] * 30
    outcomes["b", "d"][:9] = [0.5] * 9

    def loss(free):
        beta = dict(zip("abcd", (0, *free), strict=True))
        games = [(beta[a] - beta[b], y) for (a, b), ys in outcomes.items() for y in [*ys, 0.5] if y is not None]
        return sum(y * math.log1p(math.exp(-d)) + (1 - y) * math.log1p(math.exp(d)) for d, y in games)

    expected = minimize(loss, np.zeros(3)).x * ELO
    found = rate(outcomes, "a", resamples=50)
    assert [found[name].mean - 1000 for name in "bcd"] == pytest.approx(expected, abs=0.05)
    assert all(one.low < one.mean < one.high for name, one in found.items() if name != "a")


def test_equal_models_have_equal_ratings():
    found = rate({("a", "b"): [0.5] * 6, ("b", "c"): [1, 0] * 3, ("a", "c"): [0, 1] * 3}, "b", resamples=50)
    assert [one.mean for one in found.values()] == pytest.approx([1000] * 3)


def test_a_model_that_wins_all_has_a_finite_rating_and_an_interval():
    found = rate({("dpo", "sft"): [1.0] * 20, ("sft", "base"): [1.0] * 20, ("dpo", "base"): [1.0] * 20}, "sft")
    assert 1300 < found["dpo"].mean < 2500 and found["dpo"].high - found["dpo"].low > 100
    assert found["base"].mean < 1000 < found["dpo"].low and found["base"].high < 1000


def test_the_interval_of_two_models_agrees_with_the_win_rates():
    outcomes = [1.0] * 50 + [0.5] * 40 + [0.0] * 10
    found, share = rate({("a", "b"): outcomes}, "b")["a"], share_estimate(outcomes)
    expected = [1000 + ELO * math.log(p / (1 - p)) for p in (share.low, share.high)]
    assert [found.low, found.high] == pytest.approx(expected, abs=12)


def test_a_seed_gives_the_same_interval():
    outcomes = {("a", "b"): [1, 0, 0.5, 1, 1, 0]}
    assert rate(outcomes, "b", seed=3, resamples=100) == rate(outcomes, "b", seed=3, resamples=100)


def test_models_that_nothing_links_with_the_anchor_are_left_out_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        found = rate({("dpo", "sft"): [1, 0], ("x", "y"): [1, 1], ("z", "sft"): [None, None]}, "sft", resamples=50)
    assert set(found) == {"dpo", "sft"}
    assert caplog.messages == ["ratings: no judged comparison links x, y, z with sft; left out"]
