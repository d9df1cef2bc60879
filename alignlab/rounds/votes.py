"""Pairs from people's votes: of two replies to one prompt the one that more voters preferred is chosen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from alignlab.data.format import Format
from alignlab.errors import DataError
from alignlab.models.load import weights_hash
from alignlab.recipe.load import Recipe
from alignlab.rounds.pairs import Made, held_out_in
from alignlab.runs.run import Run, finished
from alignlab.train.stages import prepare_data


class Vote(Protocol):
    """What is read of a vote, see `alignlab.people.votes`."""

    @property
    def prompt(self) -> str: ...

    @property
    def models(self) -> tuple[str, str]: ...

    @property
    def replies(self) -> Mapping[str, str]: ...

    @property
    def outcome(self) -> float: ...


def pairs_of_votes(recipe: Recipe, run: Run, votes: Sequence[Vote], judge: str) -> Made:
    """A pair for every two replies on which the voters do not balance; DataError where a prompt is held out."""
    _refuse_held_out(recipe, votes)
    facts = {"run": str(finished(run).path), "weights": weights_hash(run.model), "judge": judge, "seed": None}
    dropped: Counter[str] = Counter()
    outcomes: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for vote in votes:
        if not vote.replies:
            dropped["votes that do not hold the replies"] += 1
            continue
        first, second = (vote.replies[name] for name in vote.models)
        if first <= second:
            outcomes[vote.prompt, first, second].append(vote.outcome)
        else:
            outcomes[vote.prompt, second, first].append(1 - vote.outcome)
    rows: list[dict[str, Any]] = []
    for (prompt, one, other), its in outcomes.items():
        share = sum(its) / len(its)
        if share == 0.5:
            dropped["pairs of replies on which the votes balance"] += 1
            continue
        chosen, rejected = (one, other) if share > 0.5 else (other, one)
        scores = {"score_chosen": max(share, 1 - share), "score_rejected": min(share, 1 - share)}
        meta = {**facts, "votes": len(its)}
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores, "meta": meta})
    counts = {reason: count for reason, count in dropped.items() if count}
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "the file is empty"
        raise DataError(f"{judge}: no vote gave a pair ({why})")
    return Made(rows, str(run.path), judge, len({prompt for prompt, *_ in outcomes}), 2 * len(outcomes), counts)


def _refuse_held_out(recipe: Recipe, votes: Sequence[Vote]) -> None:
    tokenizer, pairs = prepare_data(recipe)
    is_held_out = held_out_in(pairs, Format(recipe.data.format, tokenizer), recipe.data.seed)
    prompts = {vote.prompt for vote in votes}
    if refused := sorted(prompt for prompt in prompts if is_held_out(prompt)):
        raise DataError(
            f"{len(refused)} of {len(prompts)} prompts that were voted on are held out by {recipe.name}, such as "
            f"{' '.join(refused[0].split())[:80]!r}; vote on prompts of your own: alignlab vote --prompts FILE"
        )
