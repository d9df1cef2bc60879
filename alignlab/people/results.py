"""What votes say: win rates whose intervals hold however often one looks, ratings, and how good the votes are."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignlab.people.votes import BOTH_BAD, Vote
from alignlab.text.estimate import LEVEL, Estimate, mean_estimate, share_estimate
from alignlab.text.tables import WinRate

RESAMPLES = 200  # of the ratings' bootstrap: a fifth of a second, in which the server answers more slowly
NARROW = 0.1  # width of an interval at which more votes would change little
GRID = np.arange(1, 2000) / 2000  # means that are tried
STRATEGIES = (1 + np.cos((np.arange(256) + 0.5) * np.pi / 256)) / 2  # Chebyshev nodes: as Beta(½, ½) spreads them


def anytime_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the mean of values in [0, 1] lies at 95 % confidence, at all numbers of values together.

    For a mean m, a gambler puts a share b of all she has on "one" at odds 1/m and the rest on "zero" at 1/(1 − m); a
    value x pays b x/m + (1 − b)(1 − x)/(1 − m), which is 1 on average if m is the mean. Her wealth is then a
    martingale, and reaches 20 with probability at most 1/20, whenever one looks (Ville). The interval holds all m at
    which the average gambler, over b from Beta(½, ½), has less: Cover's universal portfolio (Orabona and Jun, IEEE
    Trans. Inf. Theory 70, 2024; Waudby-Smith and Ramdas, J. R. Stat. Soc. B 86, 2024). The values may depend on each
    other only so that each one's mean, given those before, is the same.
    """
    inside = GRID[log_wealth(values, GRID) < math.log(1 / (1 - LEVEL))]
    if not len(inside):  # the wealth is below 20 between two points of the grid alone
        return max(0.0, np.mean(values) - 1 / 2000), min(1.0, np.mean(values) + 1 / 2000)
    return max(0.0, float(inside[0]) - 1 / 2000), min(1.0, float(inside[-1]) + 1 / 2000)


def log_wealth(values: Sequence[float], means: np.ndarray) -> np.ndarray:
    """The logarithm of what the average gambler against each mean has made of 1."""
    from scipy.special import logsumexp

    found = Counter(values)
    x, n = np.array([*found]), np.array([*found.values()])
    b, m = STRATEGIES[:, None, None], means[None, :, None]
    pays = b * x / m + (1 - b) * (1 - x) / (1 - m)
    return logsumexp((n * np.log(pays)).sum(-1), axis=0) - math.log(len(STRATEGIES))


@dataclass(frozen=True)
class Contest:
    """How often model a's replies won against b's; n counts prompts, and several votes on one are averaged."""

    a: str
    b: str
    rate: WinRate
    votes: int
    both_bad: int

    @property
    def verdict(self) -> str:
        """Whether voting may stop."""
        low, high = self.rate.low or 0.0, self.rate.high or 1.0
        if low > 0.5 or high < 0.5:
            return f"decided: {self.a if low > 0.5 else self.b} is better; voting may stop"
        if high - low <= NARROW:
            return "as good as equal: the interval is narrow enough; voting may stop"
        return "open: more votes are needed"


@dataclass(frozen=True)
class Results:
    votes: int
    voters: int
    contests: Sequence[Contest]
    elo: Mapping[str, Estimate]
    left: Estimate | None  # share of the decided votes that went to the left side; ½ without a position bias
    steady: Estimate | None  # share of the pairs that came again on which the voter said the same
    scores: Mapping[str, Mapping[str, Estimate]]  # helpfulness and harmlessness → model → mean


def count(votes: Sequence[Vote], repeated: Sequence[tuple[Vote, Vote]] = ()) -> Results:
    """What the votes say; `repeated` are pairs of votes of one voter on one pair, with the sides swapped."""
    by_pair: dict[tuple[str, str], list[Vote]] = defaultdict(list)
    for vote in votes:
        by_pair[vote.models].append(vote)
    decided = [float(vote.winner == vote.left) for vote in votes if vote.winner in vote.models and vote.left]
    same = [float(first.winner == again.winner) for first, again in repeated]
    return Results(
        votes=len(votes),
        voters=len({vote.voter for vote in votes}),
        contests=[_contest(*models, its) for models, its in sorted(by_pair.items())],
        elo=_elo(by_pair),
        left=share_estimate(decided) if decided else None,
        steady=share_estimate(same) if same else None,
        scores={name: _scores(votes, name) for name in ("helpfulness", "harmlessness")},
    )


def _by_prompt(votes: Sequence[Vote]) -> dict[str, float]:
    """The mean outcome of each prompt, in the order in which they were first voted on."""
    found: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        found[vote.prompt].append(vote.outcome)
    return {prompt: sum(its) / len(its) for prompt, its in found.items()}


def _contest(a: str, b: str, votes: Sequence[Vote]) -> Contest:
    outcomes = [*_by_prompt(votes).values()]
    wins, losses = sum(y > 0.5 for y in outcomes), sum(y < 0.5 for y in outcomes)
    low, high = anytime_interval(outcomes)
    n, mean = len(outcomes), float(np.mean(outcomes))
    rate = WinRate(mean, None, n, low, high, wins=wins, ties=n - wins - losses, losses=losses)
    return Contest(a, b, rate, len(votes), sum(vote.winner == BOTH_BAD for vote in votes))


def _elo(by_pair: Mapping[tuple[str, str], Sequence[Vote]]) -> dict[str, Estimate]:
    """Ratings as an evaluation makes them; 1000 is a model that the others are compared with, and not the reverse."""
    from alignlab.evaluation.ratings import rate

    if not by_pair:
        return {}
    outcomes = {models: _by_prompt(votes) for models, votes in by_pair.items()}
    prompts = list(dict.fromkeys(prompt for its in outcomes.values() for prompt in its))
    table = {models: [its.get(prompt) for prompt in prompts] for models, its in outcomes.items()}
    firsts, seconds = {a for a, _ in by_pair}, {b for _, b in by_pair}
    found = rate(table, anchor=min(seconds - firsts or seconds), resamples=RESAMPLES)
    return dict(sorted(found.items(), key=lambda item: -item[1].mean))


def _scores(votes: Sequence[Vote], name: str) -> dict[str, Estimate]:
    """The mean score of each model's replies, over prompts."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        for model, score in (getattr(vote, name) or {}).items():
            found[model][vote.prompt].append(score)
    return {m: mean_estimate([sum(its) / len(its) for its in by.values()]) for m, by in sorted(found.items())}
