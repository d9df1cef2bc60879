"""Runs by the command line that are killed, interrupted, damaged or started twice, and what becomes of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import alignlab, kill_when, same, timeless, wait_until, weights

from alignlab.disk import read_lines
from alignlab.runs.run import Run, last_whole_checkpoint, opened

RECIPE = """
about: a run of seconds
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {model}, dtype: float32, load_in_4bit: {quantized}, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 6, learning_rate: 1.0e-2, logging_steps: 2, eval_steps: 2}}
dpo: {{max_steps: 12, learning_rate: 1.0e-3, logging_steps: 2, eval_steps: 4}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}}}
"""


@pytest.fixture(scope="module")
def workplace(folders, tmp_path_factory) -> Path:
    """A folder with the recipes `plain` and `quantized`; `plain` has its SFT run and a DPO run `whole`."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "recipes").mkdir()
    for name, quantized in (("plain", "false"), ("quantized", "true")):
        text = RECIPE.format(model=folders["llama"], quantized=quantized)
        (folder / "recipes" / f"{name}.yaml").write_text(text)
    done = alignlab(folder, "dpo", "plain", "--run", "whole")
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_and_resumed_is_the_run_that_was_never_killed(workplace):
    whole, killed = Run(workplace / "runs/plain/whole"), Run(workplace / "runs/plain/killed")
    process = alignlab(workplace, "dpo", "plain", "--run", "killed", wait=False)
    kill_when(process, lambda: any(row["step"] > 4 for row in read_lines(killed.metrics_file)))
    assert killed.manifest.status == "running"
    resumed = alignlab(workplace, "dpo", "plain", "--run", "killed")
    assert resumed.returncode == 0 and "resuming from" in resumed.stderr
    same(killed, whole)


def test_killed_in_4bit_and_resumed_is_the_run_that_was_never_killed(workplace):
    whole, killed = Run(workplace / "runs/quantized/whole"), Run(workplace / "runs/quantized/killed")
    assert alignlab(workplace, "dpo", "quantized", "--run", "whole").returncode == 0
    process = alignlab(workplace, "dpo", "quantized", "--run", "killed", wait=False)
    kill_when(process, lambda: any(row["step"] > 8 for row in read_lines(killed.metrics_file)))
    resumed = alignlab(workplace, "dpo", "quantized", "--run", "killed")
    assert resumed.returncode == 0 and "resuming from" in resumed.stderr
    same(killed, whole)


def test_killed_before_the_first_checkpoint_starts_anew(workplace):
    whole, killed = Run(workplace / "runs/plain/whole"), Run(workplace / "runs/plain/early")
    process = alignlab(workplace, "dpo", "plain", "--run", "early", wait=False)
    kill_when(process, lambda: killed.metrics_file.is_file() and not list(killed.checkpoints.glob("*/COMPLETE.json")))
    assert alignlab(workplace, "dpo", "plain", "--run", "early").returncode == 0
    same(killed, whole)


def test_ctrl_c_stops_after_the_step_with_a_checkpoint_and_resumes(workplace):
    whole, stopped = Run(workplace / "runs/plain/whole"), Run(workplace / "runs/plain/stopped")
    process = alignlab(workplace, "dpo", "plain", "--run", "stopped", wait=False)
    wait_until(process, lambda: any(row["step"] >= 2 for row in read_lines(stopped.metrics_file)))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said and "Traceback" not in said
    assert stopped.manifest.status == "stopped" and last_whole_checkpoint(stopped)[0] is not None
    assert alignlab(workplace, "dpo", "plain", "--run", "stopped").returncode == 0
    same(stopped, whole)


def test_lost_logs_come_back_from_the_checkpoint_or_are_named(workplace):
    """Metrics are in the trainer's state; replies are nowhere else, and the figures do without them."""
    whole, lost = Run(workplace / "runs/plain/whole"), Run(workplace / "runs/plain/lost")
    shutil.copytree(whole.path, lost.path)
    lost.note(status="running")
    lines = lost.samples_file.read_bytes().splitlines(keepends=True)
    lost.samples_file.write_bytes(b"".join([*lines[:5], b"{" + lines[5], *lines[6:]]))  # the second reply at step 4
    lost.metrics_file.unlink()
    done = alignlab(workplace, "dpo", "plain", "--run", "lost")
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if line.startswith("runs/plain/lost/")]
    assert said[:3] == [
        "runs/plain/lost/metrics.jsonl had lost 10 of 10 rows; they are back, without their times",
        "runs/plain/lost/samples.jsonl:6 is damaged and left out",
        "runs/plain/lost/samples.jsonl has lost replies of step 4; the metrics are whole",
    ]
    assert timeless(lost.metrics()) == timeless(whole.metrics()) and weights(lost) == weights(whole)
    assert lost.samples() == [*whole.samples()[:5], *whole.samples()[6:]]
    assert lost.manifest.test == whole.manifest.test


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(workplace):
    whole = Run(workplace / "runs/plain/whole")
    damaged = Run(whole.path.with_name("damaged"))
    shutil.copytree(whole.path, damaged.path)
    shutil.rmtree(damaged.model)
    damaged.note(status="running")
    newest, _ = last_whole_checkpoint(damaged)
    with (newest / "optimizer.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"rot")
    resumed = alignlab(workplace, "dpo", "plain", "--run", "damaged")
    assert resumed.returncode == 0
    assert f"{newest.name} is not whole and is removed; going on from" in resumed.stderr
    same(damaged, whole)


def test_a_second_process_on_the_same_run_is_refused(workplace):
    with opened(workplace / "runs/plain/shared", "dpo", {}, ""):
        second = alignlab(workplace, "dpo", "plain", "--run", "shared")
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1].startswith("runs/plain/shared is in use by another process")


def test_other_settings_in_the_same_run_directory_are_refused_by_name(workplace):
    refused = alignlab(workplace, "dpo", "plain", "dpo.beta=0.3", "--run", "whole")
    assert refused.returncode == 2
    assert "dpo.beta was None, is 0.3" in refused.stderr or "dpo.beta was 0.1, is 0.3" in refused.stderr


def test_wandb_is_offline_by_itself_and_a_resumed_run_goes_on_in_its_own(workplace, tmp_path):
    pytest.importorskip("wandb")
    home = {"WANDB_MODE": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    home = {k: v for k, v in home.items() if v}
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
    command = [sys.executable, "-m", "alignlab", "dpo", "plain", "--run", "logged"]
    done = subprocess.run(command, cwd=workplace, env={**environment, **home}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = Run(workplace / "runs/plain/logged")
    assert list(run.path.glob(f"wandb/offline-run-*-{run.manifest.wandb_id}"))
