"""Whole runs: SFT and DPO by the command line, killed, resumed, interrupted, repeated; on real tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignlab.run import Run, read_lines

RECIPE = """
about: a run of seconds, for tests
extends: tiny
data: {toy: {pairs: 240}}
sft: {max_steps: 12, logging_steps: 2, eval_steps: 4}
dpo: {max_steps: 12, logging_steps: 2, eval_steps: 4, loss_type: sigmoid}
monitor: {kl: {prompts: 4, max_new_tokens: 16}}
"""
TIMES = {"time", "eval/runtime", "eval/samples_per_second", "eval/steps_per_second"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the recipe `quick` and its SFT run."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "quick.yaml").write_text(RECIPE)
    assert alignlab(folder, "sft", "quick").returncode == 0
    return folder


def alignlab(folder: Path, *arguments: str, wait: bool = True, **environment: str):
    command = [sys.executable, "-m", "alignlab", *arguments]
    env = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder, "env": env}
    return subprocess.run(command, **pipes) if wait else subprocess.Popen(command, **pipes)


def kill_when(run: Run, process: subprocess.Popen, moment) -> None:
    """Kills the process as soon as `moment()` holds."""
    deadline = time.time() + 120
    while not moment():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(run: Run) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in run.model.glob("*.safetensors")}


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_killed_and_resumed_is_the_run_that_was_never_killed(workplace):
    whole, killed = Run(workplace / "runs/quick/whole"), Run(workplace / "runs/quick/killed")
    assert alignlab(workplace, "dpo", "quick", "--run", "whole").returncode == 0
    process = alignlab(workplace, "dpo", "quick", "--run", "killed", wait=False)
    kill_when(killed, process, lambda: any(row["step"] > 8 for row in read_lines(killed.metrics_file)))
    assert killed.manifest["status"] == "running"
    resumed = alignlab(workplace, "dpo", "quick", "--run", "killed")
    assert resumed.returncode == 0 and "resuming from" in resumed.stderr
    assert weights(killed) == weights(whole)
    assert timeless(killed.metrics()) == timeless(whole.metrics())
    assert killed.samples() == whole.samples()
    assert killed.manifest["test"] == whole.manifest["test"]
