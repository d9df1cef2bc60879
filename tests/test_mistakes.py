"""Mistakes made on purpose: each is answered with what is wrong, where, and what to do; none ends in a traceback."""

from __future__ import annotations

import csv
import json
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.cli.commands import CALLS, main
from alignlab.data import hub
from alignlab.errors import DataError, MachineError, ModelError
from alignlab.recipe.load import consumed, load_recipe, write_yaml
from alignlab.runs.run import opened
from alignlab.train import machine
from alignlab.train.launch import read_config, waits_for

HERE = Path(__file__).parent
CASES = HERE / "cases"
CONFIGS = HERE.parent / "accelerate_configs"
with (CASES / "mistakes.tsv").open(encoding="utf-8", newline="") as _lines:
    TABLE = [tuple(row) for row in csv.reader(_lines, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]
MINE = """
data: {{path: good.jsonl, source: pairs, max_prompt_tokens: 64, max_reply_tokens: 64}}
model: {{name: {model}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 1}}
dpo: {{max_steps: 1}}
"""
FAULTY = {
    "bad-yaml.yaml": "about: a\nextends: tiny\n\tdpo: {beta: 1}\n",
    "extends.yaml": "extends: mistrall\n",
    "five.yaml": "extends: tiny\ndpo:\n  bta: 1\n  beta: x\n  output_dir: y\n  max_length: z\n  loss_type: w\n",
}


def pair(number: int) -> dict[str, str]:
    asked = f"How do I grow tomatoes number {number}?"
    return {"prompt": asked, "chosen": f"Water them {number} times.", "rejected": f"No idea {number}."}


ROWS = {
    "good.jsonl": [pair(n) for n in range(200)],
    "columns.jsonl": [{"question": f"what is {n}?", "good": "a", "bad": "b"} for n in range(60)],
    "long.jsonl": [{**pair(n), "chosen": "so " * 200} for n in range(60)],
    "three.jsonl": [pair(n) for n in range(3)],
    "split.jsonl": [{**pair(n), "split": "part_a"} for n in range(60)],
    "one-prompt.jsonl": [{"prompt": "Hello?", "completion": f"Water them {n} times."} for n in range(60)],
    "mixed.jsonl": [
        *(pair(n) for n in range(200)),
        *({"prompt": "x", "chosen": "y"} for _ in range(3)),
        {**pair(900), "chosen": 5},
        {**pair(901), "chosen": ""},
        {**pair(902), "chosen": "No idea 902."},
    ],
    "empty.jsonl": [],
}


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory) -> Path:
    """A working folder with a recipe, data of all sorts, and the finished runs of tests/cases."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = "".join(json.dumps(pair(n)) + "\n" for n in range(6))
    (folder / "broken.jsonl").write_text(whole + '{"prompt": \n')
    (folder / "mine.yaml").write_text(MINE.format(model=folders["llama"]))
    for name, text in FAULTY.items():
        (folder / name).write_text(text)
    shutil.copytree(CASES / "runs", folder / "runs")
    for run in ("sft", "dpo"):  # what tests/cases leaves out, so that they are runs to choose from
        (folder / "runs/tiny" / run / "model").mkdir()
    return folder


@pytest.fixture
def say(made, monkeypatch, capsys):
    """A function: a command line → (exit code, what stands on stderr, what stands on stdout)."""
    monkeypatch.chdir(made)

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
        out = capsys.readouterr()
        return code, out.err.strip(), out.out

    return run


@pytest.mark.parametrize(("command", "holds"), [row[1:] for row in TABLE], ids=[f"{n}: {c}" for n, c, _ in TABLE])
def test_a_mistake_is_answered_with_what_to_do(say, command, holds):
    code, said, out = say(*shlex.split(command.format(configs=CONFIGS)))
    assert (code, out) == (2, "") and "Traceback" not in said and "usage:" not in said
    assert all(part in said for part in holds.split("|")), said


def test_the_command_alone_lists_the_commands(say):
    code, _, out = say()
    assert code == 0 and all(f"\n    {name} " in out for name in CALLS)


def test_every_command_has_its_make_target():
    made = (HERE.parent / "Makefile").read_text(encoding="utf-8")
    phony = next(line for line in made.splitlines() if line.startswith(".PHONY"))
    for name in CALLS:
        assert f"\n{name}: install " in made and f" {name} " in f"{phony} ", name
        assert f"$(BIN)/alignlab {name}" in made, name


def test_odd_rows_are_dropped_and_counted_by_reason(say, caplog):
    """Mistake 19: 6 of 206 rows, each with its reason and the first line of it."""
    with caplog.at_level(logging.INFO):
        code, _, out = say("data", "mine.yaml", "data.path=mixed.jsonl", "--json")
    dropped = json.loads(out)["dropped"]
    assert code == 0 and sorted(dropped.values()) == [1, 1, 1, 3] and "first at mixed.jsonl:201" in caplog.text


def test_the_example_of_the_help_is_read_by_its_columns(say):
    code, _, out = say("data", "gpt2", "model.name=" + load_recipe("mine.yaml").model.name, "data.path=good.jsonl")
    assert code == 0 and "pairs  good.jsonl" in out


def test_an_export_has_a_folder_by_default(say):
    """Mistake 26: without --to nothing is missing but the run's weights."""
    code, said, _ = say("export", "tiny")
    assert code == 2 and "--to" not in said and "runs/tiny/dpo" in said


def test_a_run_of_other_settings_and_one_in_use_are_refused(say, made):
    """Mistakes 42 and 43."""
    recipe = load_recipe("mine.yaml")
    with opened(Path("runs/mine/sft"), "sft", consumed(recipe, "sft"), write_yaml(recipe)):
        code, said, _ = say("sft", "mine.yaml")
        assert code == 2 and said.splitlines()[-1].startswith("runs/mine/sft is in use by another process; wait for it")
    code, said, _ = say("sft", "mine.yaml", "sft.learning_rate=1e-4", "--run", "sft")
    assert code == 2 and "sft.learning_rate was None, is 0.0001" in said and "--run" in said and "--force" in said


def test_a_host_says_for_whom_it_waits_and_how_long():
    """Mistake 35."""
    config = read_config(CONFIGS / "hosts.yaml")
    assert waits_for(config).startswith("host 0 of 0 to 1: waits at 127.0.0.1:29500 for host 1, up to 10 minutes")
    others = waits_for({**config, "machine_rank": 1})
    assert others == "host 1 of 0 to 1: waits up to 15 minutes for host 0 at 127.0.0.1:29500"


def test_a_judge_that_cannot_be_had_is_one_line(say, monkeypatch):
    """Mistakes 28, 29 and 50: no key, no such folder, votes of another form."""
    from alignlab.evaluation.endpoint import EndpointJudge
    from alignlab.evaluation.judge import RewardJudge, read_votes

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(MachineError, match=r"OPENAI_API_KEY is not set; set it .* or name the URL"):
        EndpointJudge("gpt-4o")
    with pytest.raises(ModelError, match=r"there is no folder \./reward here"):
        RewardJudge("./reward")
    Path("votes.jsonl").write_text('{"prompt": 0, "vote": "A"}\n')
    with pytest.raises(DataError, match=r"votes.jsonl:1: a vote has .* winner, one of sft, dpo .* has prompt, vote"):
        read_votes(Path("votes.jsonl"), ["Hi"], ["sft", "dpo"])


def test_a_hub_that_cannot_be_reached_is_one_line_and_no_retries(say, monkeypatch):
    """Mistake 38."""
    import datasets
    from huggingface_hub import constants

    hub.stay_offline_without_hub.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for config in (constants, datasets.config):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    code, said, _ = say("data", "mine.yaml", "model.name=nobody/nothing")
    hub.stay_offline_without_hub.cache_clear()
    assert code == 2 and len(said.splitlines()) == 1 and "point model.name at the folder" in said


def test_a_plan_that_does_not_fit_is_refused_with_what_would(say, made, monkeypatch):
    """Mistake 36, in a container that leaves 1.3 GiB; --force is asked before anything is loaded."""
    for name, text in {"max": 13 * 2**30 // 10, "current": 0, "stat": "inactive_file 0"}.items():
        (made / f"memory.{name}").write_text(str(text))
    monkeypatch.setattr(machine, "CGROUP", made)
    large = ["sft.per_device_train_batch_size=32", "sft.gradient_accumulation_steps=1", "data.max_reply_tokens=192"]
    code, said, _ = say("sft", "tiny", *large)
    line = said.splitlines()[-1]
    assert (
        code == 2 and "0.3 GiB are free for it; it fits with sft." in line and line.endswith("--force goes on as it is")
    )
    assert not (made / "runs/tiny/sft-per_device_train_batch_size32").exists()


def test_a_library_of_another_version_is_one_line(say, tmp_path, monkeypatch):
    """Mistake 48."""
    (tmp_path / "trl-1.15.0.dist-info").mkdir()
    (tmp_path / "trl-1.15.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.15.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, said, _ = say("show", "tiny")
    assert code == 2 and said.startswith("trl is 1.15.0, and alignlab is made for ") and "pip install 'trl" in said


def test_a_reader_that_has_read_enough_ends_a_command_in_silence():
    """Mistake 46."""
    script = f"{shlex.quote(sys.executable)} -m alignlab show mistral | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("mistral: ")


def test_a_sweep_that_prints_replaces_nothing(say, made):
    """Mistake 52."""
    before = (made / "runs/tiny/sweep.json").read_bytes()
    code, said, out = say("sweep", "tiny", "dpo.seed=7", "--betas", "0.5", "--print")
    assert code == 0 and out.count("\n") == 2 and "replaced" not in said
    assert (made / "runs/tiny/sweep.json").read_bytes() == before
