"""What training will take: counts that a reader can redo."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from alignlab.doctor.costs import PEAK_TFLOPS, UTILIZATION, Rows, costs
from alignlab.recipe.load import load_recipe

ROWS = {"sft": Rows(1000, prompt=100, chosen=50), "dpo": Rows(1000, prompt=100, chosen=50, rejected=30)}


def cost(stage, tmp_path, *overrides, name="mistral"):
    return costs(ROWS, load_recipe(name, overrides), tmp_path)[stage]


def test_tokens_are_those_of_both_texts_and_without_sharing_of_their_prompt_twice(tmp_path):
    """DPO: 1000 · (2·100 + 50 + 30) = 280,000, and a prompt less, 180,000, where it is shared; SFT 1000 · 150."""
    dpo, sft = cost("dpo", tmp_path), cost("sft", tmp_path)
    assert (dpo["tokens"], dpo["tokens_with_shared_prompts"], sft["tokens"]) == (280_000, 180_000, 150_000)


def test_steps_are_whole_and_the_last_may_be_short(tmp_path):
    """mistral's DPO takes 2 · 32 = 64 pairs a step: ⌈1000 / 64⌉ = 16 an epoch."""
    assert (cost("dpo", tmp_path)["rows_a_step"], cost("dpo", tmp_path)["steps"]) == (64, 16)
    assert cost("dpo", tmp_path, "dpo.num_train_epochs=2")["steps"] == 32


def test_max_steps_decides_where_it_is_set(tmp_path):
    found = cost("dpo", tmp_path, "dpo.max_steps=3")
    assert (found["steps"], found["epochs"], found["tokens"]) == (3, 0.19, 3 * 64 * 280)


def test_operations_are_two_a_weight_and_position_of_every_pass(tmp_path):
    """Mistral-7B: 32 · (2·4096² + 2·4096·1024 + 3·4096·14336) = 6,979,321,856 and a head of 4096 · 32000; LoRA with
    checkpointing is a forward, a backward to the inputs, the forward again, and in DPO the reference: 4 passes."""
    weights = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 32000
    found = cost("dpo", tmp_path)
    assert found["operations"] == pytest.approx(2 * weights * 280_000 * 4)
    assert cost("sft", tmp_path)["operations"] == pytest.approx(2 * weights * 150_000 * 3)
    expected = found["operations"] / (PEAK_TFLOPS["A100"] * 1e12 * UTILIZATION) / 3600
    assert found["hours"]["A100"] == pytest.approx(expected, rel=0.05)


def test_an_earlier_run_of_the_stage_gives_its_own_pace(tmp_path):
    recipe = load_recipe("mistral")
    run = tmp_path / recipe.name / "dpo"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text(
        json.dumps({"stage": "dpo", "status": "finished", "training_seconds": 600, "steps": 60})
    )
    found = costs(ROWS, recipe, tmp_path)["dpo"]
    assert found["measured"] == {"run": str(run), "seconds_a_step": 10.0, "hours": pytest.approx(160 / 3600, rel=0.05)}
    assert costs(ROWS, recipe, tmp_path)["sft"]["measured"] is None


def test_a_model_whose_shape_is_not_known_has_steps_and_tokens_all_the_same(tmp_path):
    recipe = load_recipe("mistral")
    unknown = replace(recipe, model=replace(recipe.model, name=str(tmp_path)))
    found = costs(ROWS, unknown, tmp_path)["dpo"]
    assert found["steps"] == 16 and found["operations"] is None and found["why"]
