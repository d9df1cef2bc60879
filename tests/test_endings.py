"""Runs that die between their last checkpoint and their end: the same command trains nothing, and ends the same way.

Each run is a process of its own, forked from one that has imported torch.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import same

from alignlab.recipe.load import load_recipe
from alignlab.runs.run import Run, last_whole_checkpoint, mark_complete
from alignlab.train.callbacks import EvaluateAtEnd

RECIPE = """
about: a run of seconds
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 64}}}}
model: {{name: {model}, dtype: float32, lora: {{r: 4, lora_dropout: 0.1, target_modules: all-linear}}}}
sft: {{learning_rate: 1.0e-2, logging_steps: 2, eval_steps: 2, per_device_train_batch_size: 4}}
dpo: {{learning_rate: 1.0e-3, logging_steps: 2, eval_steps: 2, per_device_train_batch_size: 4}}
kto: {{learning_rate: 1.0e-3, logging_steps: 2, eval_steps: 2, per_device_train_batch_size: 4}}
orpo: {{learning_rate: 1.0e-3, logging_steps: 2, eval_steps: 2, per_device_train_batch_size: 4}}
monitor: {{patience: 1, kl: {{prompts: 4, max_new_tokens: 8}}}}
"""
ENDINGS = {  # what brings a run to its end, and how it says so; STAGE is sft, dpo, kto or orpo
    "max_steps": (["STAGE.max_steps=3"], "all 3 steps done"),
    "epochs": (["STAGE.num_train_epochs=1"], "all "),
    "patience": (
        ["STAGE.max_steps=9", "STAGE.learning_rate=1.0", "STAGE.weight_decay=4"],
        "no better held-out loss since step",
    ),
    "guard": (["STAGE.max_steps=9", "monitor.max_kl=1e-9", "monitor.action=stop"], "stopped at step 2: the policy"),
    "asked": (["STAGE.max_steps=3"], "all 3 steps done"),
}
CASES = [
    (stage, ending, scheduler)
    for stage in ("sft", "dpo")
    for ending in ENDINGS
    for scheduler in ("cosine", "constant")
    if (stage, ending) != ("sft", "guard")  # which looks at what SFT has not
]
CASES += [("kto", "patience", "cosine"), ("kto", "guard", "cosine"), ("kto", "asked", "cosine")]
CASES += [("orpo", "max_steps", "cosine"), ("orpo", "asked", "cosine")]
AFTER_TRAINING, BEFORE_THE_MODEL = (
    ("alignlab.train.trainers", "_Seams._load_best_model"),
    ("alignlab.train.stages", "_finish"),
)


def train(stage: str, file: Path, settings: list[str], name: str, die_at=None, signalled=None) -> None:
    """What a forked process does: one run, which may kill itself at a function, or send itself a signal at a step."""
    from alignlab.train import stages

    if die_at:
        kill_itself_at(*die_at)
    if signalled:
        send_itself(*signalled)
    make = getattr(stages, f"train_{stage}")
    with contextlib.suppress(KeyboardInterrupt):
        make(load_recipe(str(file), settings), root=file.parent / "runs", name=name)


def kill_itself_at(module: str, name: str) -> None:
    import importlib

    *inside, last = name.split(".")
    place = importlib.import_module(module)
    for each in inside:
        place = getattr(place, each)
    setattr(place, last, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))


def send_itself(number: signal.Signals, step: int) -> None:
    before = EvaluateAtEnd.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), number)
        before(self, args, state, control, **kwargs)

    EvaluateAtEnd.on_step_end = on_step_end


@pytest.fixture(scope="module")
def start(folders, tmp_path_factory):
    """A function: stage, settings, a name and more → what became of that run, made in a process of its own."""
    folder = tmp_path_factory.mktemp("endings")
    file = folder / "short.yaml"
    file.write_text(RECIPE.format(model=folders["llama"]))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["alignlab.train.stages"])

    def run(stage: str, settings: list[str], name: str, code: int = 0, **how) -> Run:
        settings = settings if stage == "sft" else [*settings, "sft.max_steps=2"]
        process = processes.Process(target=train, args=(stage, file, settings, name), kwargs=how)
        process.start()
        process.join()
        assert process.exitcode == code
        return Run(folder / "runs/short" / name)

    run("sft", ["sft.max_steps=2"], "sft")
    return run


@pytest.mark.parametrize(("stage", "ending", "scheduler"), CASES)
def test_killed_after_its_last_checkpoint_a_run_ends_as_if_it_never_was(stage, ending, scheduler, start):
    """Killed once, while it writes its model, and twice: the first time before it loads its best checkpoint."""
    settings, said = ENDINGS[ending]
    settings = [
        f"{stage}.lr_scheduler_type={scheduler}",
        *(each.replace("STAGE", stage) for each in settings),
    ]
    name = f"{stage}-{ending}-{scheduler}"
    whole = start(stage, settings, f"{name}-whole")
    assert whole.manifest.stop_reason.startswith(said)
    once, twice = f"{name}-once", f"{name}-twice"
    if ending == "asked":
        for each in (once, twice):
            assert start(stage, settings, each, signalled=(signal.SIGTERM, 3)).manifest.status == "stopped"
    start(stage, settings, once, code=-signal.SIGKILL, die_at=BEFORE_THE_MODEL)
    if ending != "guard":  # which has no checkpoint to load
        start(stage, settings, twice, code=-signal.SIGKILL, die_at=AFTER_TRAINING)
    start(stage, settings, twice, code=-signal.SIGKILL, die_at=BEFORE_THE_MODEL)
    for killed in (once, twice):
        ended = start(stage, settings, killed)
        same(ended, whole)
        for key in ("stop_reason", "steps", "best_step", "warnings", "probe"):
            assert getattr(ended.manifest, key) == getattr(whole.manifest, key)
        assert ended.scores() == whole.scores()


@pytest.mark.parametrize(("before", "after"), [("null", "2"), ("2", "null"), ("1", "5")])
def test_a_run_goes_on_with_another_patience(before, after, start):
    """A learning rate at which nothing gets better: patience 1 would end the run at step 4."""
    settings, name = ["sft.max_steps=8", "sft.learning_rate=1.0"], f"patience-{before}-{after}"
    start("sft", [*settings, f"monitor.patience={before}"], name, signalled=(signal.SIGTERM, 2))
    run = start("sft", [*settings, f"monitor.patience={after}"], name)
    assert run.is_finished and (run.manifest.steps == 8 or after == "2")


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "orpo"])
def test_stopped_between_two_log_lines_a_run_goes_on_with_the_rows_of_one_that_was_not(stage, start):
    """Logged at steps 2 and 4, stopped behind step 3: the row of step 4 is a mean over both its steps all the same."""
    settings = [f"{stage}.max_steps=5"]
    whole = start(stage, settings, f"{stage}-unstopped")
    stopped = start(stage, settings, f"{stage}-stopped", signalled=(signal.SIGTERM, 3))
    assert stopped.manifest.stop_reason == "interrupted at step 3"
    assert max(row["step"] for row in stopped.metrics()) == 2
    start(stage, settings, f"{stage}-stopped")
    same(stopped, whole)
    assert stopped.manifest.stop_reason == whole.manifest.stop_reason


def test_what_a_killed_run_has_taken_counts_as_far_as_its_checkpoint(start):
    """1,000 s and 64 GiB at the checkpoint from which it goes on: they are in the figures of the whole run."""
    settings = ["sft.max_steps=5"]
    start("sft", settings, "sft-slow", code=-signal.SIGKILL, signalled=(signal.SIGKILL, 3))
    slow = Run(start("sft", settings, "sft-quick").path.with_name("sft-slow"))
    checkpoint, _ = last_whole_checkpoint(slow)
    carried = json.loads((checkpoint / "carried_over_0.json").read_text())
    carried |= {"seconds": 1000.0, "sampling_seconds": 500.0, "peak_memory": 64 << 30}
    (checkpoint / "carried_over_0.json").write_text(json.dumps(carried))
    mark_complete(checkpoint)
    taken = start("sft", settings, "sft-slow").manifest
    assert 1000 < taken.training_seconds < 1100 and 500 < taken.sampling_seconds < 600
    assert taken.peak_memory_gib == 64


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_killed_run_that_was_moved_ends_with_its_best_checkpoint(stage, start):
    """The trainer's state names the best checkpoint by the path that it had."""
    settings = [f"{stage}.max_steps=9", f"{stage}.learning_rate=1.0", f"{stage}.weight_decay=4"]
    whole = start(stage, settings, f"{stage}-in-place")
    start(stage, settings, f"{stage}-first", code=-signal.SIGKILL, die_at=AFTER_TRAINING)
    shutil.move(whole.path.with_name(f"{stage}-first"), whole.path.with_name(f"{stage}-moved"))
    assert whole.manifest.best_step < whole.manifest.steps
    same(start(stage, settings, f"{stage}-moved"), whole)


def test_a_best_checkpoint_that_has_changed_is_not_loaded(start):
    """The run trains again from the last whole checkpoint, here from the start, and says why."""
    settings = ["sft.max_steps=9", "sft.learning_rate=1.0", "sft.weight_decay=4"]
    whole = start("sft", settings, "sft-sound")
    start("sft", settings, "sft-rotten", code=-signal.SIGKILL, die_at=AFTER_TRAINING)
    rotten = Run(whole.path.with_name("sft-rotten"))
    file = rotten.checkpoints / f"checkpoint-{whole.manifest.best_step}" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    same(start("sft", settings, "sft-rotten"), whole)
