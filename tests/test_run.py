"""The laws of the run directory: whole files, one process, the same settings, and checkpoints that count."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.cli import commands as cli
from alignlab.disk import append_line, find_damage, read_lines, write_json, write_lines, write_text
from alignlab.errors import RunError
from alignlab.recipe.load import LONGEST_NAME, load_recipe, run_name
from alignlab.runs import run as runs
from alignlab.runs.facts import cost_of
from alignlab.runs.run import Run, cut_back, opened

SETTINGS = {"data": {"source": "toy", "seed": 0}, "model": {"name": "toy", "lora": {"r": 16}}, "dpo": {"beta": 0.1}}
rows = st.lists(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3), max_size=5
)


def start(path: Path, settings=SETTINGS, **options) -> Run:
    """A run that was opened and left without an end, as by a kill."""
    with opened(path, "dpo", settings, "about: x\n", **options) as run:
        return run


def python(program: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def checkpoint(run: Run, step: int, best: int | None = None) -> Path:
    """A checkpoint of three files, one of them in a sub-folder, with its marker."""
    folder = run.checkpoints / f"checkpoint-{step}"
    (folder / "ref").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "ref/adapter_model.safetensors"):
        (folder / name).write_bytes(f"{name} at step {step}".encode())
    (folder / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    runs.mark_complete(folder)
    return folder


# --- files ---


def test_a_crash_between_write_and_rename_leaves_the_old_file(tmp_path):
    file = tmp_path / "manifest.json"
    write_text(file, "old")
    crash = (
        "import os, sys; from pathlib import Path; from alignlab.disk import write_text\n"
        "Path.replace = lambda *names: os._exit(9)\n"
        "write_text(Path(sys.argv[1]), 'new' * 1000)"
    )
    assert python(crash, file).wait() == 9
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new"


def test_writing_leaves_nothing_beside_the_file(tmp_path):
    write_text(tmp_path / "a.txt", "ü")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text("utf-8") == "ü"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_file_whole(small_disk):
    write_json(small_disk / "manifest.json", {"status": "running"})
    with pytest.raises(OSError, match="No space left"):
        write_text(small_disk / "manifest.json", "x" * 100_000)
    assert json.loads((small_disk / "manifest.json").read_text()) == {"status": "running"}
    assert len(list(small_disk.iterdir())) == 1


def test_a_full_disk_while_training_is_the_error_that_is_reported(small_disk):
    with pytest.raises(OSError, match="No space left"), opened(small_disk / "dpo", "dpo", SETTINGS, "") as run:
        (small_disk / "filler").write_bytes(b"x" * 100_000)
    assert run.manifest.status in ("running", "failed")
    (small_disk / "filler").unlink()
    assert start(small_disk / "dpo").manifest.status == "running"


@given(rows)
def test_lines_written_are_the_lines_read(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    write_lines(file, rows)
    assert read_lines(file) == rows
    for row in rows:
        append_line(file, row)
    assert read_lines(file) == rows + rows


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = [{"step": 1, "loss": 0.5}, {"step": 2, "text": "ü"}]
    write_lines(file, whole)
    content = file.read_bytes()
    second = len(content.splitlines(keepends=True)[0])
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert read_lines(file) == whole[: (length >= second)]
    assert read_lines(tmp_path / "absent.jsonl") == []


def test_cut_back_leaves_what_was_logged_up_to_the_step(tmp_path):
    run = start(tmp_path / "dpo")
    write_lines(run.metrics_file, [{"step": step} for step in (0, 2, 4, 4, 6)])
    with run.metrics_file.open("a") as file:
        file.write('{"step": 8, "lo')
    cut_back(run, 4, [{"step": step} for step in (0, 2, 4, 4)])
    append_line(run.metrics_file, {"step": 5})
    assert [row["step"] for row in run.metrics()] == [0, 2, 4, 4, 5]
    assert run.samples() == []
    cut_back(run, -1, [])
    assert run.metrics() == []


LOGGED = [{"step": 0, "eval/loss": 0.7}, {"step": 2, "train/loss": math.nan}, {"step": 4, "eval/loss": 0.1 + 0.2}]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda file, lines: file.unlink(), 3),
        (lambda file, lines: file.write_bytes(b""), 3),
        (lambda file, lines: file.write_bytes(lines[0] + lines[1] + lines[2][:9]), 1),
        (lambda file, lines: file.write_bytes(lines[0] + lines[1][:9] + lines[2]), 2),
        (lambda file, lines: file.write_bytes(lines[0] + b"[1]\n" + lines[2]), 1),
        (lambda file, lines: file.write_bytes(lines[0] + lines[1].replace(b"NaN", b"0.5") + lines[2]), 1),
    ],
    ids=["gone", "emptied", "cut", "two lines in one", "no object", "another number"],
)
def test_rows_that_the_metrics_file_has_lost_come_back_from_the_checkpoint(damage, lost, tmp_path, caplog):
    run = Run(tmp_path)
    rows = [{"step": row["step"], "time": 10.0 + row["step"], **row} for row in LOGGED]
    write_lines(run.metrics_file, [*rows, {"step": 5, "time": 15.0}])
    damage(run.metrics_file, run.metrics_file.read_bytes().splitlines(keepends=True))
    cut_back(run, 4, LOGGED)
    found = run.metrics()
    assert [json.dumps({k: v for k, v in row.items() if k != "time"}) for row in found] == [*map(json.dumps, LOGGED)]
    assert sum("time" not in row for row in found) == lost
    said = f"{run.metrics_file} had lost {lost} of 3 rows; they are back, without their times"
    assert [line for line in caplog.messages if "lost" in line] == [said]


def test_replies_on_the_test_split_go_since_they_are_drawn_again(tmp_path):
    run = Run(tmp_path)
    row = {"step": 4, "split": "validation", "prompt": "a", "reply": "b"}
    write_lines(run.samples_file, [row, {**row, "step": 6}, {**row, "split": "test"}])
    cut_back(run, 4, [])
    assert run.samples() == [row]


@pytest.mark.parametrize("line", [b'{"step": 2', b"", b"\x00\xff", b"[2]", b"2", b'{"step": "2"}', b'{"loss": 2}'])
def test_a_damaged_line_is_left_out_and_named(line, tmp_path, caplog):
    run = Run(tmp_path)
    run.metrics_file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert run.metrics() == [{"step": 1}, {"step": 3}]
    assert caplog.messages == ([f"{run.metrics_file}:2 is damaged and left out"] if line else [])


def test_of_many_damaged_lines_the_first_is_named(tmp_path, caplog):
    run = Run(tmp_path)
    run.metrics_file.write_bytes(b'{"step": 1}\n{\n{\n{\n')
    assert run.metrics() == [{"step": 1}]
    assert caplog.messages == [f"{run.metrics_file}:2 and 2 more of its lines are damaged and left out"]


# --- one process, the same settings, an honest status ---


def test_a_new_run_says_what_it_is(tmp_path):
    run = start(tmp_path / "dpo")
    assert run.recipe_file.read_text() == "about: x\n"
    facts = run.manifest
    assert (facts.stage, facts.status, facts.consumed) == ("dpo", "running", SETTINGS)
    assert facts.versions["torch"] and facts.machine.cpus == os.cpu_count()


def test_a_run_that_did_not_start_has_no_manifest(tmp_path):
    run = Run(tmp_path)
    assert not run.has_started and not run.is_finished
    with pytest.raises(RunError, match=f"there is no run at {tmp_path}"):
        run.manifest  # noqa: B018


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "dpo"
    hold = (
        "import sys; from pathlib import Path; from alignlab.runs.run import opened\n"
        "with opened(Path(sys.argv[1]), 'dpo', {}, ''):\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(RunError) as error:
            start(path, {})
        assert str(error.value) == f"{path} is in use by another process; wait for it, or name this run with --run"
        holder.kill()
        holder.wait()
    assert start(path, {}).manifest.status == "running"


def test_other_settings_are_refused_by_name_and_nothing_is_touched(tmp_path):
    before = start(tmp_path / "dpo")
    old = {f.name: f.read_bytes() for f in before.path.iterdir()}
    other = {**SETTINGS, "model": {"name": "gpt2", "lora": {"r": 16, "lora_alpha": 32}}, "dpo": {"beta": 0.3}}
    with pytest.raises(RunError) as error:
        start(tmp_path / "dpo", other)
    assert str(error.value) == (
        f"{tmp_path}/dpo was made from other settings: dpo.beta was 0.1, is 0.3, "
        f"model.lora.lora_alpha was None, is 32, model.name was 'toy', is 'gpt2'; "
        f"name a new run with --run, or train it again with --force"
    )
    assert {f.name: f.read_bytes() for f in before.path.iterdir()} == old


def test_no_adapter_and_an_adapter_of_defaults_are_other_settings(tmp_path):
    start(tmp_path / "dpo", {"model": {"lora": None}})
    with pytest.raises(RunError, match=r"model\.lora was None, is {}"):
        start(tmp_path / "dpo", {"model": {"lora": {}}})


def test_settings_are_compared_as_the_manifest_holds_them(tmp_path):
    settings = {"data": {"path": Path("rows.jsonl"), "shares": (0.1, 0.2)}}
    start(tmp_path / "dpo", settings)
    start(tmp_path / "dpo", settings)


def test_a_finished_run_comes_back_untouched(tmp_path):
    start(tmp_path / "dpo").note(status="finished", stop_reason="all 200 steps done")
    old = {f.name: f.read_bytes() for f in (tmp_path / "dpo").iterdir()}
    with opened(tmp_path / "dpo", "dpo", SETTINGS, "about: another text\n") as run:
        assert run.is_finished
    assert {f.name: f.read_bytes() for f in run.path.iterdir()} == old


def test_a_stopped_run_runs_again_and_keeps_its_facts(tmp_path):
    start(tmp_path / "dpo").note(status="stopped", stop_reason="interrupted at step 8", training_seconds=3.5)
    facts = start(tmp_path / "dpo").manifest
    assert (facts.status, facts.stop_reason, facts.training_seconds) == ("running", None, 3.5)


def test_force_keeps_the_older_run_aside(tmp_path, caplog):
    caplog.set_level("INFO", "alignlab")
    start(tmp_path / "dpo").note(status="finished", best_step=7)
    start(tmp_path / "dpo", force=True).note(best_step=8)
    new = start(tmp_path / "dpo", {"dpo": {"beta": 0.5}}, force=True)
    assert not new.is_finished and new.manifest.best_step is None
    assert Run(tmp_path / "dpo.old1").manifest.best_step == 7
    assert Run(tmp_path / "dpo.old2").manifest.best_step == 8
    assert f"{tmp_path}/dpo: the older run is kept as {tmp_path}/dpo.old2" in caplog.text


def test_force_on_nothing_is_an_ordinary_start(tmp_path):
    assert start(tmp_path / "dpo", force=True).manifest.status == "running"
    assert not (tmp_path / "dpo.old1").exists()


def test_a_failure_is_recorded_with_its_error(tmp_path):
    with pytest.raises(ZeroDivisionError), opened(tmp_path / "dpo", "dpo", SETTINGS, "") as run:
        1 / 0  # noqa: B018
    assert (run.manifest.status, run.manifest.stop_reason) == ("failed", "ZeroDivisionError: division by zero")


def test_an_interrupt_is_not_recorded_as_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "dpo", "dpo", SETTINGS, "") as run:
        run.note(status="stopped")
        raise KeyboardInterrupt
    assert run.manifest.status == "stopped"


def test_a_broken_manifest_is_a_fault_with_its_remedy(tmp_path):
    run = start(tmp_path / "dpo")
    run.manifest_file.write_text('{"stage":')
    with pytest.raises(RunError, match=rf"manifest.json is not JSON .*; remove {run.path} to start the run anew"):
        start(tmp_path / "dpo")


# --- checkpoints ---


def test_the_newest_whole_checkpoint_is_found_by_number(tmp_path):
    run = Run(tmp_path)
    assert runs.last_whole_checkpoint(run) == (None, [])
    found = [checkpoint(run, step) for step in (8, 64, 512)]
    (run.checkpoints / "checkpoint-best").mkdir()
    assert runs.last_whole_checkpoint(run) == (found[-1], [])
    assert runs.step_of(found[-1]) == 512


def test_a_flipped_bit_anywhere_makes_a_checkpoint_not_count(tmp_path):
    folder = checkpoint(Run(tmp_path), 1)
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            assert find_damage(folder), (file, place)
        file.write_bytes(content)
    assert not find_damage(folder)


def damage(folder: Path, how: str) -> None:
    file = folder / ("COMPLETE.json" if "marker" in how else "ref/adapter_model.safetensors")
    if how.startswith("no "):
        file.unlink()
    elif how.startswith("empty "):
        file.write_bytes(b"")
    else:
        file.write_text(how.removesuffix(" marker"))


@pytest.mark.parametrize(
    "how", ["no file", "no marker", "empty file", "empty marker", "{} marker", "[] marker", "null marker"]
)
def test_a_damaged_checkpoint_makes_way_for_the_one_before_it(tmp_path, how):
    run = Run(tmp_path)
    oldest, older, newest = (checkpoint(run, step) for step in (8, 16, 24))
    damage(newest, how)
    damage(older, "no marker")
    whole, damaged = runs.last_whole_checkpoint(run)
    assert (whole, damaged) == (oldest, [newest, older])
    runs.remove_checkpoints(damaged)
    assert runs.last_whole_checkpoint(run) == (oldest, [])


def test_a_checkpoint_counts_only_with_the_best_one_that_it_names(tmp_path):
    """At the end of training the best one is loaded; without it the run would end with other weights."""
    run = Run(tmp_path)
    oldest, best, newest = (checkpoint(run, step, best) for step, best in ((8, 8), (16, 16), (24, 16)))
    assert runs.last_whole_checkpoint(run) == (newest, [])
    damage(best, "empty file")
    assert runs.last_whole_checkpoint(run) == (oldest, [newest, best])
    shutil.rmtree(best)
    assert runs.last_whole_checkpoint(run) == (oldest, [newest])


def test_where_no_checkpoint_is_whole_there_is_none(tmp_path):
    run = Run(tmp_path)
    only = checkpoint(run, 8)
    (only / "trainer_state.json").write_text("{}")
    assert runs.last_whole_checkpoint(run) == (None, [only])


# --- names ---

NO_NAMES = (
    "",
    ".",
    "..",
    "../evil",
    "a/b",
    "/tmp/x",
    ".hidden",
    "-x",
    "a b",
    "a\x1b[31m",
    "a\n",
    "ä",
    "a\x00b",
    "a" * 101,
)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_no_folder_beside_others_is_refused(name, tmp_path, monkeypatch, capsys):
    """By every command that takes one, before anything is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=f"is no name of a run; write at most {LONGEST_NAME} letters, digits and"):
        runs.check_name(name)
    given = [f"--run={name}"]
    commands = [["sft", "tiny"], ["dpo", "tiny"], ["eval", "tiny"], ["report", "tiny"], ["export", "tiny", "--to", "x"]]
    for command in commands:
        assert cli.main([*command, *given]) == 2
        said = capsys.readouterr().err
        assert said.startswith("--run ") and "is no name of a run" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["dpo", "dpo-beta0.3", "dpo-loss_type=sigmoid+sft", "a" * 100, "7", "_x"])
def test_a_name_of_letters_digits_and_a_few_marks_is_one(name):
    assert runs.check_name(name) == name


@given(
    st.lists(
        st.sampled_from(
            [
                "dpo.beta=0.3",
                "data.path=/a/b.jsonl",
                "dpo.loss_type=[sigmoid,sft]",
                "data.seed=7",
                "data.subset=" + "x" * 90,
                "dpo.learning_rate=5e-7",
                "model.start=../x y",
            ]
        ),
        unique=True,
    )
)
@settings(deadline=None)
def test_the_name_that_settings_give_is_one(overrides):
    recipe = load_recipe("mistral", overrides)
    assert all(runs.check_name(run_name(recipe, stage)) for stage in ("sft", "dpo"))


def test_the_cost_of_a_run_holds_that_of_the_runs_it_started_from(tmp_path):
    """60 steps of SFT, 40 of DPO on it, and 20 of a run that `model.start` begins at DPO's model: 60, 100 and 120."""
    parents = {"sft": None, "dpo": {"run": "runs/tiny/sft"}, "round": {"start": "runs/tiny/dpo/model"}}
    for (name, parent), steps in zip(parents.items(), (60, 40, 20), strict=True):
        (tmp_path / name).mkdir()
        write_json(
            tmp_path / name / "manifest.json", {"stage": "dpo", "status": "finished", "steps": steps, "parent": parent}
        )
    assert [cost_of(Run(tmp_path / name))["steps"] for name in parents] == [60, 100, 120]


def test_a_model_from_elsewhere_costs_nothing_here(tmp_path):
    write_json(
        tmp_path / "manifest.json",
        {"stage": "dpo", "status": "finished", "steps": 40, "parent": {"start": "some/model"}},
    )
    assert cost_of(Run(tmp_path)) == {"steps": 40}


@pytest.mark.parametrize(
    ("started", "said"),
    [
        (["/x/bin/alignlab", "dpo", "tiny"], "alignlab dpo tiny"),
        (["/x/alignlab/__main__.py", "dpo", "tiny"], "alignlab dpo tiny"),
        (["/home/ada/train.py", "--beta", "1"], "python train.py --beta 1"),
        (["/x/ipykernel_launcher.py", "-f", "/tmp/k.json"], "python, in a notebook"),
    ],
)
def test_the_command_that_began_a_run_is_kept_as_it_would_be_typed(started, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", started)
    assert runs._command() == said
