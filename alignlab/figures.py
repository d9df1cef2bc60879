"""The figures of a run on its test split, which neither trained it nor chose its checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from datasets import Dataset

from alignlab import heldout, toy
from alignlab.format import stops_of
from alignlab.heldout import PairLogps
from alignlab.measures import Estimate, estimate
from alignlab.recipe import Recipe
from alignlab.reference import COLUMNS
from alignlab.run import Run
from alignlab.samples import HeldOutPrompts, Samples
from alignlab.trainers import AlignDPOTrainer


def held_out_prompts(recipe: Recipe, pairs: Dataset, split: str, seed: int) -> HeldOutPrompts:
    """The first `monitor.kl.prompts` different prompts of a split."""
    kl = recipe.monitor.kl
    few = dict(zip(pairs["prompt"], pairs["prompt_ids"], strict=True))
    texts = list(few)[: kl.prompts]
    ids = [few[text] for text in texts]
    return HeldOutPrompts(split, texts, ids, kl.max_new_tokens, stops_of(recipe.data.format), kl.batch_size, seed)


def figures_on_test(
    trainer: AlignDPOTrainer, recipe: Recipe, pairs: Dataset, run: Run, share: tuple[int, int]
) -> dict[str, Any]:
    """Estimates over the test pairs, and over replies to the test prompts."""
    tokenizer = trainer.processing_class
    policy = heldout.score_pairs(trainer.model, pairs, tokenizer.pad_token_id)
    reference = _reference_logps(trainer, pairs, policy)
    found = {name: dataclasses.asdict(e) for name, e in heldout.preference(policy, reference, trainer.beta).items()}
    found["perplexity"] = heldout.reply_perplexity(policy)
    found["reference_perplexity"] = heldout.reply_perplexity(reference)
    samples = Samples(run, tokenizer, held_out_prompts(recipe, pairs, "test", trainer.args.seed), share)
    best = trainer.state.best_global_step
    step = trainer.state.global_step if best is None else best
    replies = samples.measure(trainer.model, step, trainer.reference_context())
    found |= {name.removeprefix("eval_"): value for name, value in replies.items()}
    if recipe.data.source == "toy" and run.is_writer:
        found["win_rate"] = dataclasses.asdict(_toy_win_rate([row for row in run.samples() if row["split"] == "test"]))
    return found


def _reference_logps(trainer: AlignDPOTrainer, pairs: Dataset, policy: PairLogps) -> PairLogps:
    """From the store where they are there, else from the reference itself."""
    if set(COLUMNS) <= set(pairs.column_names):
        chosen, rejected = (torch.tensor(list(pairs[name])) for name in COLUMNS)
        return PairLogps(chosen, rejected, policy.chosen_tokens_N)
    with trainer.as_reference() as model:
        return heldout.score_pairs(model, pairs, trainer.processing_class.pad_token_id)


def _toy_win_rate(samples: list[dict[str, Any]]) -> Estimate:
    """How often the policy's reply beats the reference's by the toy's rule; a tie counts half."""
    scored = [(toy.score(s["prompt"], s["reply"]), toy.score(s["prompt"], s["reference_reply"])) for s in samples]
    return estimate([0.5 + 0.5 * ((ours > theirs) - (ours < theirs)) for ours, theirs in scored])
