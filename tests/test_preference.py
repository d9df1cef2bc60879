"""Preference on held-out pairs: the same numbers as the trainer's, slices by hand, and what length explains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignlab.evaluation.preference import (
    Pairs,
    Rewards,
    length_facts,
    length_warnings,
    preference_rows,
    slice_rows,
    slices,
    subsets,
)
from alignlab.measure.heldout import PairLogps, preference

DRAW = np.random.default_rng(1)


def pairs_of(chosen_tokens, rejected_tokens, prompts=None, turns=None, parts=None) -> Pairs:
    n = len(chosen_tokens)
    return Pairs(
        prompts=prompts or [str(i) for i in range(n)],
        turns=np.array(turns if turns is not None else [1] * n),
        prompt_tokens=np.arange(n),
        chosen_tokens=np.array(chosen_tokens),
        rejected_tokens=np.array(rejected_tokens),
        parts=parts,
    )


def by_measure(rows):
    return {row.measure: row for row in rows}


def test_figures_are_those_of_the_trainers_own_functions():
    chosen, rejected = torch.randn(2, 2, 50, dtype=torch.float64)
    tokens = torch.full((50,), 7)
    policy, reference = PairLogps(chosen[0], rejected[0], tokens), PairLogps(chosen[1], rejected[1], tokens)
    theirs = preference(policy, reference, 0.3)
    ours = Rewards((0.3 * (chosen[0] - chosen[1])).numpy(), (0.3 * (rejected[0] - rejected[1])).numpy())
    rows = by_measure(preference_rows(pairs_of([5] * 50, [4] * 50), {"dpo": ours}, "sft"))
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "loss": "loss"}
    for measure, name in names.items():
        found = rows[measure].values["dpo"]
        assert found.mean == pytest.approx(theirs[name].mean) and found.n == 50
    assert rows["margin"].values["dpo"].stderr == pytest.approx(theirs["rewards/margins"].stderr)


def test_pairs_of_one_prompt_are_one_draw():
    rewards = Rewards(np.array([1.0, 1, 0]), np.zeros(3))
    row = by_measure(preference_rows(pairs_of([1] * 3, [2] * 3, ["a", "a", "b"]), {"dpo": rewards}, "sft"))["accuracy"]
    assert row.values["dpo"].n == 2 and row.values["dpo"].mean == pytest.approx(2 / 3)


def test_equal_rewards_are_not_accurate():
    assert Rewards(np.zeros(2), np.zeros(2)).correct.tolist() == [0, 0]


def test_slices_by_hand():
    pairs = pairs_of([3, 1, 2, 2], [1, 3, 2, 1], turns=[1, 2, 3, 4], parts=["x", "y", "x", "x"])
    found = slices(pairs)
    assert {value: its.nonzero()[0].tolist() for value, its in found["chosen reply"].items()} == {
        "longer": [0, 3],
        "shorter": [1],
        "as long": [2],
    }
    assert {value: int(its.sum()) for value, its in found["turns"].items()} == {"1": 1, "2": 1, "3 or more": 2}
    assert {value: int(its.sum()) for value, its in found["subset"].items()} == {"x": 3, "y": 1}
    rewards = Rewards(np.array([1.0, -1, 1, 1]), np.zeros(4))
    rows = {(row["slice"], row["value"]): row for row in slice_rows(pairs, {"dpo": rewards})}
    assert rows["chosen reply", "longer"]["accuracy"]["dpo"].mean == 1 and rows["subset", "y"]["pairs"] == 1


def test_every_slice_of_a_kind_together_is_all_pairs():
    pairs = pairs_of(DRAW.integers(1, 9, 40), DRAW.integers(1, 9, 40), turns=DRAW.integers(1, 5, 40))
    for of in slices(pairs).values():
        assert (sum(its.astype(int) for its in of.values()) == 1).all()


def test_a_slice_that_holds_all_pairs_is_not_shown():
    rows = slice_rows(pairs_of([1, 2], [2, 1]), {"dpo": Rewards(np.ones(2), np.zeros(2))})
    assert "turns" not in {row["slice"] for row in rows}


def test_a_model_that_only_counts_words_is_found_out():
    chosen, rejected = 2 * DRAW.integers(3, 25, 200), 2 * DRAW.integers(1, 22, 200) + 1  # never equally long
    pairs = pairs_of(chosen, rejected)
    facts = length_facts(pairs, Rewards(chosen.astype(float), rejected.astype(float)))
    assert facts.prefers_the_longer.mean == 1 and facts.correlation_of_margin_and_length == pytest.approx(1)
    assert facts.accuracy.mean <= facts.accuracy_of_the_longer.mean
    assert abs(facts.accuracy_at_equal_length.mean - 0.5) < 0.25
    said = " ".join(length_warnings("dpo", facts))
    assert "always preferring the longer reply" in said and "cannot be told from chance at equal length" in said


def test_a_model_that_ignores_length_keeps_its_accuracy_at_equal_length():
    chosen, rejected = DRAW.integers(1, 50, 400), DRAW.integers(1, 50, 400)
    facts = length_facts(pairs_of(chosen, rejected), Rewards((DRAW.random(400) < 0.8).astype(float), np.full(400, 0.5)))
    assert facts.accuracy_at_equal_length.mean == pytest.approx(facts.accuracy.mean, abs=0.02)
    assert length_warnings("dpo", facts) == []


@pytest.mark.parametrize(
    "files, names",
    [
        (["hh/helpful-base/test.jsonl", "hh/harmless-base/test.jsonl"], ["helpful-base", "harmless-base"]),
        (["one.jsonl", "two.jsonl"], ["one.jsonl", "two.jsonl"]),
        (["/data/mine.jsonl", "toy"], ["/data/mine.jsonl", "toy"]),
        (["a/x/1/t.csv", "a/y/1/t.csv", "a/x/2/t.csv"], ["x/1", "y/1", "x/2"]),
    ],
)
def test_a_subset_is_named_by_what_tells_its_file_from_the_others(files, names):
    every = list(range(len(files)))
    assert subsets(files, [*every, 0]) == [*names, names[0]]
    assert subsets(files, [0, 0]) is None, "one file is no slice"
