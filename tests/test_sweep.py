"""Whole sweeps in this process: what members share, what becomes of each, and the table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import alignlab, same

from alignlab.cli.commands import main
from alignlab.errors import RunError
from alignlab.measure import heldout
from alignlab.recipe.load import load_recipe
from alignlab.reports.page import write_report
from alignlab.runs.run import Run, find_run
from alignlab.sweeps.choice import collect
from alignlab.sweeps.members import find_members
from alignlab.sweeps.runner import run_members
from alignlab.train import samples
from alignlab.train import stages as train
from alignlab.train.stages import train_dpo, train_sft
from alignlab.train.trainers import AlignDPOTrainer

RECIPE = """
about: seconds on a CPU
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 4, learning_rate: 1.0e-2, logging_steps: 1, eval_steps: 2, per_device_eval_batch_size: 8}}
dpo: {{max_steps: 4, learning_rate: 1.0e-3, logging_steps: 1, eval_steps: 2, per_device_eval_batch_size: 8}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}}}
"""


@pytest.fixture
def small(folders, tmp_path, monkeypatch) -> Path:
    """A working directory with the recipe `small`, whose runs take seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(RECIPE.format(name=folders["llama"]))
    return tmp_path


def stamps(run: Run) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}


def test_a_member_equals_a_separate_run_and_the_reference_is_asked_once(small, monkeypatch, caplog):
    """Four betas. The reference scores 96 + 60 + 60 pairs once, and draws once.

    Of the 4 prompts of each split the first member draws 5 times: before the first step, where policy and reference
    are one, at steps 2 and 4, and on the test split the policy's and the reference's. The others draw 3 times. What
    a member writes is what a run of its own writes, bit for bit, also where the store is empty.
    """
    monkeypatch.setenv("ALIGNLAB_CACHE", str(small / "cache"))
    train._say_finished.cache_clear()
    asked, adapters, drawn = [], [], []
    note_each_pair(monkeypatch, asked)
    sample, held_out = samples.sample_replies, heldout.score_pairs
    monkeypatch.setattr(samples, "sample_replies", lambda *a, **k: (drawn.append(1), sample(*a, **k))[1])
    note = lambda model, *a: (adapters.append(getattr(model, "active_adapter", None)), held_out(model, *a))[1]
    monkeypatch.setattr(heldout, "score_pairs", note)
    train_sft(load_recipe("small"))
    drawn.clear()
    with caplog.at_level("INFO"):
        table = run_members(find_members("small", [], "0.5,0.3,0.1,0.05"))
    assert [member.status for member in table.members] == ["finished"] * 4
    member = Run(Path("runs/small/dpo-beta0.5"))
    assert len(asked) == sum(member.manifest.data.kept.values()) and "ref" not in adapters
    assert len(drawn) == 5 + 3 * 3
    assert caplog.text.count("runs/small/sft is finished") == 1
    parents = {Run(Path(member.path)).manifest.parent.run for member in table.members}
    assert parents == {"runs/small/sft"}
    asked.clear()
    same(member, train_dpo(load_recipe("small", ["dpo.beta=0.5"]), root=Path("apart")))
    assert not asked
    monkeypatch.setenv("ALIGNLAB_CACHE", str(small / "empty"))
    same(member, train_dpo(load_recipe("small", ["dpo.beta=0.5"]), root=Path("alone")))
    assert len(asked) == sum(member.manifest.data.kept.values())


def note_each_pair(monkeypatch, asked: list) -> None:
    """Notes each pair that a reference is asked about for the store."""
    scoring = AlignDPOTrainer.scoring_reference

    @contextlib.contextmanager
    def noting(trainer):
        with scoring(trainer) as score:
            yield lambda pair: (asked.append(pair), score(pair))[1]

    monkeypatch.setattr(AlignDPOTrainer, "scoring_reference", noting)


def test_a_further_beta_adds_one_run_and_the_report_shows_them_all(small, capsys):
    assert main(["sweep", "small", "--betas", "0.5"]) == 0
    before = stamps(Run(Path("runs/small/dpo-beta0.5")))
    assert main(["sweep", "small", "--betas", "0.1"]) == 0
    assert stamps(Run(Path("runs/small/dpo-beta0.5"))) == before
    table = json.loads((small / "runs/small/sweep.json").read_text())
    assert [member["settings"]["dpo.beta"] for member in table["members"]] == [0.5, 0.1]
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())
    assert f"chosen: {table['choice']}" in shown and "paired over the same" in shown and "its test split" in shown
    assert find_run("small", best=True).path == Path("runs/small") / table["choice"]
    assert f"{table['choice']} was chosen of 2 finished members" in write_report(Path("runs/small")).read_text()
    other = collect(find_members("small", ["dpo.max_steps=2"], "0.1"))
    assert [member.run for member in other.members] == ["dpo-beta0.1-max_steps2"]  # another sweep's table


def test_an_interrupted_sweep_goes_on_in_the_member_that_it_was_in(small):
    """Ctrl-C in the second member; then the same command: the first is left alone, and the second ends as if nothing
    had been."""
    members = find_members("small", ["dpo.max_steps=24", "dpo.eval_steps=24"], "0.5,0.1")
    second = Run(members.folder / members.asked[1].name)
    threading.Thread(target=interrupt_when, args=(lambda: len(second.metrics()) > 1,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match=r"dpo-beta0.1.*: stopped at step \d+ with a checkpoint"):
        run_members(members)
    table = json.loads((members.folder / "sweep.json").read_text())
    assert table["choice"] == members.asked[0].name
    before = stamps(Run(members.folder / table["choice"]))
    table = run_members(members)
    assert [member.status for member in table.members] == ["finished"] * 2
    assert stamps(Run(members.folder / members.asked[0].name)) == before
    same(second, train_dpo(members.asked[1].recipe, root=Path("apart")))


def interrupt_when(moment) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and not moment():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_member_that_fails_is_named_and_the_others_go_on(small, capsys):
    """GaLore's optimizer needs a package that is not there; and one run's manifest is damaged."""
    grid = ["--betas", "0.5", "--grid", "optim=galore_adamw,adamw_torch,sgd"]
    damaged = small / "runs/small/dpo-beta0.5-optim=sgd"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    assert main(["sweep", "small", *grid]) == 2
    table = json.loads((small / "runs/small/sweep.json").read_text())
    found = {member["run"]: member for member in table["members"]}
    failed = found["dpo-beta0.5-optim=galore_adamw"]
    assert failed["status"] == "failed" and failed["error"].startswith("ImportError") and failed["margin"] is None
    assert "Traceback" in Path(failed["path"], "error.log").read_text()
    assert "is not JSON" in found["dpo-beta0.5-optim=sgd"]["error"]
    assert table["choice"] == "dpo-beta0.5-optim=adamw_torch"
    assert "failed: ImportError" in " ".join(capsys.readouterr().out.split())


def test_the_first_members_own_fault_does_not_end_the_sweep(small, caplog):
    """A prefetch factor without workers is refused by DPOConfig itself, so also while what all share is made."""
    table = run_members(find_members("small", [], "0.5", ["dataloader_prefetch_factor=2,null"]))
    assert caplog.text.count("dataloader_prefetch_factor can only be set") == 2
    assert {member.run: member.status for member in table.members} == {
        "dpo-beta0.5-dataloader_prefetch_factor2": "failed",
        "dpo-beta0.5-dataloader_prefetch_factor=null": "finished",
    }


def test_what_no_member_can_do_without_ends_the_sweep_in_one_line(small, capsys):
    assert main(["sweep", "small", "data.source=pairs", "data.path=nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("data.path is 'nowhere.jsonl': no such file")


@pytest.mark.slow
def test_printed_commands_on_any_scheduler_make_the_same_sweep(small):
    """Two members at once, each a process; what is collected is what one process makes of them."""
    jobs = alignlab(small, "sweep", "small", "--betas", "0.5,0.1", "--print").stdout
    script = "head -n 1 jobs | sh && tail -n +2 jobs | xargs -d '\\n' -P 2 -I{} sh -c {}"
    (small / "jobs").write_text(jobs)
    done = subprocess.run(script, shell=True, cwd=small, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert alignlab(small, "sweep", "small", "--betas", "0.5,0.1", "--collect").returncode == 0
    apart = run_members(find_members("small", [], "0.5,0.1", root=Path("apart")))
    collected = json.loads((small / "runs/small/sweep.json").read_text())
    assert collected["choice"] == apart.choice
    for one, other in zip(collected["members"], apart.members, strict=True):
        assert one["margin"] == asdict(other.margin) and one["kl"] == asdict(other.kl)


def test_several_processes_are_told_to_print(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="--print writes a command for each"):
        run_members(find_members("small"))
