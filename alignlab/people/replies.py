"""What people vote on: replies generated beforehand, by the code and the cache with which runs are evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from alignlab.errors import DataError
from alignlab.evaluation.candidates import ModelSet, choose_models
from alignlab.evaluation.evaluator import Evaluator, Options
from alignlab.people.ballots import Match
from alignlab.runs.run import Run

log = logging.getLogger(__name__)


def line_up_voted(runs: Sequence[Run]) -> ModelSet:
    """Of one run what it started from, and itself; several runs as they are. Their names are those of `eval`."""
    lineup = choose_models(runs)
    return ModelSet(lineup.candidates[-2:], lineup.against) if len(runs) == 1 else lineup


def make_matches(runs: Sequence[Run], prompts: Sequence[Path], most: int) -> list[Match]:
    """Every two models' replies to the first `most` prompts, held out or of each file; equal replies are left out.

    They are sampled in whole batches, as an evaluation with its defaults samples them: the two share their replies.
    """
    batch = Options.batch_size
    options = Options(prompts=prompts, judge="none", replies=-(-most // batch) * batch)
    evaluator = Evaluator(line_up_voted(runs), options)
    found = []
    for asked in evaluator.prompt_files() if prompts else [evaluator.held_out]:
        replies = evaluator.replies_to(asked)
        for number, prompt in list(enumerate(asked.prompts))[:most]:
            said = {name: its[number].text for name, its in reversed(replies.items())}  # what was trained last, first
            found += [Match(prompt.transcript, a, b, said[a], said[b]) for a, b in combinations(said, 2)]
    differ = [match for match in found if match.reply_a.strip() != match.reply_b.strip()]
    if len(differ) < len(found):
        log.info(
            "vote: %d of %d pairs are left out, since their replies are equal", len(found) - len(differ), len(found)
        )
    if not differ:
        raise DataError(f"all {len(found)} pairs of replies are equal; vote on other runs or prompts")
    return differ
