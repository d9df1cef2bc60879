"""Votes → pairs → DPO on `tiny`: does the run that learned from votes beat the run that was voted on?

    python tests/bench/votes.py [--prompts 1900] [--noise 0.1]

SFT, DPO and DPO at a larger beta answer prompts that training has. The voter is the toy's rule, whose choice is turned
round with probability `noise`. DPO then goes on from the DPO run with the pairs of these votes. It is compared with
that run on held-out prompts, by the rule without noise. SFT and DPO alone are too few to vote on: most pairs of their
replies say again what the DPO run has learned.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from alignlab import make_pairs
from alignlab.data.toy import score
from alignlab.disk import write_lines
from alignlab.evaluation.evaluator import Options, evaluate
from alignlab.people.replies import make_matches
from alignlab.people.votes import Vote, write_votes
from alignlab.recipe.load import load_recipe
from alignlab.runs.evaluation import read_evaluation
from alignlab.train.stages import prepare_data, train_dpo, train_sft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1900)
    parser.add_argument("--noise", type=float, default=0.1)
    args = parser.parse_args()
    recipe, folder = load_recipe("tiny"), Path("runs/tiny")
    sft, dpo = train_sft(recipe), train_dpo(recipe)
    other = train_dpo(load_recipe("tiny", ["dpo.beta=0.3"]), name="dpo-beta0.3")
    _, pairs = prepare_data(recipe)
    prompts = list(dict.fromkeys(pairs.train["prompt"]))[: args.prompts]
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    draw = random.Random(0)
    matches = make_matches([sft, dpo, other], [folder / "prompts.jsonl"], len(prompts))
    votes = [vote(match, draw, args.noise) for match in matches]
    write_votes(folder / "votes.jsonl", votes)
    made = make_pairs(recipe, dpo.path, judge=f"votes:{folder / 'votes.jsonl'}", out=folder / "voted.jsonl").facts
    overrides = [
        f"data.path={(folder / 'voted.jsonl').resolve()}",
        "data.source=pairs",
        "data.test_share=0.1",
        f"model.start={dpo.model}",
    ]
    after = train_dpo(load_recipe("tiny", [*overrides, "dpo.max_steps=100"]), name="voted")
    found = read_evaluation(evaluate([dpo, after], Options(judge="rule")))
    over = found.over("voted", "dpo")
    print(json.dumps({"votes": len(votes), "pairs": len(made.rows), **vars(over)}, default=str))


def vote(match, draw: random.Random, noise: float) -> Vote:
    """What the rule says of two replies, or the opposite."""
    better = score(match.prompt, match.reply_a) - score(match.prompt, match.reply_b)
    names = (match.a, match.b) if draw.random() >= noise else (match.b, match.a)
    winner = "tie" if better == 0 else names[0] if better > 0 else names[1]
    replies = {match.a: match.reply_a, match.b: match.reply_b}
    return Vote(prompt=match.prompt, models=(match.a, match.b), winner=winner, replies=replies)


if __name__ == "__main__":
    main()
