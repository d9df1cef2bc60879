"""Win rates and their intervals: each against an independent computation, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from test_estimate import TIE_RATES, WIN_RATES, holds, outcomes_of

from alignlab.evaluation.winrate import length_controlled, sign_test, win_rate
from alignlab.text.estimate import share_estimate

# Sign test


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 1), (8, 8), (3, 17)])
def test_sign_test_is_the_sum_of_binomial_probabilities(wins, losses):
    """Every split that is no likelier than the one seen: of six coins, five or more alike: 2·(6+1)/64 = 0.219."""
    n = wins + losses
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    assert sign_test(wins, losses) == pytest.approx(sum(p for p in chance if p <= chance[wins] * (1 + 1e-9)))


# Equal length


def test_length_control_with_two_lengths_is_the_table_with_a_half_added():
    """Firth's penalty adds ½ to each cell of a 2 × 2 table (Firth 1993).

    10 replies longer by 5 words, of which 9 win, and 10 shorter by 5, of which 4 win: logits log(9.5/1.5) and
    log(4.5/6.5) at ±tanh(1), so at zero their mean. Its variance is a quarter of the sum of both cells', where a
    cell's is its squared residuals over the square of its information w, and one outcome more is shared out by w.
    """
    outcomes = outcomes_of(9, 0, 1) + outcomes_of(4, 0, 6)
    found = length_controlled(outcomes, [5.0] * 10 + [-5.0] * 10)
    assert logit(found.mean) == pytest.approx((math.log(9.5 / 1.5) + math.log(4.5 / 6.5)) / 2, abs=1e-5)
    shares = np.array([9.5 / 11, 4.5 / 11])
    w = 10 * shares * (1 - shares)
    residuals = np.array([9, 4]) * (1 - shares) ** 2 + np.array([1, 6]) * shares**2
    cells = (residuals + w / w.sum()) * w.sum() / (w.sum() + 1) / w**2
    stderr = math.sqrt(cells.sum() / 4)
    assert (logit(found.high) - logit(found.low)) / 2 == pytest.approx(stats.norm.ppf(0.975) * stderr, rel=1e-4)


def test_length_control_is_a_logistic_regression_where_there_is_much_data():
    """Against unpenalized Newton steps, a plain loop, whose intercept differs by less than 1 / n."""
    outcomes, longer_by = length_biased(np.random.default_rng(0), 5000, 0.6, 0.2, 2.0)
    X, fit = np.column_stack([np.ones(5000), np.tanh(longer_by / longer_by.std())]), np.zeros(2)
    for _ in range(20):
        mean = expit(X @ fit)
        fit = fit + np.linalg.solve((X.T * mean * (1 - mean)) @ X, X.T @ (outcomes - mean))
    found = length_controlled(outcomes, longer_by)
    assert outcomes.mean() > 0.7 and found.mean == pytest.approx(expit(fit[0]), abs=2e-4)
    assert found.mean == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("shift", [0, 0.5, 1, 2])
def test_a_judge_of_length_alone_is_a_tie_at_equal_length(shift):
    """The raw win rate follows length; the length-controlled interval holds ½ though no logistic fit is finite."""
    draws, held = np.random.default_rng(shift == 0), []
    for _ in range(50):
        longer_by = np.round(draws.normal(shift, 1, 100) * 40)
        outcomes = np.where(longer_by > 0, 1.0, np.where(longer_by < 0, 0.0, 0.5))
        assert win_rate(outcomes).mean == pytest.approx((longer_by > 0).mean() + (longer_by == 0).mean() / 2)
        held.append(holds(length_controlled(outcomes, longer_by), 0.5))
    assert np.mean(held) >= 0.94


def test_without_a_difference_in_length_control_changes_nothing():
    outcomes = [1, 1, 0, 0.5]
    assert length_controlled(outcomes, [0, 0, 0, 0]) == share_estimate(outcomes)


def test_a_constant_difference_in_length_cannot_be_controlled_for():
    assert length_controlled([1, 1, 0, 0.5], [3, 3, 3, 3]) is None


def test_length_control_is_symmetric():
    outcomes, longer_by = np.array([1, 1, 0, 0.5, 1, 0, 1]), np.array([3, -2, 5, 8, -9, 1, 0])
    one, other = length_controlled(outcomes, longer_by), length_controlled(1 - outcomes, -longer_by)
    assert (one.mean, one.low, one.high) == pytest.approx((1 - other.mean, 1 - other.high, 1 - other.low), abs=1e-5)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_length_control_of_equal_outcomes_never_claims_certainty(outcome):
    found = length_controlled([outcome] * 20, list(range(-10, 10)))
    assert found.high - found.low > 0.05


def length_biased(draws: np.random.Generator, shape, truth: float, tie_rate: float, slope: float) -> tuple:
    longer_by = draws.normal(0.5 * slope, 1, shape)
    mean = expit(logit(truth) + slope * np.tanh(longer_by))
    ties = np.minimum(tie_rate, 2 * np.minimum(mean, 1 - mean))
    place = draws.random(shape)
    return np.where(place < ties, 0.5, place < ties + mean - ties / 2).astype(float), longer_by


def intervals_at_equal_length(outcomes_SN: np.ndarray, longer_by_SN: np.ndarray) -> np.ndarray:
    """Low and high of S samples at once, shape (2, S): steps to the zero of Firth's modified score, all written out.

    The score is Σ (y − μ + h (½ − μ)) x with h the leverage of each outcome: the derivative of what the function
    minimizes without derivatives.
    """
    x_SN = np.tanh(longer_by_SN / longer_by_SN.std(1, keepdims=True))
    moments = lambda weight_SN: [(weight_SN * x_SN**power).sum(1) for power in range(3)]
    alpha_S, beta_S = np.zeros((2, len(x_SN)))
    for _ in range(50):
        mean_SN = expit(alpha_S[:, None] + beta_S[:, None] * x_SN)
        weight_SN = mean_SN * (1 - mean_SN)
        a, b, c = moments(weight_SN)  # information [[a, b], [b, c]]
        determinant = a * c - b**2
        leverage_SN = weight_SN * (c[:, None] - 2 * b[:, None] * x_SN + a[:, None] * x_SN**2) / determinant[:, None]
        first, second, _ = moments(outcomes_SN - mean_SN + leverage_SN * (0.5 - mean_SN))
        steps = (c * first - b * second) / determinant, (a * second - b * first) / determinant
        alpha_S, beta_S = alpha_S + steps[0], beta_S + steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    else:
        raise AssertionError("the steps do not settle")
    p, q, r = (s + m / a for s, m in zip(moments((outcomes_SN - mean_SN) ** 2), (a, b, c), strict=True))
    variance = (c**2 * p - 2 * b * c * q + b**2 * r) / determinant**2 * a / (a + 1)
    return expit(alpha_S + stats.norm.ppf(0.975) * np.outer([-1, 1], np.sqrt(variance)))


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("truth", WIN_RATES)
@pytest.mark.parametrize("tie_rate", TIE_RATES)
def test_length_controlled_interval_covers_in_simulation(n, truth, tie_rate):
    """In 5,000 comparisons, fitted all at once; the function itself fits some of them, and finds the same."""
    outcomes, longer_by = length_biased(np.random.default_rng(0), (5000, n), truth, tie_rate, 1.5)
    low, high = intervals_at_equal_length(outcomes, longer_by)
    for at in range(0, 5000, 250):
        found = length_controlled(outcomes[at], longer_by[at])
        assert (found.low, found.high) == pytest.approx((low[at], high[at]), abs=1e-5)
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.95, abs=0.015)


# Together


def test_two_identical_models_have_a_win_rate_of_one_half_exactly():
    found = win_rate([0.5] * 8)
    assert found.mean == length_controlled([0.5] * 8, [0] * 8).mean == 0.5
    assert (found.wins, found.ties, found.losses, sign_test(0, 0)) == (0, 8, 0, 1.0)


def test_win_rate_counts_by_hand():
    """3 wins, 2 ties, 1 loss: (3 + 1) / 6; of four decided ones, three or more alike: 2·(4 + 1)/16 = 0.625."""
    found = win_rate([1, 1, 1, 0.5, 0.5, 0])
    assert found.mean == pytest.approx(4 / 6)
    assert (found.wins, found.ties, found.losses, sign_test(3, 1)) == (3, 2, 1, 0.625)
