"""Estimates and their intervals: each against an independent computation, and by how often they hold the truth."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from alignlab.text.estimate import Estimate, mean_estimate, share_estimate

WIN_RATES, TIE_RATES = (0.5, 0.7), (0, 0.2, 0.4)


def holds(interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def trinomials(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ways in which n outcomes can be wins, ties and losses."""
    wins, ties = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = wins + ties <= n
    return wins[possible], ties[possible], (n - wins - ties)[possible]


def outcomes_of(wins: int, ties: int, losses: int) -> list[float]:
    return [1.0] * wins + [0.5] * ties + [0.0] * losses


def test_mean_interval_is_scipys_t_interval():
    values = np.random.default_rng(0).normal(3, 2, 17)
    found = mean_estimate(values)
    low, high = stats.t.interval(0.95, 16, values.mean(), stats.sem(values))
    assert (found.low, found.high, found.stderr) == pytest.approx((low, high, stats.sem(values)))


def test_a_single_value_has_no_interval():
    found = mean_estimate([2.0])
    assert (found.mean, found.n, found.stderr, found.low, found.high) == (2.0, 1, None, None, None)
    assert str(found) == found.in_words() == "2 (n=1)"


def test_share_interval_by_hand():
    """Two wins, one loss; with one of each added 1 1 1 0 0: mean 0.6, s² = 5·0.6·0.4/4 = 0.3, s/√5 = 0.245."""
    found = share_estimate([1, 1, 0])
    t = stats.t.ppf(0.975, 4)
    assert found.mean == pytest.approx(2 / 3) and found.n == 3
    assert found.stderr == pytest.approx(math.sqrt(0.3 / 5))
    assert (found.low, found.high) == (max(0.6 - t * math.sqrt(0.06), 0), 1)


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("truth", [*WIN_RATES, 0.9])
@pytest.mark.parametrize("tie_rate", TIE_RATES)
def test_share_interval_covers_exactly(n, truth, tie_rate):
    """The probability of every trinomial sample whose interval holds the truth, summed: no simulation noise."""
    win_rate = truth - tie_rate / 2
    loss_rate = 1 - win_rate - tie_rate
    if loss_rate < 0:
        pytest.skip("no such win rate with so many ties")
    wins, ties, losses = trinomials(n)
    mean = (wins + 1 + ties / 2) / (n + 2)
    variance = ((wins + 1 + ties / 4) / (n + 2) - mean**2) / (n + 1)
    half = stats.t.ppf(0.975, n + 1) * np.sqrt(variance)
    for at in np.random.default_rng(0).integers(0, len(wins), 20):  # the closed form is the function
        found = share_estimate(outcomes_of(wins[at], ties[at], losses[at]))
        assert (found.low, found.high) == pytest.approx((max(mean[at] - half[at], 0), min(mean[at] + half[at], 1)))
    chance = stats.multinomial.pmf(np.stack([wins, ties, losses], -1), n, [win_rate, tie_rate, loss_rate])
    covered = chance[(mean - half <= truth) & (truth <= mean + half)].sum()
    assert covered == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("truth", WIN_RATES)
@pytest.mark.parametrize("tie_rate", TIE_RATES)
def test_share_interval_covers_in_simulation(n, truth, tie_rate):
    draws = np.random.default_rng(0)
    chances = [truth - tie_rate / 2, tie_rate, 1 - truth - tie_rate / 2]
    held = [holds(share_estimate(draws.choice([1, 0.5, 0], n, p=chances)), truth) for _ in range(2000)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 100])
@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_equal_outcomes_never_claim_certainty(n, outcome):
    found = share_estimate([outcome] * n)
    assert found.mean == outcome and holds(found, outcome)
    assert found.high - found.low > 1 / (n + 2) and found.stderr > 0
    if outcome == 1 and n > 1:  # near the exact bound, 0.05 to 0.025 in the tail
        assert stats.beta.ppf(0.01, n, 1) <= found.low + 0.2 / n and found.low <= stats.beta.ppf(0.1, n, 1)


def test_swapping_the_models_mirrors_the_interval():
    outcomes = [1, 1, 0.5, 0, 1, 0.5]
    one, other = share_estimate(outcomes), share_estimate([1 - y for y in outcomes])
    assert (one.mean, one.low, one.high) == pytest.approx((1 - other.mean, 1 - other.high, 1 - other.low))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_an_estimate_is_the_mean_and_its_standard_error(values):
    found = mean_estimate(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_an_estimate_reads_with_its_error_and_n():
    assert str(Estimate(0.6231, 0.0312, 256)) == "0.623 ± 0.031 (n=256)"
    assert str(Estimate(0.6231, 0.0312)) == "0.623 ± 0.031" and str(Estimate(0.6231)) == "0.623"


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (10, 2.262), (250, 1.970), (None, 1.960)])
def test_an_interval_by_the_standard_error_is_students(n, t):
    found = Estimate(5.0, 2.0, n).with_interval()
    assert (found.low, found.high) == pytest.approx((5 - 2 * t, 5 + 2 * t), abs=2e-3)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=60))
def test_the_interval_of_a_share_follows_from_its_mean_error_and_n(outcomes):
    """So that one that was written without its interval is read with the same one."""
    found = share_estimate(outcomes)
    again = Estimate(found.mean, mean_estimate(outcomes).stderr, found.n).with_interval(share=True)
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=1e-6)


def test_an_interval_that_is_there_is_kept():
    measured = Estimate(0.6, 0.1, 9, 0.2, 0.9)
    assert measured.with_interval(share=True) is measured


@pytest.mark.parametrize("unknown", [Estimate(0.6), Estimate(0.6, None, 9), Estimate(0.6, 0.1, 1)])
def test_without_an_error_there_is_no_interval(unknown):
    assert unknown.with_interval().low is None and unknown.with_interval(share=True).high is None
