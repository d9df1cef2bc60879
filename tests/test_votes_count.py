"""What votes say: intervals that hold at every look, and figures a reader can count by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from alignlab.people import results
from alignlab.people.results import anytime_interval, count, log_wealth
from alignlab.people.votes import Vote


def vote(number: int, winner: str, left: str = "dpo", voter: str = "Ada", **more) -> Vote:
    return Vote(prompt=f"p{number}", models=("dpo", "sft"), winner=winner, left=left, voter=voter, **more)


def wilson_width(share: float, n: int, z: float = 1.959964) -> float:
    return 2 * z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))


# Shares of win, tie and loss
TRUTHS = [(0.5, 0, 0.5), (0.3, 0.4, 0.3), (0.6, 0.1, 0.3), (0.8, 0, 0.2), (0.9, 0.08, 0.02), (0.97, 0, 0.03)]


def misses(truth, simulations: int, votes: int) -> int:
    """In how many simulations the interval has missed the true mean at one look or more, looking after every vote."""
    values, mean = np.array([1, 0.5, 0]), truth[0] + truth[1] / 2
    drawn = np.random.default_rng(0).choice(3, size=(simulations, votes), p=truth)
    # the gambler's wealth at the true mean alone, vote by vote
    pays = np.log([[b * x / mean + (1 - b) * (1 - x) / (1 - mean) for x in values] for b in results.STRATEGIES])
    found = 0
    for its in drawn:
        each = pays[:, its].cumsum(1)
        found += bool((np.exp(each).mean(0) >= 20).any())
    return found


@pytest.mark.parametrize("truth", TRUTHS[:2])
def test_an_interval_holds_at_every_look(truth):
    """At most 5 % of 200 simulations miss; four standard errors on top for the draw of the simulations."""
    assert misses(truth, 200, 400) / 200 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


@pytest.mark.slow
@pytest.mark.parametrize("truth", TRUTHS)
def test_two_thousand_simulations_of_four_hundred_votes(truth):
    missed = misses(truth, 2000, 400)
    print(f"{truth}: coverage {1 - missed / 2000:.3f}")
    assert missed / 2000 <= 0.05


@pytest.mark.slow
def test_several_votes_on_one_prompt_keep_the_coverage():
    """Four voters on 100 prompts of which each has its own win rate: what is not proved is simulated."""
    draw, missed = np.random.default_rng(1), 0
    for _ in range(300):
        share = draw.beta(1.2, 0.8, size=100)  # mean 0.6
        sums, counts = np.zeros(100), np.zeros(100)
        is_missed = False
        for look, prompt in enumerate(np.tile(np.arange(100), 4)):
            sums[prompt] += draw.random() < share[prompt]
            counts[prompt] += 1
            if look % 20 == 19:
                means = (sums / np.maximum(counts, 1))[counts > 0]
                is_missed |= log_wealth(means.tolist(), np.array([0.6]))[0] >= math.log(20)
        missed += is_missed
    print(f"coverage {1 - missed / 300:.3f}")
    assert missed / 300 <= 0.05


@pytest.mark.parametrize("truth", [*TRUTHS, (1, 0, 0), (0.1, 0.8, 0.1)])
def test_four_hundred_votes_give_at_most_twice_wilsons_width(truth):
    values = [1.0] * round(400 * truth[0]) + [0.5] * round(400 * truth[1])
    values += [0.0] * (400 - len(values))
    low, high = anytime_interval(values)
    assert low <= np.mean(values) <= high
    assert high - low <= 2 * wilson_width(float(np.mean(values)), 400)


def test_an_interval_is_where_the_gambler_is_poor():
    """One win: her wealth is E[b] / m = 1 / 2m, below 20 for m above 1/40."""
    low, high = anytime_interval([1.0])
    assert low == pytest.approx(1 / 40, abs=1 / 1000) and high == 1
    assert log_wealth([1.0], np.array([0.25]))[0] == pytest.approx(math.log(2))


def test_swapping_wins_and_losses_turns_the_interval():
    values = [1.0] * 7 + [0.5] * 2 + [0.0] * 3
    low, high = anytime_interval(values)
    assert anytime_interval([1 - x for x in values]) == pytest.approx((1 - high, 1 - low))


def test_the_figures_of_a_few_votes():
    """Five prompts: two wins, a tie, two bad replies, and one on which two voters differ: (2 + ½ + ½ + ½) / 5."""
    votes = [
        vote(0, "dpo", helpfulness={"dpo": 5, "sft": 1}),
        vote(1, "dpo", left="sft", helpfulness={"dpo": 3}),
        vote(2, "tie"),
        vote(3, "both_bad"),
        vote(4, "sft"),
        vote(4, "dpo", voter="Bo"),
    ]
    found = count(votes, [(votes[0], vote(0, "dpo", left="sft")), (votes[1], vote(1, "sft"))])
    [contest] = found.contests
    assert contest.rate.mean == pytest.approx(0.7) and contest.rate.counts == "2 wins, 3 ties, 0 losses"
    assert (contest.rate.n, contest.votes, contest.both_bad) == (5, 6, 1)
    assert (found.votes, found.voters) == (6, 2)
    assert found.left.mean == 0.5 and found.left.n == 4 and found.steady.mean == 0.5
    assert found.scores["helpfulness"]["dpo"].mean == 4 and found.scores["harmlessness"] == {}
    assert found.elo["sft"].mean == 1000 and found.elo["dpo"].mean > 1000


@pytest.mark.parametrize(
    ("winners", "says"), [(["dpo"] * 20, "dpo is better"), (["sft"] * 20, "sft is better"), (["tie"] * 400, "equal")]
)
def test_voting_may_stop_when_it_is_decided_or_narrow(winners, says):
    [contest] = count([vote(number, winner) for number, winner in enumerate(winners)]).contests
    assert says in contest.verdict and "may stop" in contest.verdict


def test_few_votes_leave_it_open():
    draw = random.Random(0)
    [contest] = count([vote(number, draw.choice(("dpo", "sft"))) for number in range(30)]).contests
    assert contest.verdict.startswith("open")


def test_no_votes_are_no_results():
    found = count([])
    assert (found.votes, found.contests, found.elo, found.left, found.steady) == (0, [], {}, None, None)
