"""KTO and ORPO as runs beside SFT and DPO: what TRL computes, what is measured, from which data, at what cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import alignlab
from alignlab.cli.commands import main
from alignlab.data.prepare import kto_rows
from alignlab.errors import DataError, MachineError, RecipeError
from alignlab.models import load as models
from alignlab.recipe import objectives as stages
from alignlab.recipe.load import load_recipe
from alignlab.reports.summary import summarize
from alignlab.runs.evaluation import read_evaluation
from alignlab.runs.facts import cost_of
from alignlab.runs.run import Run
from alignlab.train.orpo import AlignORPOTrainer
from alignlab.train.stages import prepare_data, train_dpo, train_kto, train_orpo, train_sft
from alignlab.train.trainers import AlignKTOTrainer

OBJECTIVES = """
kto: {max_steps: 6, learning_rate: 1.0e-3, logging_steps: 1, eval_steps: 3, per_device_eval_batch_size: 8}
orpo: {max_steps: 6, learning_rate: 1.0e-3, logging_steps: 1, eval_steps: 3, per_device_eval_batch_size: 8}
"""
PLAIN: dict[str, Any] = {
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "max_length": 128},
    **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "disable_tqdm": True, "eval_strategy": "no"},
}
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def place(folders, of_seconds, tmp_path_factory) -> Path:
    """A folder with the recipe `short` of seconds, and its runs `sft`, `dpo`, `kto` and `orpo`."""
    folder = tmp_path_factory.mktemp("objectives")
    file = folder / "short.yaml"
    file.write_text(of_seconds(folders["llama"]) + OBJECTIVES)
    for train in (train_dpo, train_kto, train_orpo):
        assert train(load_recipe(str(file)), root=folder / "runs").is_finished
    return folder


@pytest.fixture(scope="module")
def pairs(place):
    tokenizer, prepared = prepare_data(load_recipe(str(place / "short.yaml")))
    return tokenizer, prepared.validation


def run_of(place: Path, name: str) -> Run:
    return Run(place / "runs" / "short" / name)


def moved_policy(folders):
    """A policy with an adapter of its own beside the base; equal each time."""
    policy = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="float32")
    torch.manual_seed(1)
    policy = models.add_adapter(policy, load_recipe("tiny", ["model.lora.r=4"]).model)
    return policy


def move(model) -> None:
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if ".default." in name:
            weight.data += 0.1 * torch.randn(weight.shape)


def gradients(trainer, batch) -> tuple[float, list[torch.Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    return loss.item(), [w.grad.clone() for w in trainer.model.parameters() if w.grad is not None]


def equal(ours, theirs) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1] and len(ours[1]) == len(theirs[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours[1], theirs[1], strict=True))
    assert any(a.abs().max() > 1e-4 for a in ours[1])


@pytest.fixture
def kto_trainers(folders, pairs, tmp_path):
    """Ours on the prepared rows, and TRL's own on the same replies as text, one good and one bad for each pair."""
    tokenizer, rows = pairs
    rows = rows.select(range(len(rows) // 2 * 2))
    args = KTOConfig(output_dir=str(tmp_path), **PLAIN)
    prepared = kto_rows(rows, 4, seed=0)
    texts = {
        (tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"])): {"prompt": row["prompt"], "completion": row[side]}
        for row in rows
        for side in ("chosen", "rejected")
    }
    written = [texts[tuple(r["prompt_ids"]), tuple(r["completion_ids"])] | {"label": r["label"]} for r in prepared]
    found = []
    for make, given in ((AlignKTOTrainer, prepared), (KTOTrainer, Dataset.from_list(written))):
        each = {"train_dataset": given, "eval_dataset": given, "processing_class": tokenizer}
        found.append(make(moved_policy(folders), None, args, **each))
        move(found[-1].model)
    return found


def test_loss_and_gradients_of_a_kto_batch_are_those_of_trls_own_trainer(kto_trainers):
    ours, theirs = kto_trainers
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in kto_trainers]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    equal(gradients(ours, batches[0]), gradients(theirs, batches[1]))


def test_trls_estimate_of_the_kl_is_kept_under_its_own_name(kto_trainers):
    """Without samples there is no `eval_kl` of ours; every batch has as many rows, so that TRL's means are exact."""
    found, stock = (trainer.evaluate() for trainer in kto_trainers)
    assert "eval_kl" not in found and stock["eval_kl"] > 0
    assert found["eval_kto_kl"] == pytest.approx(stock["eval_kl"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-5)


def test_kl_of_a_kto_run_is_that_of_its_samples_and_not_trls(place):
    run = run_of(place, "kto")
    evaluations = [row for row in run.metrics() if "eval/loss" in row]
    for row in evaluations:
        drawn = [s["kl"] for s in run.samples() if s["step"] == row["step"] and s["split"] == "validation"]
        assert row["eval/kl"] == pytest.approx(sum(drawn) / len(drawn)) and "eval/kto_kl" in row
    assert evaluations[0]["eval/kl"] == evaluations[0]["eval/kto_kl"] == 0
    assert evaluations[-1]["eval/kl"] != evaluations[-1]["eval/kto_kl"]
    logged = [row for row in run.metrics() if "train/loss" in row]
    assert all("train/kto_kl" in row and "train/kl" not in row for row in logged)


def test_loss_and_gradients_of_an_orpo_batch_are_those_of_trls_own_trainer(folders, pairs, tmp_path):
    tokenizer, rows = pairs
    args = ORPOConfig(output_dir=str(tmp_path), **PLAIN)
    texts = rows.select_columns(["prompt", "chosen", "rejected"])
    found = []
    for make, given in ((AlignORPOTrainer, rows), (ORPOTrainer, texts)):
        trainer = make(moved_policy(folders), args, train_dataset=given, processing_class=tokenizer)
        move(trainer.model)
        found.append(gradients(trainer, trainer.data_collator([trainer.train_dataset[n] for n in range(4)])))
    equal(*found)


def test_a_reply_stands_beside_the_one_before_it_in_its_micro_batch(pairs):
    """10 rows of 5 pairs in batches of 4: (4, 1, 2, 3), (8, 5, 6, 7), (10, 9)."""
    _, rows = pairs
    found = kto_rows(rows.select(range(5)), 4, seed=3).to_dict()
    beside = [found["completion_ids"][n - 1] for n in (4, 1, 2, 3, 8, 5, 6, 7, 10, 9)]
    assert found["KL_completion_ids"] == beside
    assert sum(found["label"]) == 5 and found["label"] != [True] * 5 + [False] * 5
    assert kto_rows(rows.select(range(5)), 4, seed=3).to_dict() == found
    assert kto_rows(rows.select(range(5)), 4, seed=4).to_dict() != found


def test_every_objective_has_the_same_figures_and_says_what_it_is_measured_from(place):
    for name in ("dpo", "kto", "orpo"):
        run = run_of(place, name)
        test, row = run.manifest.test, [row for row in run.metrics() if "eval/loss" in row][-1]
        assert None not in (test.accuracy, test.margin, test.win_rate, test.kl, test.perplexity)
        assert {"eval/rewards/margins", "eval/rewards/chosen", "eval/kl", "eval/perplexity"} <= row.keys()
        assert run.manifest.tokens > 0 and f"{name.upper()}" in summarize(run)
    parent = run_of(place, "kto").manifest.parent
    assert parent.run.endswith("sft") and run_of(place, "orpo").manifest.parent is None
    assert "the base model" in run_of(place, "orpo").manifest.reference


def test_perplexity_of_orpo_and_of_kto_is_that_of_the_held_out_chosen_replies(place, pairs):
    """At step 0 KTO is the SFT model and ORPO the base, whose perplexities SFT's run has at its end and its start."""
    sft, kto, orpo = (run_of(place, name) for name in ("sft", "kto", "orpo"))
    told = [row for row in sft.metrics() if "eval/loss" in row]
    (kept,) = (row for row in told if row["step"] == sft.manifest.best_step)
    assert kto.metrics()[0]["eval/perplexity"] == pytest.approx(kept["eval/perplexity"], rel=1e-4)
    assert orpo.metrics()[0]["eval/perplexity"] == pytest.approx(told[0]["eval/perplexity"], rel=1e-4)


def test_objectives_stand_beside_each_other_with_what_they_cost(place, monkeypatch, capsys):
    """DPO and KTO cost their own steps and those of SFT before them, 6 + 6; ORPO its own 6."""
    monkeypatch.chdir(place)
    assert main(["eval", "short.yaml", "--runs", "sft", "dpo", "kto", "orpo"]) == 0
    found = read_evaluation(place / "runs" / "short" / "eval.json")
    rows = {row.measure: row.values for row in found.table if row.group == "cost of training"}
    steps = {name: of.mean for name, of in rows["steps"].items()}
    assert steps == {"sft": 6, "dpo": 12, "kto": 12, "orpo": 6}
    assert rows["tokens"]["kto"].mean == cost_of(run_of(place, "kto"))["tokens"]
    assert "cost of training" in capsys.readouterr().out
    assert {"dpo", "kto", "orpo"} == {*next(row for row in found.table if row.measure == "KL per reply").values}
    assert main(["compare", "runs/short", "--table", "table.csv"]) == 0
    assert "cost of training" in (place / "table.csv").read_text()


@pytest.mark.parametrize("stage", ["kto", "orpo"])
def test_an_evaluation_of_one_run_compares_it_with_what_it_started_from(stage, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["eval", "short.yaml", "--run", stage, "--limit", "4"]) == 0
    found = read_evaluation(place / "runs" / "short" / stage / "eval.json")
    expected = {"kto": ["base", "sft", "kto"], "orpo": ["base", "orpo"]}[stage]
    assert found.names == expected and found.against == expected[-2]
    assert main(["plan", "short.yaml", "--stage", stage, "--cpu"]) == 0
    assert main(["export", "runs/short", "--run", stage, "--to", f"exported-{stage}", "--rows", "4"]) == 0


# --- thumbs ---


@pytest.fixture
def thumbs(tmp_path, folders, of_seconds):
    """A function: labels → a recipe on rows of one reply with a label each; two rows are of one question."""

    def write(*labels: bool, reply: str = "an answer of some length"):
        rows = [
            {"prompt": f"question number {n // 2}?", "completion": f"{reply} {n}" if reply else "", "label": label}
            for n, label in enumerate(labels)
        ]
        (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = of_seconds(folders["llama"]).replace("source: toy", f"path: {tmp_path / 'thumbs.jsonl'}")
        text = text.replace("toy: {pairs: 96}", "validation_share: 0.2, test_share: 0.2")
        (tmp_path / "thumbs.yaml").write_text(text + OBJECTIVES)
        return load_recipe(str(tmp_path / "thumbs.yaml"))

    return write


def test_kto_learns_from_thumbs_and_sft_from_those_that_are_up(thumbs, tmp_path):
    recipe = thumbs(*[n % 3 > 0 for n in range(90)])
    run = train_kto(recipe, root=tmp_path / "runs")
    test, row = run.manifest.test, [row for row in run.metrics() if "eval/loss" in row][-1]
    assert test.accuracy is None and test.win_rate is None
    assert None not in (test.margin, test.chosen, test.rejected, test.kl, test.perplexity)
    assert row["eval/rewards/margins"] == pytest.approx(row["eval/rewards/chosen"] - row["eval/rewards/rejected"])
    assert test.margin.mean == pytest.approx(test.chosen.mean - test.rejected.mean)
    up = sum(n % 3 > 0 for n in range(90))
    sft = Run(run.path.with_name("sft"))
    assert sft.manifest.steps and sft.manifest.data.kept["train"] < 90
    assert sum(list(prepare_data(recipe, "kto")[1].train["label"])) < up
    found = main(["eval", str(run.path), "--replies", "4"])
    assert found == 0 and {"base", "sft", "kto"} == {*read_evaluation(run.path / "eval.json").names}


def test_dpo_and_orpo_refuse_thumbs(thumbs, tmp_path):
    recipe = thumbs(*[n % 2 > 0 for n in range(40)])
    with pytest.raises(DataError, match="what KTO learns from"):
        prepare_data(recipe)
    with pytest.raises(DataError, match="what KTO learns from"):
        train_orpo(recipe, root=tmp_path / "runs")


@pytest.mark.parametrize(
    ("labels", "reply", "said"),
    [
        ([True] * 40, "good", r"all \d+ replies of the train split are labelled good; bring bad ones too"),
        ([False] * 40, "bad", r"all \d+ replies of the train split are labelled bad; bring good ones too"),
        ([True, False] * 20, "", r"not one usable row of 40: a reply is empty \(40\)"),
    ],
)
def test_labels_that_say_nothing_and_empty_replies_are_refused_in_one_line(labels, reply, said, thumbs, tmp_path):
    for train in (train_sft, train_kto):
        with pytest.raises(DataError, match=said) as error:
            train(thumbs(*labels, reply=reply), root=tmp_path / "runs")
        assert "\n" not in str(error.value)


# --- what is asked for elsewhere ---


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("dpo.loss_type=orpo", "alignlab orpo"),
        ("dpo.loss_type=[sigmoid,kto]", "alignlab kto"),
        ("dpo.loss_type=simpo", "TRL's CPOTrainer"),
        ("kto.train_sampling_strategy=random", "rows are shuffled once"),
        ("kto.per_device_train_batch_size=1", "2 or more"),
        ("kto.loss_type=sigmoid", "expected kto, apo_zero_unpaired"),
        ("orpo.max_completion_length=9", "is set by alignlab"),
        ("kto.btea=0.1", "did you mean 'beta'"),
    ],
)
def test_another_objective_is_told_where_it_is(setting, said):
    with pytest.raises(RecipeError) as error:
        load_recipe("tiny", [setting])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_where_trl_has_orpo_no_longer_a_line_names_the_version_that_has_it(monkeypatch, place):
    monkeypatch.setitem(stages.STAGES, "orpo", replace(stages.STAGES["orpo"], module="trl.experimental.gone"))
    with pytest.raises(MachineError, match=r"has no trl\.experimental\.gone\.ORPOConfig; TRL 1\.16 has it") as error:
        train_orpo(load_recipe(str(place / "short.yaml")), root=place / "gone")
    assert "\n" not in str(error.value)


def test_the_package_has_the_stages_at_its_top():
    assert {"train_kto", "train_orpo"} <= {*alignlab.__all__}
    with pytest.raises(AttributeError, match="train_simpo"):
        _ = alignlab.train_simpo


def test_sft_and_dpo_do_not_depend_on_the_other_objectives_settings(place):
    """A finished run of either is used as it is."""
    recipe = load_recipe(str(place / "short.yaml"), ["kto.beta=0.3", "orpo.beta=0.3"])
    before = run_of(place, "dpo").manifest
    assert train_dpo(recipe, root=place / "runs").manifest == before
