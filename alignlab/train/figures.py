"""The figures of a run on its test split, which neither trained it nor chose its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset

from alignlab.data import toy
from alignlab.data.format import Stops
from alignlab.data.prepare import Prepared, is_labelled
from alignlab.disk import write_lines
from alignlab.measure import heldout
from alignlab.measure.heldout import PairLogps
from alignlab.recipe.load import Recipe
from alignlab.runs.run import Run
from alignlab.text.estimate import mean_estimate
from alignlab.text.tables import WinRate
from alignlab.train.reference import COLUMNS
from alignlab.train.samples import HeldOutPrompts
from alignlab.train.trainers import PreferenceTrainer


def held_out_prompts(recipe: Recipe, pairs: Dataset, split: str, stops: Stops, seed: int) -> HeldOutPrompts:
    """The first `monitor.kl.prompts` different prompts of a split."""
    kl = recipe.monitor.kl
    few = dict(zip(pairs["prompt"], pairs["prompt_ids"], strict=True))
    texts = list(few)[: kl.prompts]
    ids = [few[text] for text in texts]
    return HeldOutPrompts(split, texts, ids, kl.max_new_tokens, stops, kl.batch_size, seed)


def figures_on_test(trainer: PreferenceTrainer, recipe: Recipe, pairs: Prepared, run: Run) -> dict[str, Any]:
    """Estimates over the test pairs, and over replies to the test prompts; `scores.jsonl` has each held-out pair's.

    Single replies with a label have no pairs to rank: their figures are those of good replies and of bad ones.
    """
    has_pairs = not is_labelled(pairs.test)
    scored = {split: _score(trainer, of) for split, of in (("validation", pairs.validation), ("test", pairs.test))}
    if run.is_writer and has_pairs:
        write_lines(run.scores_file, _scores(scored))
    policy, reference = scored["test"]
    assert trainer.samples is not None, "training has drawn some"
    preference = heldout.preference if has_pairs else heldout.preference_by_label
    rewards = preference(policy, reference, trainer.beta)
    found: dict[str, Any] = {name: dataclasses.asdict(of) for name, of in rewards.items()}
    found["perplexity"] = heldout.reply_perplexity(policy)
    found["reference_perplexity"] = heldout.reply_perplexity(reference)
    stops = trainer.samples.prompts.stops
    samples = trainer.samples.on(held_out_prompts(recipe, pairs.test, "test", stops, trainer.args.seed))
    best = trainer.state.best_global_step
    step = trainer.state.global_step if best is None else best
    replies = samples.measure(trainer.model, step, trainer.reference_context())
    found |= {name.removeprefix("eval_"): value for name, value in replies.items()}
    if recipe.data.source == "toy":
        found["win_rate"] = dataclasses.asdict(_toy_win_rate(samples.rows))
    return found


def _score(trainer: PreferenceTrainer, pairs: Dataset) -> tuple[PairLogps, PairLogps]:
    """What policy and reference make of these pairs."""
    policy = trainer.score_pairs(trainer.model, pairs)
    return policy, _reference_logps(trainer, pairs, policy)


def _scores(scored: Mapping[str, tuple[PairLogps, PairLogps]]) -> Iterator[dict[str, Any]]:
    """Of each pair the log-ratio of policy to reference of both replies, in nats."""
    for split, (policy, reference) in scored.items():
        chosen, rejected = policy.chosen_N - reference.chosen_N, policy.rejected_N - reference.rejected_N
        for number, (ours, theirs) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
            yield {"split": split, "pair": number, "chosen": ours, "rejected": theirs}


def _reference_logps(trainer: PreferenceTrainer, pairs: Dataset, policy: PairLogps) -> PairLogps:
    """From the store where they are there, and those of the replies as they are, else from the reference itself."""
    if set(COLUMNS) <= set(pairs.column_names) and getattr(trainer.args, "ld_alpha", None) is None:
        chosen, rejected = (torch.tensor(list(pairs[name])) for name in COLUMNS)
        return PairLogps(chosen, rejected, policy.chosen_tokens_N)
    with trainer.as_reference() as model:
        return trainer.score_pairs(model, pairs)


def _toy_win_rate(samples: list[dict[str, Any]]) -> WinRate:
    """How often the policy's reply beats the reference's by the toy's rule; a tie counts half."""
    scored = [(toy.score(s["prompt"], s["reply"]), toy.score(s["prompt"], s["reference_reply"])) for s in samples]
    outcomes = [0.5 + 0.5 * ((ours > theirs) - (ours < theirs)) for ours, theirs in scored]
    counts = {"wins": outcomes.count(1.0), "ties": outcomes.count(0.5), "losses": outcomes.count(0.0)}
    return WinRate(**vars(mean_estimate(outcomes, share=True)), **counts)
