"""What a user sees when something is wrong: one line that says what to do, exit code 2, nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignlab.cli.commands import main

DATA = "data: {{source: {source}, path: {path}}}\n"
MODEL = "model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}\n"
SHORT = ("data.max_prompt_tokens=64", "data.max_reply_tokens=64")
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."}


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """A function: arguments of `alignlab` → (exit code, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        return code, capsys.readouterr().err.strip()

    return run


@pytest.fixture
def write(folders, tmp_path):
    """A function: writes a recipe `r.yaml` on the tiny Llama and these rows, and the rows."""

    def write(rows: list[str] | None = None, name: str | Path | None = None, source: str = "hh-rlhf", extra: str = ""):
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(row + "\n" for row in rows))
        data = DATA.format(source=source, path=tmp_path / "rows.jsonl")
        (tmp_path / "r.yaml").write_text(data + MODEL.format(name=name or folders["llama"]) + extra)
        return tmp_path

    return write


def test_an_unknown_recipe_is_answered_with_the_nearest(say):
    code, said = say("sft", "mistrall")
    assert code == 2 and "mistrall" in said and "mistral" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ["data", "plan"])
def test_json_is_all_that_stands_on_stdout_where_wandb_is_offline(command, write, tmp_path):
    rows = [{side: text.replace("Hi", f"Hi {n}") for side, text in HH.items()} for n in range(40)]
    write([json.dumps(row) for row in rows])
    arguments = [sys.executable, "-m", "alignlab", command, "r.yaml", "--json"]
    done = subprocess.run(arguments, cwd=tmp_path, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_a_removed_key_is_answered_with_what_trl_wants(say):
    code, said = say("show", "tiny", "dpo.use_liger_loss=true")
    assert code == 2 and "use_liger_kernel" not in said and said.endswith("write model.use_kernels: true")


def test_a_library_that_is_missing_is_named_whatever_the_model(say, write):
    """transformers says so with ValueError, whichever place the model comes from; no network is to blame."""
    write([json.dumps(HH)] * 3, extra="sft: {max_steps: 1}\n")
    code, said = say("sft", "r.yaml", "model.use_kernels=true", "data.source=toy", "data.path=null", *SHORT)
    assert code == 2 and "Kernels are not available. Please install" in said.splitlines()[-1]


def test_every_fault_of_a_recipe_is_said_at_once(say):
    code, said = say("dpo", "mistral", "dpo.bta=0.3", "sft.output_dir=x", "dpo.max_prompt_length=5")
    assert code == 2 and len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['{"chosen": 1'], "rows.jsonl:1: "),
        ([json.dumps(HH), "nonsense"], "rows.jsonl:2: "),
        (['{"question": "x"}'], "chosen"),
        ([], "empty"),
    ],
    ids=["cut short", "not JSON", "other fields", "empty"],
)
def test_bad_rows_are_named_by_file_and_line(say, write, rows, expected):
    folder = write(rows)
    code, said = say("sft", str(folder / "r.yaml"))
    assert code == 2 and expected in said and len(said.splitlines()) == 1, said


def test_a_data_path_that_is_not_there_is_answered_with_the_nearest(say, write):
    folder = write([json.dumps(HH)])
    code, said = say("data", str(folder / "r.yaml"), f"data.path={folder / 'row.jsonl'}")
    assert code == 2 and "rows.jsonl" in said and len(said.splitlines()) == 1, said


def test_a_truncated_gzip_is_named(say, write):
    folder = write()
    whole = gzip.compress("".join(json.dumps(HH) + "\n" for _ in range(1000)).encode())
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    code, said = say("data", str(folder / "r.yaml"), f"data.path={folder / 'cut.jsonl.gz'}")
    assert code == 2 and "cut.jsonl.gz" in said and len(said.splitlines()) == 1, said


def test_a_model_folder_without_weights_is_named(say, write, folders, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / file).write_bytes((folders["llama"] / file).read_bytes())
    rows = [json.dumps({k: v.replace("Hi", f"Hi {i}") for k, v in HH.items()}) for i in range(200)]
    folder = write(rows, name=bare)
    code, said = say("sft", str(folder / "r.yaml"), "data.max_prompt_tokens=32", "data.max_reply_tokens=32")
    assert code == 2 and str(bare) in said and len(said.splitlines()) == 1, said


def test_a_hub_that_cannot_be_reached_says_how_to_go_without(tmp_path, write):
    folder = write([json.dumps(HH)], name="nobody/nothing")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "alignlab", "data", str(folder / "r.yaml")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "point model.name at the folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_fault_leaves_no_run_that_looks_whole(say, write):
    folder = write(['{"chosen": 1'])
    assert say("sft", str(folder / "r.yaml"))[0] == 2
    manifest = json.loads((folder / "runs" / "r" / "sft" / "manifest.json").read_text())
    assert manifest["status"] == "failed" and "rows.jsonl:1" in manifest["stop_reason"]
    assert not (folder / "runs" / "r" / "sft" / "model").exists()


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "alignlab", "show", "mistrall"]
    outputs = [subprocess.run([*command, *more], capture_output=True, text=True).stderr for more in ([], ["--debug"])]
    assert ["Traceback" in said for said in outputs] == [False, True]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_later(write, tmp_path):
    """400 KB hold the data but not a checkpoint; once there is room the same command finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = lambda size, *how: subprocess.run(["mount", *how, "-o", size, "tmpfs", str(disk)], capture_output=True)
    if mount("size=400k", "-t", "tmpfs").returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        extra = "sft: {max_steps: 2, logging_steps: 1, eval_steps: 1}\nmonitor: {kl: {prompts: 2, max_new_tokens: 4}}\n"
        rows = [json.dumps({k: v.replace("Hi", f"Hi {i}") for k, v in HH.items()}) for i in range(200)]
        recipe = str(write(rows, extra=extra) / "r.yaml")
        command = [sys.executable, "-m", "alignlab", "sft", recipe]
        command += ["data.max_prompt_tokens=32", "data.max_reply_tokens=32"]
        full = subprocess.run(command, cwd=disk, capture_output=True, text=True)
        assert full.returncode == 2, full.stderr
        assert full.stderr.strip().splitlines()[-1].startswith("no space left on the disk")
        assert mount("remount,size=50m").returncode == 0
        assert subprocess.run(command, cwd=disk, capture_output=True, text=True).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)])


def test_help_is_fast_and_needs_no_torch():
    """Measured 0.04 s; the bound is for a loaded machine."""
    began = time.perf_counter()
    code = (
        "import sys; from alignlab.cli.commands import main\n"
        "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert time.perf_counter() - began < 1.5


def test_a_typo_is_answered_at_once(say):
    """Measured 0.1 s with the field names cached; the bound is for a loaded machine."""
    say("show", "tiny")
    began = time.perf_counter()
    assert subprocess.run([sys.executable, "-m", "alignlab", "dpo", "tiny", "dpo.bta=1"]).returncode == 2
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize("command", ["list", "show", "data", "cache", "sft", "dpo"])
def test_every_command_has_examples_in_its_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"alignlab {command}" in capsys.readouterr().out


def test_data_as_json_has_rows_kept_and_dropped_by_reason(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({k: v.replace("Hi", f"Hi {i}") for k, v in HH.items()}) for i in range(200)]
    rows += [json.dumps({**HH, "rejected": HH["chosen"]})]
    recipe = str(write(rows) / "r.yaml")
    assert main(["data", recipe, "--json", "--out", "pairs.jsonl"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows_read"], said["kept"], sum(said["dropped"].values())) == (201, 200, 1)
    written = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert len(written) == 200 and written[0].keys() == {"split", "prompt", "chosen", "rejected"}


def test_data_as_json_is_one_object_with_what_was_read_and_what_was_not(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"question {n}", "chosen": "Yes, it is.", "rejected": "No, never.", "sys": "x"} for n in range(200)
    ]
    rows[7]["prompt"] = None
    folder = write([json.dumps(row) for row in rows])
    assert main(["data", str(folder / "r.yaml"), "data.source=null", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["layout"], said["rows_read"], said["kept"]) == ("pairs", 200, 199)
    assert said["dropped"] == {"no field 'prompt'": 1} and said["not_read"] == {"sys": 200}
    assert sum(said["splits"].values()) == 199 and set(said["splits"]) == {"train", "validation", "test"}
    rows_of = {finding["name"]: finding["rows"] for finding in said["findings"]}
    assert (rows_of["not-read"], rows_of["dropped-rows"], rows_of["prompt-in-reply"]) == (200, 1, 0)
    assert all({"name", "level", "rows"} <= finding.keys() for finding in said["findings"])


def test_a_path_that_a_recipe_misses_is_said_by_show_with_where_it_was_looked_for(say, tmp_path):
    (tmp_path / "mine").mkdir()
    text = "data: {path: pears.jsonl}\nmodel: {name: toy, dtype: float32}\n"
    (tmp_path / "mine" / "r.yaml").write_text(text)
    (tmp_path / "mine" / "pairs.jsonl").write_text("{}")
    code, said = say("show", "mine/r.yaml")
    assert code == 2 and len(said.splitlines()) == 1
    assert all(
        part in said for part in ("r.yaml:1", "'pears.jsonl'", "mine and the working folder", "mine/pairs.jsonl")
    )


def test_a_path_on_the_command_line_is_recognised_by_its_columns(write, tmp_path, capsys, monkeypatch):
    """As in the help of `alignlab dpo`: the recipe says hh-rlhf of its own path, and these rows are pairs."""
    monkeypatch.chdir(tmp_path)
    folder = write([json.dumps(HH)])
    rows = [{"prompt": f"question {n}", "chosen": "Yes, it is.", "rejected": "No, never."} for n in range(200)]
    (tmp_path / "my #1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", str(folder / "r.yaml"), "data.path=my #1.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "pairs"


def test_a_reply_that_is_too_long_names_its_own_setting(say, write):
    rows = [
        json.dumps({"chosen": f"\n\nHuman: {n}\n\nAssistant: {'so ' * 60}", **{"rejected": HH["rejected"]}})
        for n in range(9)
    ]
    rows = [row.replace("Hi", str(n)) for n, row in enumerate(rows)]
    code, said = say("data", str(write(rows) / "r.yaml"), "data.max_reply_tokens=20")
    assert code == 2 and "reply too long (9)" in said and "data.max_reply_tokens" in said and "columns" not in said
