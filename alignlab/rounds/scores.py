"""How good each of several replies to one prompt is, by any judge: its own score, or the share of contests it won."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from alignlab.disk import ResultCache, digest
from alignlab.errors import RecipeError
from alignlab.evaluation.contests import seat_judge
from alignlab.evaluation.judge import KINDS, Contest, Judge, Verdict, judge_contests, read_judge
from alignlab.models.load import weights_hash
from alignlab.recipe.load import Recipe

NOT_ASKED = "not asked"  # a verdict that the budget has left open
AT_ONCE = 64  # contests between two lines of the cache

Scores = Sequence[float] | str  # one for each reply of a prompt, or why there are none


@dataclass(frozen=True)
class Seat:
    """A judge and its name; whether it scores each reply by itself, and by what its scores are known again."""

    name: str
    judge: Judge
    scores_alone: bool = False
    known_by: str | None = None

    def score(self, prompts: Sequence[str], replies: Sequence[Sequence[str]], cache: Path) -> list[Scores]:
        """Of each prompt's replies; what a reward model has scored is in the cache."""
        if not self.scores_alone:
            return _by_contests(self.judge, prompts, replies)
        judge = _remembered(self.judge, ResultCache(cache), self.known_by) if self.known_by else self.judge
        return _one_by_one(judge, prompts, replies)


def judge_of(recipe: Recipe, said: str | Judge | None, url: str | None = None, max_requests: int | None = None) -> Seat:
    """The judge that is asked for as in `eval --judge`, or a judge's own function, of replies to a recipe's prompts.

    `rule` and `reward` score each reply by itself. Any other judge compares every two replies to a prompt, and a
    reply's score is the share of its contests that it won; a tie counts half.
    """
    if said is None or said == "none":
        raise RecipeError(f"pairs need a judge; name one with --judge {KINDS}")
    if said == "rule" and recipe.data.source != "toy":
        raise RecipeError(f"the judge is rule, which knows the toy's dialogues only; name one of {KINDS}")
    if not isinstance(said, str):
        return Seat(getattr(said, "__name__", type(said).__name__), said)
    judge = read_judge(said)
    assert judge is not None
    kind, name = judge
    if kind == "votes":
        raise RecipeError(
            f"{said}: votes are about replies that people have seen; new ones are judged by rule, reward or llm"
        )
    of = seat_judge(judge, (), (), url, max_requests=max_requests)("a", "b")
    if kind == "reward":
        return Seat(said, of, True, weights_hash(Path(name)) if Path(name).is_dir() else name)
    return Seat(said, of, kind == "rule")


# Each reply by itself


def _one_by_one(judge: Judge, prompts: Sequence[str], replies: Sequence[Sequence[str]]) -> list[Scores]:
    """Two replies share a contest, so that each is scored once; an odd one meets itself."""
    two_by_two = [[(its[i], its[min(i + 1, len(its) - 1)]) for i in range(0, len(its), 2)] for its in replies]
    asked = zip(prompts, two_by_two, strict=True)
    verdicts = iter(judge([Contest(prompt, a, b) for prompt, pairs in asked for a, b in pairs]))
    found: list[Scores] = []
    for its, pairs in zip(replies, two_by_two, strict=True):
        both = [value for _ in pairs for value in _values(next(verdicts))]
        found.append(both[: len(its)])
    return found


def _values(verdict: Verdict) -> tuple[float, float]:
    (of_a,), (of_b,) = (verdict.scores[side].values() for side in ("a", "b"))
    return of_a, of_b


def _remembered(judge: Judge, kept: ResultCache, name: str) -> Judge:
    """The same judge, whose scores are in a file of results: it takes up where it was stopped."""

    def judged(contests: Sequence[Contest]) -> list[Verdict]:
        wanted = {digest([name, c.prompt, c.reply_a, c.reply_b]): c for c in contests}
        values = kept.complete(wanted, lambda few: [v.scores for v in judge(few)], at_once=AT_ONCE, about="judging")
        by_key: Mapping[str, Mapping] = dict(zip(wanted, values, strict=True))
        return [Verdict(None, "judged", by_key[digest([name, c.prompt, c.reply_a, c.reply_b])]) for c in contests]

    return judged


# Every two


def _by_contests(judge: Judge, prompts: Sequence[str], replies: Sequence[Sequence[str]]) -> list[Scores]:
    asked = zip(prompts, replies, strict=True)
    verdicts = iter(judge_contests(judge, [Contest(p, a, b) for p, its in asked for a, b in combinations(its, 2)]))
    return [_shares_won(len(its), verdicts) for its in replies]


def _shares_won(count: int, verdicts: Iterator[Verdict]) -> Scores:
    """The scores of a prompt's replies; where a contest has no verdict, how that came."""
    won, missing = [0.0] * count, ""
    for i, j in combinations(range(count), 2):
        verdict = next(verdicts)
        if verdict.outcome is None:
            missing = NOT_ASKED if NOT_ASKED in (missing, verdict.how) else verdict.how
        else:
            won[i] += verdict.outcome
            won[j] += 1 - verdict.outcome
    return missing or [share / (count - 1) for share in won]
