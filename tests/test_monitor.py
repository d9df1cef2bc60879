"""The callbacks and early checks: what is written, what is refused, and a KL that is zero where it must be."""

from __future__ import annotations

import math
import os
import resource

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

from alignlab import monitor
from alignlab.disk import find_damage
from alignlab.errors import ModelError
from alignlab.monitor import (
    EvaluateAtEnd,
    MetricsFile,
    WeightsMove,
    WholeCheckpoints,
    check_reference,
    check_start,
    peak_memory,
    start_peak_memory,
    wandb_run,
)
from alignlab.run import Run

LN2 = math.log(2)


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path / "checkpoints"), use_cpu=True, report_to=[])


# --- memory ---


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux alone forgets a peak")
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about the memory of a process")
def test_each_run_of_a_process_has_its_own_peak():
    """400 MiB are held, and freed; then 50 MiB: the second peak does not show the first."""
    start_peak_memory()
    before = peak_memory()
    held = bytearray(b"x" * (400 << 20))
    assert peak_memory() - before > 380 << 20
    del held
    start_peak_memory()
    before = peak_memory()
    held = bytearray(b"x" * (50 << 20))
    assert 40 << 20 < peak_memory() - before < 200 << 20
    del held


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about the memory of a process")
def test_where_the_peak_cannot_be_forgotten_it_is_that_of_the_whole_process(monkeypatch, tmp_path):
    monkeypatch.setattr(monitor, "PEAK_RESET", tmp_path / "not there" / "clear_refs")
    monkeypatch.setattr(monitor, "PROCESS_STATUS", tmp_path / "status")
    start_peak_memory()
    assert peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the first step ---


def step(callback: WeightsMove, model, args, learning_rate: float) -> None:
    """One step of a real optimizer, as Trainer tells its callbacks of it."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    callback.on_pre_optimizer_step(args, None, None, model=model, optimizer=optimizer)
    optimizer.step()
    callback.on_optimizer_step(args, None, None, model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_moves_weights_passes(dtype, load, args):
    model, callback = load("llama").to(dtype), WeightsMove()
    callback.on_train_begin(args, None, None, model=model)
    step(callback, model, args, learning_rate=0.01)
    step(callback, model, args, learning_rate=0.01)


def test_a_step_that_moves_nothing_is_refused(load, args):
    """A bfloat16 weight of 0.2 has its neighbours 0.001 away: a step of 1e-9 is rounded to none."""
    model, callback = load("llama").to(torch.bfloat16), WeightsMove()
    callback.on_train_begin(args, None, None, model=model)
    with pytest.raises(ModelError) as error:
        step(callback, model, args, learning_rate=1e-9)
    assert str(error.value) == (
        f"a step at learning rate 1e-09 moved no weight in {len(list(model.parameters()))} trainable tensors; "
        f"raise the learning rate, or keep trainable weights in float32"
    )


def test_steps_at_learning_rate_zero_are_waited_out(load, args):
    model, callback = load("llama").to(torch.bfloat16), WeightsMove()
    callback.on_train_begin(args, None, None, model=model)
    for _ in range(3):
        step(callback, model, args, learning_rate=0.0)
    with pytest.raises(ModelError, match="moved no weight"):
        step(callback, model, args, learning_rate=1e-9)


def test_under_float16_the_loss_scaler_may_skip_nine_steps(load, args):
    args.fp16 = True
    model, callback = load("llama").to(torch.bfloat16), WeightsMove()
    callback.on_train_begin(args, None, None, model=model)
    for _ in range(9):
        step(callback, model, args, learning_rate=1e-9)
    with pytest.raises(ModelError, match="moved no weight"):
        step(callback, model, args, learning_rate=1e-9)


def test_a_model_without_trainable_weights_is_refused(load, args):
    model = load("gpt2").requires_grad_(False)
    with pytest.raises(ModelError, match=r"no trainable parameters; check model\.lora's target_modules"):
        WeightsMove().on_train_begin(args, None, None, model=model)


@pytest.mark.parametrize(("loss", "rewards"), [(LN2, (0.0, 0.0)), (LN2 + 0.009, (0.009, -0.009))])
def test_policy_and_reference_that_agree_may_start(loss, rewards):
    check_start(loss, *rewards, plain_sigmoid=True)


@pytest.mark.parametrize("rewards", [(0.02, 0.0), (0.0, -0.02), (math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0)])
def test_rewards_before_the_first_step_are_refused(rewards):
    with pytest.raises(ModelError, match=r"before the first step the rewards are .*, not 0"):
        check_start(LN2, *rewards, plain_sigmoid=True)


@pytest.mark.parametrize("loss", [0.72, 0.0, math.nan])
def test_a_sigmoid_loss_other_than_ln_2_is_refused(loss):
    with pytest.raises(ModelError, match=r"not ln 2 = 0\.6931"):
        check_start(loss, 0.0, 0.0, plain_sigmoid=True)
    if not math.isnan(loss):
        check_start(loss, 0.0, 0.0, plain_sigmoid=False)


@pytest.mark.parametrize(("found", "exact"), [(-100.1, True), (-101.9, False), (-100.0, True)])
def test_a_reference_with_the_sft_runs_log_probabilities_passes(found, exact):
    """Allowed around −100 nats: 0.1 + 0.05 exactly, 2 + 0.05 in half precision."""
    check_reference([-50.0, found], [-50.0, -100.0], exact)


@pytest.mark.parametrize(("found", "exact"), [(-100.2, True), (-110.0, False), (-90.0, False), (math.nan, True)])
def test_a_reference_with_other_log_probabilities_is_refused(found, exact):
    with pytest.raises(ModelError, match=r"nats where the SFT run gave -100\.00: it is not the SFT model"):
        check_reference([-50.0, found], [-50.0, -100.0], exact)


# --- wandb ---


def test_runs_of_one_seed_have_wandb_ids_of_their_own_and_a_resumed_run_keeps_its(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []
    for name in ("one", "other", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        set_seed(42)
        with wandb_run(Run(tmp_path / name), "quick"):
            seen.append(os.environ["WANDB_RUN_ID"])
    assert seen[0] == seen[2] != seen[1]
    assert "WANDB_RUN_ID" not in os.environ and os.environ["WANDB_MODE"] == "offline"


# --- what Trainer's events leave behind ---


def test_metrics_stand_under_the_names_that_wandb_shows(args, tmp_path):
    run, state = Run(tmp_path), TrainerState(global_step=4, is_world_process_zero=True)
    callback = MetricsFile(run)
    callback.on_log(args, state, TrainerControl(), logs={"loss": 0.5, "rewards/margins": 0.1})
    callback.on_log(args, state, TrainerControl(), logs={"eval_loss": 0.6, "eval_kl": 2.0})
    callback.on_log(args, state, TrainerControl(), logs={"train_runtime": 9.0})
    found = [{name: value for name, value in row.items() if name != "time"} for row in run.metrics()]
    assert found == [
        {"step": 4, "train/loss": 0.5, "train/rewards/margins": 0.1},
        {"step": 4, "eval/loss": 0.6, "eval/kl": 2.0},
    ]


def test_only_the_main_process_writes_metrics(args, tmp_path):
    state = TrainerState(global_step=4, is_world_process_zero=False)
    MetricsFile(Run(tmp_path)).on_log(args, state, TrainerControl(), logs={"loss": 0.5})
    assert not Run(tmp_path).metrics_file.exists()


def test_a_saved_checkpoint_is_marked_as_whole(args, tmp_path):
    folder = tmp_path / "checkpoints" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    assert find_damage(folder)
    WholeCheckpoints().on_save(args, TrainerState(global_step=4, is_world_process_zero=True), TrainerControl())
    assert not find_damage(folder)


@pytest.mark.parametrize(("global_step", "last"), [(9, False), (10, True)])
def test_the_last_step_is_evaluated_and_saved(global_step, last, args):
    control = TrainerControl()
    EvaluateAtEnd().on_step_end(args, TrainerState(global_step=global_step, max_steps=10), control)
    assert (control.should_log, control.should_evaluate, control.should_save) == (last, last, last)
