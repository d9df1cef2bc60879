"""The callbacks and early checks: what is written, what is refused, and a KL that is zero where it must be."""

from __future__ import annotations

import math
import os
import resource
import time

import pytest
import torch
from fake_hub import serving
from fake_wandb import KnowingNobody, NeverAnswering, Taking
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

from alignlab.disk import find_damage
from alignlab.errors import ModelError
from alignlab.recipe.arguments import wandb_is_off
from alignlab.runs.run import Run
from alignlab.train import callbacks as monitor
from alignlab.train.callbacks import (
    EvaluateAtEnd,
    MetricsFile,
    WeightsMove,
    WholeCheckpoints,
    check_loss,
    check_probe,
    peak_memory,
    start_peak_memory,
    wandb_run,
)

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


@pytest.mark.parametrize(("found", "exact"), [(-100.1, True), (-101.1, False), (-100.0, True)])
def test_a_model_that_gives_what_it_should_may_start(found, exact):
    """SFT has changed the two replies by 10 nats together: a hundredth of them is allowed in float32, a tenth else."""
    check_probe("policy", [-50.0, found], "SFT run", [-50.0, -100.0], [-55.0, -105.0], exact)


@pytest.mark.parametrize(("found", "exact"), [(-100.2, True), (-101.5, False), (-98.5, False), (math.nan, True)])
def test_a_model_that_gives_something_else_may_not(found, exact):
    with pytest.raises(ModelError, match=r"where the SFT run gave -50\.00/-100\.00: it is not that model"):
        check_probe("reference", [-50.0, found], "SFT run", [-50.0, -100.0], [-55.0, -105.0], exact)


@pytest.mark.parametrize("exact", [True, False])
def test_the_base_is_not_taken_for_an_sft_model_that_differs_by_little(exact):
    """One nat of 300: less than the half per cent that a fixed tolerance would have to allow in half precision."""
    with pytest.raises(ModelError, match="it is not that model"):
        check_probe("reference", [-301.0], "SFT run", [-300.0], [-301.0], exact)


def test_policy_and_reference_may_differ_by_rounding_only():
    check_probe("reference", [-100.1], "policy", [-100.0], None, False)
    with pytest.raises(ModelError, match=r"gives replies -100\.10 nats, where the policy gave -100\.00"):
        check_probe("reference", [-100.1], "policy", [-100.0], None, True)


@pytest.mark.parametrize("loss", [0.72, 0.0, math.nan])
def test_a_sigmoid_loss_other_than_ln_2_is_refused(loss):
    check_loss(LN2 + 0.009, LN2)
    with pytest.raises(ModelError, match=r"not 0\.6931"):
        check_loss(loss, LN2)


# --- wandb ---


@pytest.fixture
def wandb_at(tmp_path, monkeypatch, caplog):
    """A function: a server → what a run says of wandb that begins there, logged in by a key, and the run."""
    caplog.set_level("INFO")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_MODE")
    run = Run(tmp_path)
    run.note(stage="dpo", status="running")

    def begin(handler: type) -> tuple[str, Run]:
        with serving(handler) as url:
            monkeypatch.setenv("WANDB_BASE_URL", url)
            with wandb_run(run, "quick"):
                pass
        return "\n".join(record.message for record in caplog.records if record.name == monitor.__name__), run

    return begin


def test_who_is_logged_in_at_wandb_runs_online(wandb_at):
    said, run = wandb_at(Taking)
    assert said.startswith("wandb: online as ada, http://127.0.0.1:") and len(said.splitlines()) == 1
    assert list(run.path.glob(f"wandb/run-*-{run.manifest.wandb_id}"))


@pytest.mark.parametrize(
    ("handler", "why"), [(KnowingNobody, "user is not logged in"), (NeverAnswering, "context deadline exceeded")]
)
def test_a_server_that_refuses_or_hangs_makes_the_run_an_offline_one_within_ten_seconds(handler, why, wandb_at):
    began = time.monotonic()
    said, run = wandb_at(handler)
    assert time.monotonic() - began < 10
    assert said.startswith("wandb: offline, no run could begin (") and why in said and len(said.splitlines()) == 1
    assert list(run.path.glob(f"wandb/offline-run-*-{run.manifest.wandb_id}"))


def test_without_a_network_the_next_run_of_the_process_does_not_wait_again(wandb_at):
    wandb_at(NeverAnswering)
    began = time.monotonic()
    said, _ = wandb_at(NeverAnswering)
    assert time.monotonic() - began < 4
    assert said.splitlines()[1] == "wandb: offline, as WANDB_MODE says"


@pytest.mark.parametrize("variable", [{"WANDB_API_KEY": "short"}, {"WANDB_MODE": "onlin"}])
def test_a_variable_that_wandb_refuses_ends_no_run(variable, wandb_at, monkeypatch):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert wandb_at(Taking)[0].startswith("wandb: offline, no run could begin (")


def test_wandbs_own_login_is_the_one_that_counts(wandb_at, tmp_path, monkeypatch):
    """A key in its file, under whatever host it writes there (0.31: another one than api.wandb.ai)."""
    import wandb
    from wandb.sdk.lib import wbauth

    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_at(Taking)[0] == "wandb: offline, nobody is logged in; `wandb login` does it"
    monkeypatch.delenv("WANDB_MODE")

    with serving(Taking) as url:
        wbauth.write_netrc_auth(host=url, api_key="0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        with wandb_run(Run(tmp_path), "quick"):
            assert not wandb.run.offline and wandb.run.entity == "ada"


@pytest.mark.parametrize("off", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_where_wandb_is_off_no_run_of_its_own_begins(off, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    for name, value in off.items():
        monkeypatch.setenv(name, value)
    with wandb_run(Run(tmp_path), "quick"):
        assert "WANDB_RUN_ID" not in os.environ and wandb_is_off()
    assert not list(tmp_path.iterdir())


def test_runs_of_one_seed_have_wandb_ids_of_their_own_and_a_resumed_run_keeps_its(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []
    for name in ("one", "other", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        run = Run(tmp_path / name)
        run.note(stage="dpo", status="running")
        set_seed(42)
        with wandb_run(run, "quick"):
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
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "samples.jsonl").touch()
    WholeCheckpoints(Run(tmp_path)).on_save(
        args, TrainerState(global_step=4, is_world_process_zero=True), TrainerControl()
    )
    assert not find_damage(folder)


@pytest.mark.parametrize(("global_step", "last"), [(9, False), (10, True)])
def test_the_last_step_is_evaluated_and_saved(global_step, last, args):
    control = TrainerControl()
    EvaluateAtEnd().on_step_end(args, TrainerState(global_step=global_step, max_steps=10), control)
    assert (control.should_log, control.should_evaluate, control.should_save) == (last, last, last)
