"""Whole runs in this process: which model is trained against which reference, in every way a recipe can ask for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alignlab.disk import seal
from alignlab.errors import ModelError, RunError
from alignlab.models import load as models
from alignlab.models.load import weights_hash
from alignlab.recipe.load import load_recipe
from alignlab.runs.run import Limits, Parent, Run, step_of
from alignlab.train.stages import train_dpo, train_sft
from alignlab.train.trainers import AlignDPOTrainer


@pytest.fixture
def recipe(folders, of_seconds, tmp_path):
    """A function: model name and overrides → a recipe of a few seconds."""

    def load(name: str = "llama", *overrides: str):
        path = tmp_path / f"{name}.yaml"
        path.write_text(of_seconds(folders[name]))
        return load_recipe(str(path), overrides)

    return load


def last_evaluation(run: Run) -> dict[str, float]:
    return [row for row in run.metrics() if "eval/loss" in row][-1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_qlora_trains_evaluates_and_resumes(name, recipe, tmp_path):
    """SFT → DPO in 4-bit; DPO again from its first checkpoint ends with the same weights, bit for bit."""
    quantized = recipe(name, "model.load_in_4bit=true")
    run = train_dpo(quantized, root=tmp_path)
    weights = (run.model / "adapter_model.safetensors").read_bytes()
    metrics = last_evaluation(run)
    assert metrics["eval/rewards/margins"] > 0
    go_back_to_step(3, run)
    again = train_dpo(quantized, root=tmp_path)
    assert (again.model / "adapter_model.safetensors").read_bytes() == weights
    assert last_evaluation(again)["eval/rewards/margins"] == metrics["eval/rewards/margins"]


@pytest.mark.parametrize("lora", ["target_modules=[q_proj,embed_tokens]", "trainable_token_indices=[5,6]"])
def test_adapters_that_trl_does_not_copy_start_as_the_sft_model_and_resume(lora, recipe, tmp_path):
    """TRL copies adapters by a part of their names, which those of embeddings and of trained tokens have not."""
    given = recipe("llama", f"model.lora.{lora}")
    run = train_dpo(given, root=tmp_path)
    first, metrics = run.metrics()[0], last_evaluation(run)
    assert abs(first["eval/rewards/margins"]) < 1e-6 and first["eval/kl"] == 0
    weights = weights_of(run)
    go_back_to_step(3, run)
    again = train_dpo(given, root=tmp_path)
    assert weights_of(again) == weights
    assert last_evaluation(again)["eval/rewards/margins"] == metrics["eval/rewards/margins"]


def go_back_to_step(step: int, run: Run) -> None:
    """Puts a finished run where a kill would have left it."""
    for checkpoint in run.checkpoints.iterdir():
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run.model)
    run.note(status="running")


def test_reference_is_the_sft_adapter(recipe, tmp_path):
    """Before the first step rewards are 0 and the loss ln 2; the perplexity is the one that SFT ended with."""
    run = train_dpo(recipe(), root=tmp_path)
    first = run.metrics()[0]
    assert first["step"] == 0 and abs(first["eval/rewards/margins"]) < 1e-6 and first["eval/kl"] == 0
    assert first["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    sft = Run(run.path.parent / "sft")
    best = min(row["eval/perplexity"] for row in sft.metrics() if "eval/perplexity" in row)
    assert first["eval/perplexity"] == pytest.approx(best, rel=1e-4)
    assert "frozen copy of the adapter" in run.manifest.reference
    assert run.manifest.parent.weights == models.weights_hash(sft.model)


def test_another_sft_model_than_the_one_recorded_is_refused(recipe, tmp_path):
    sft = train_sft(recipe(), root=tmp_path)
    sft.note(probe=[nats * 1.1 for nats in sft.manifest.probe])
    with pytest.raises(ModelError, match="it is not that model; train SFT again"):
        train_dpo(recipe(), root=tmp_path)


def test_a_policy_that_is_not_the_sft_model_is_refused_against_the_base_too(recipe, tmp_path):
    sft = train_sft(recipe(), root=tmp_path)
    sft.note(probe=[nats * 1.1 for nats in sft.manifest.probe])
    with pytest.raises(ModelError, match=r"the policy gives replies .* where the SFT run gave .* train SFT again"):
        train_dpo(recipe("llama", "model.reference=base"), root=tmp_path)


def test_the_base_in_place_of_an_sft_model_that_is_near_to_it_is_refused(recipe, tmp_path, monkeypatch):
    """Two steps at a small rate change a reply by a thousandth; the copy of the adapter is lost on purpose."""
    near = recipe("llama", "sft.learning_rate=1e-3", "sft.max_steps=2", "sft.eval_steps=1")
    sft = train_sft(near, root=tmp_path)
    changed = sum(abs(a - b) for a, b in zip(sft.manifest.probe, sft.manifest.base_probe, strict=True))
    assert 0 < changed < 0.005 * abs(sum(sft.manifest.probe))
    settle = models.settle_adapters

    def lose_the_copy(model, section, adapter=None):
        settle(model, section, adapter)
        for name, weight in model.named_parameters():
            if ".lora_B.ref." in name:
                weight.data.zero_()

    monkeypatch.setattr(models, "settle_adapters", lose_the_copy)
    with pytest.raises(ModelError, match=r"the reference gives replies .* it is not that model"):
        train_dpo(near, root=tmp_path)


@pytest.mark.parametrize("setting", ["use_weighting=true", "loss_weights=[0.5]", "f_divergence_type=js_divergence"])
def test_other_losses_than_the_plain_one_are_not_taken_for_a_wrong_reference(setting, recipe, tmp_path):
    """Weighted by WPO or by a single weight, the loss of equal models is not ln 2; their rewards are 0 all the same."""
    run = train_dpo(recipe("llama", f"dpo.{setting}", "dpo.max_steps=1", "dpo.eval_steps=1"), root=tmp_path)
    assert run.is_finished and abs(run.metrics()[0]["eval/rewards/margins"]) < 1e-6


def test_reference_base_is_the_bare_base(recipe, tmp_path):
    """Against the base the policy, which starts as the SFT model, has rewards from the start."""
    run = train_dpo(recipe("llama", "model.reference=base"), root=tmp_path)
    first = run.metrics()[0]
    assert abs(first["eval/rewards/chosen"]) > 0.1 and first["eval/kl"] > 0
    assert run.manifest.reference.startswith("the base model")


def test_model_start_takes_the_place_of_the_sft_run(recipe, tmp_path):
    sft = train_sft(recipe(), root=tmp_path)
    run = train_dpo(recipe("llama", f"model.start={sft.model}"), root=tmp_path)
    assert abs(run.metrics()[0]["eval/rewards/margins"]) < 1e-6
    assert run.manifest.parent == Parent(start=str(sft.model), weights=weights_hash(sft.model))


def test_a_start_whose_weights_have_changed_is_refused(recipe, tmp_path):
    """The folder is the same, trained again, and the reference would be another: nothing goes on in silence."""
    sft = train_sft(recipe(), root=tmp_path)
    from_there = recipe("llama", f"model.start={sft.model}", "dpo.max_steps=2", "dpo.eval_steps=1")
    train_dpo(from_there, root=tmp_path)
    double_the_weights(sft.model / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors has changed since it was written; bring it back"):
        train_dpo(from_there, root=tmp_path)
    seal(sft.model)
    with pytest.raises(RunError, match=r"was made from something else: start weights was '\w+', is '\w+'; bring"):
        train_dpo(from_there, root=tmp_path)


def double_the_weights(file: Path) -> None:
    save_file({name: 2 * weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture
def own(folders, of_seconds, tmp_path):
    """A recipe whose model, chat template and rows are files of its own, in `tmp_path`."""
    shutil.copytree(folders["llama"], tmp_path / "base")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [{"prompt": f"What is {n}?", "chosen": f"{n}, a number.", "rejected": "No."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data: {{format: chat, path: {tmp_path}/rows.jsonl, max_prompt_tokens: 80, max_reply_tokens: 48}}"
    lines = of_seconds(tmp_path / "base").splitlines()
    (tmp_path / "own.yaml").write_text("\n".join(data if line.startswith("data:") else line for line in lines))
    return load_recipe(str(tmp_path / "own.yaml"), ["sft.max_steps=2", "sft.eval_steps=1"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: without_the_last_row(folder / "rows.jsonl"), "data was"),
        (lambda folder: double_the_weights(folder / "base" / "model.safetensors"), "base weights was"),
        (lambda folder: other_template(folder / "base" / "chat_template.jinja"), "chat template was"),
        (lambda folder: other_end(folder / "base" / "generation_config.json"), "stops was ['<eos>'"),
    ],
    ids=["data", "base weights", "chat template", "stops"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_made_from_something_else_is_refused_and_keeps_its_facts(finished, change, said, own, tmp_path):
    run = train_sft(own, root=tmp_path)
    if not finished:
        run.note(status="stopped")
    made_from = run.manifest.made_from
    change(tmp_path)
    with pytest.raises(RunError, match=r"/own/sft-.* was made from something else: ") as refused:
        train_sft(own, root=tmp_path)
    assert said in str(refused.value) and str(refused.value).endswith("or train it again (alignlab sft --force)")
    with pytest.raises(RunError, match=r"/own/sft-.* was made from something else: "):
        train_dpo(own, root=tmp_path)
    assert run.manifest.made_from == made_from and run.manifest.data.fingerprint == made_from["data"]
    assert train_sft(own, root=tmp_path, force=True).manifest.made_from != made_from


def other_end(file: Path) -> None:
    """One at which `generate` ends a reply besides the EOS."""
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "eos_token_id": [facts["eos_token_id"], 7]}))


def without_the_last_row(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def other_template(file: Path) -> None:
    """One that writes every dialogue as before, and another word only where somebody calls a tool."""
    file.write_text(file.read_text() + "{% if tools %}tools{% endif %}")


def test_a_full_model_as_start_gets_a_fresh_adapter_and_is_the_reference(recipe, folders, tmp_path):
    run = train_dpo(recipe("llama", f"model.start={folders['llama']}"), root=tmp_path)
    assert abs(run.metrics()[0]["eval/rewards/margins"]) < 1e-6
    assert "switched off" in run.manifest.reference


def test_full_fine_tuning_keeps_a_second_copy_as_reference(recipe, tmp_path):
    full = recipe("gpt2", "model.lora=null", "sft.learning_rate=1e-3", "dpo.learning_rate=1e-4")
    run = train_dpo(full, root=tmp_path)
    first, last = run.metrics()[0], last_evaluation(run)
    assert abs(first["eval/rewards/margins"]) < 1e-6 and last["eval/rewards/margins"] > 0
    assert "second, frozen copy" in run.manifest.reference
    assert AutoModelForCausalLM.from_pretrained(run.model).dtype == torch.float32


KINDS = ["model.lora.r=4", "model.lora=null", "model.lora.target_modules=[q_proj,embed_tokens]"]
AGAINST_BASE = ["model.reference=base", "model.lora.use_dora=true model.reference=base"]


@pytest.mark.parametrize("how", [*KINDS, *AGAINST_BASE])
def test_where_no_checkpoint_is_inside_the_limits_the_reference_is_kept(how, recipe, tmp_path):
    """A KL limit that the first step passes: the run ends at its first evaluation, with what it is compared with."""
    run = train_dpo(recipe("llama", *how.split(), "monitor.max_kl=1e-7", "monitor.action=stop"), root=tmp_path)
    manifest = run.manifest
    assert manifest.status == "finished" and (manifest.steps, manifest.best_step) == (3, 0)
    assert manifest.stop_reason.startswith("stopped at step 3: the policy is")
    assert manifest.stop_reason.endswith("no checkpoint was inside the limits, so the reference itself is kept")
    (warning,) = [w for w in manifest.warnings if w.guard == "kl"]
    assert warning.step == 3 and "dpo.beta" in warning.message
    assert manifest.test.kl == 0 and manifest.test.margin.mean == pytest.approx(0, abs=1e-5)
    if how not in AGAINST_BASE:
        assert weights_of(run) == weights_of(Run(Path(manifest.parent.run)))


def weights_of(run: Run) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.model.glob("*.safetensors"))]


def test_a_run_that_only_warns_goes_on_and_says_each_thing_once(recipe, tmp_path):
    run = train_dpo(recipe("llama", "monitor.max_kl=1e-7"), root=tmp_path)
    assert run.manifest.steps == 6 and run.manifest.best_step in (3, 6)
    assert [w.guard for w in run.manifest.warnings].count("kl") == 1
    assert run.manifest.limits == Limits(max_kl=1e-7, max_accuracy=0.95, action="warn")


def test_the_best_checkpoint_is_chosen_among_those_inside_the_limits(recipe, tmp_path):
    """Between the KL of the first evaluation and that of the second: the first is kept, and training ends."""
    free = train_dpo(recipe("llama"), root=tmp_path, name="free")
    first, second = (row["eval/kl"] for row in free.metrics() if row.get("eval/kl"))
    assert first < second
    limit = f"monitor.max_kl={(first + second) / 2:.6f}"
    run = train_dpo(recipe("llama", limit, "monitor.action=stop", "dpo.max_steps=6"), root=tmp_path, name="stopped")
    kl = [row for row in run.metrics() if "eval/kl" in row]
    if kl[-1]["eval/kl"] - 2 * kl[-1]["eval/kl_stderr"] > (first + second) / 2:  # beyond the noise of four replies
        assert run.manifest.best_step == 3 and "inside the limits, step 3" in run.manifest.stop_reason
    else:
        assert "stopped at" not in run.manifest.stop_reason


def test_the_adapter_stays_in_float32_under_bfloat16(recipe, tmp_path):
    from safetensors.torch import load_file

    run = train_dpo(recipe("llama", "model.dtype=bfloat16", "model.load_in_4bit=true"), root=tmp_path)
    assert abs(run.metrics()[0]["eval/rewards/margins"]) < 1e-6
    assert {t.dtype for t in load_file(run.model / "adapter_model.safetensors").values()} == {torch.float32}


def test_a_finished_run_is_not_trained_again(recipe, tmp_path):
    run = train_sft(recipe(), root=tmp_path)
    before = {f: f.stat().st_mtime_ns for f in run.path.rglob("*") if f.is_file()}
    train_sft(recipe(), root=tmp_path)
    assert {f: f.stat().st_mtime_ns for f in run.path.rglob("*") if f.is_file()} == before
    train_sft(recipe(), root=tmp_path, force=True)
    assert Path(f"{run.path}.old1").is_dir()


def test_same_seed_same_metrics(recipe, tmp_path):
    rows = [train_sft(recipe(), root=tmp_path / name).metrics() for name in ("one", "two")]
    timed = {"time", "eval/runtime", "eval/samples_per_second", "eval/steps_per_second"}
    one, two = ([{k: v for k, v in row.items() if k not in timed} for row in run] for run in rows)
    assert one == two


def test_one_batch_of_eight_is_eight_batches_of_one(recipe, tmp_path):
    """The sigmoid loss is a mean over pairs, so that accumulating gradients changes nothing but rounding."""
    train_sft(recipe(), root=tmp_path)
    at_once = train_dpo(recipe("llama", "dpo.per_device_train_batch_size=8"), root=tmp_path)
    one_by_one = recipe("llama", "dpo.per_device_train_batch_size=1", "dpo.gradient_accumulation_steps=8")
    slowly = train_dpo(one_by_one, root=tmp_path, name="slowly")
    for a, b in zip(at_once.metrics(), slowly.metrics(), strict=True):
        assert a.get("train/loss", 0) == pytest.approx(b.get("train/loss", 0), abs=1e-4)
        assert a.get("eval/rewards/margins", 0) == pytest.approx(b.get("eval/rewards/margins", 0), abs=1e-4)


def test_held_out_means_do_not_depend_on_the_batch_size(recipe, tmp_path):
    """60 pairs in batches of 7 leave a last batch of 4, which TRL would count as much as a full one."""
    train_sft(recipe(), root=tmp_path)
    values = []
    for size in (60, 7):
        changed = recipe("llama", f"dpo.per_device_eval_batch_size={size}")
        values.append(last_evaluation(train_dpo(changed, root=tmp_path, name=f"by{size}")))
    for key in (
        "eval/rewards/margins",
        "eval/rewards/accuracies",
        "eval/logps/chosen",
        "eval/entropy",
        "eval/perplexity",
    ):
        assert values[0][key] == pytest.approx(values[1][key], rel=1e-4), key


def test_the_test_figures_are_a_plain_loop_over_the_test_pairs(recipe, tmp_path):
    """Margin, accuracy and loss from the DPO paper's equations, pair by pair, without padding, batches or TRL."""
    from peft import PeftModel

    from alignlab.train.stages import prepare_data

    quick = recipe()
    run = train_dpo(quick, root=tmp_path)
    _, pairs = prepare_data(quick)
    load = lambda folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(quick.model.name), folder
    ).eval()
    policy, reference = load(run.model), load(run.path.parent / "sft" / "model")
    margins = []
    for pair in pairs.test:
        reward = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            nats = [plain_logp(m, ids, len(pair["prompt_ids"])) for m in (policy, reference)]
            reward[side] = 0.1 * (nats[0] - nats[1])
        margins.append(reward["chosen"] - reward["rejected"])
    margins = torch.tensor(margins)
    test = run.manifest.test
    assert test.margin.mean == pytest.approx(margins.mean().item(), abs=1e-5)
    assert test.accuracy.mean == (margins > 0).double().mean().item()
    assert test.loss.mean == pytest.approx(-torch.sigmoid(margins).log().mean().item(), abs=1e-5)


@torch.no_grad()
def plain_logp(model, ids, prompt: int) -> float:
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return sum(logps[i - 1, ids[0, i]].item() for i in range(prompt, ids.shape[1]))


def test_max_length_above_the_positions_is_refused(recipe, tmp_path):
    with pytest.raises(ModelError, match="the model has 128 positions"):
        train_sft(recipe("gpt2", "data.max_prompt_tokens=200"), root=tmp_path)


def test_a_step_that_moves_nothing_is_refused(recipe, tmp_path):
    """A learning rate below what float32 can add to a weight: training would go on for hours and change nothing."""
    with pytest.raises(ModelError, match="moved no weight"):
        train_dpo(recipe("llama", "dpo.learning_rate=1e-30"), root=tmp_path)


def test_trl_neither_cuts_nor_drops_after_preparation(recipe, tmp_path, monkeypatch):
    """Every prepared pair reaches the trainer with the ids it had."""
    from alignlab.train.stages import prepare_data

    seen = []
    original = AlignDPOTrainer.__init__
    monkeypatch.setattr(
        AlignDPOTrainer, "__init__", lambda self, *a, **k: (original(self, *a, **k), seen.append(self))[0]
    )
    quick = recipe()
    train_dpo(quick, root=tmp_path)
    _, pairs = prepare_data(quick)
    assert seen[0].train_dataset.select_columns(pairs.train.column_names).to_list() == pairs.train.to_list()
    batch = seen[0].data_collator([pairs.train[0]])
    assert batch["attention_mask"].sum() == sum(
        len(pairs.train[0]["prompt_ids"]) + len(pairs.train[0][side]) for side in ("chosen_ids", "rejected_ids")
    )


def test_recipe_in_the_run_directory_repeats_the_run(recipe, tmp_path):
    run = train_sft(recipe(), root=tmp_path)
    again = load_recipe(str(run.recipe_file))
    assert dataclasses.replace(again, name="x", path=Path(), sources={}) == dataclasses.replace(
        recipe(), name="x", path=Path(), sources={}
    )
