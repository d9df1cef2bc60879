"""One flipped bit in anything that a finished run or the cache holds: it is told, and what it is in is not used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from alignlab import disk
from alignlab.cli.commands import main
from alignlab.models import pretrain
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import ToySection
from alignlab.runs.run import Run
from alignlab.train import store

EVAL = ("eval", "plain", "--replies", "8", "--max-new-tokens", "8")
DPO, EXPORT, REPORT = ("dpo", "plain", "--run", "again"), ("export", "plain", "--to", "out"), ("report", "plain")
REFUSED = [  # what is damaged, and the command that reads it
    ("base/model.safetensors", DPO),
    ("base/model.safetensors", EVAL),
    ("base/model.safetensors", EXPORT),
    ("runs/plain/sft/manifest.json", DPO),
    ("runs/plain/sft/recipe.yaml", DPO),
    ("runs/plain/sft/model/adapter_model.safetensors", DPO),
    ("runs/plain/sft/model/adapter_model.safetensors", EVAL),
    ("runs/plain/sft/model/adapter_config.json", DPO),
    ("runs/plain/sft/model/COMPLETE.json", DPO),
    ("runs/plain/dpo/manifest.json", EVAL),
    ("runs/plain/dpo/recipe.yaml", EVAL),
    ("runs/plain/dpo/recipe.yaml", EXPORT),
    ("runs/plain/dpo/metrics.jsonl", REPORT),
    ("runs/plain/dpo/samples.jsonl", REPORT),
    ("runs/plain/dpo/samples.jsonl", EXPORT),
    ("runs/plain/dpo/scores.jsonl", REPORT),
    ("runs/plain/dpo/dropped.jsonl", REPORT),
    ("runs/plain/dpo/COMPLETE.json", REPORT),
    ("runs/plain/dpo/eval.json", REPORT),
    ("runs/plain/dpo/model/adapter_model.safetensors", EVAL),
    ("runs/plain/dpo/model/adapter_model.safetensors", EXPORT),
    ("runs/plain/dpo/model/adapter_config.json", EXPORT),
    ("runs/plain/dpo/model/tokenizer.json", EXPORT),
]


@pytest.fixture(scope="module")
def finished(folders, of_seconds, tmp_path_factory) -> Path:
    """A folder with a base model, the recipe `plain` on it, its finished and evaluated runs, and a cache of its own."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(folders["llama"], folder / "base")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "plain.yaml").write_text(of_seconds("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
        library_settings.cache_clear()
        assert main(["dpo", "plain"]) == main(EVAL) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch) -> Path:
    """The same, to be damaged."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
    return folder


def flip(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("file", "command"), REFUSED, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_flipped_bit_is_refused_in_one_line(copy, capsys, file, command):
    flip(copy / file)
    before = set(copy.rglob("*"))
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (file in last or file.rpartition("/")[0].removesuffix("/model") in last) and "; " in last
    made = {path for path in set(copy.rglob("*")) - before if "again" not in str(path)}
    assert not made, made


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.parametrize("file", ["train.arrow", "account.json", "dropped.jsonl", "COMPLETE.json"])
def test_damaged_rows_are_prepared_again(copy, capsys, caplog, file):
    entry = only(copy, "cache/prepared/*[!k]/")
    flip(entry / file)
    assert main(["data", "plain"]) == 0
    assert f"data: {entry} is damaged ({file}); making it again" in caplog.text
    assert disk.find_damage(entry) is None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_base_model_is_trained_again(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrain, "TRAINING", {**pretrain.TRAINING, "max_steps": 1})
    section = ToySection(pairs=20)
    folder = pretrain.base_model(section)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    flip(folder / name)
    assert pretrain.base_model(section) == folder
    assert f"base model: {folder} is damaged ({name}); making it again" in caplog.text
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


@pytest.mark.parametrize("place", [0.5, 0.99])
def test_a_damaged_reference_file_counts_as_empty(copy, caplog, place):
    file = only(copy, "cache/reference/*.logps")
    head = json.loads(file.read_bytes().partition(b"\n")[0])
    identity = store.ReferenceIdentity("the SFT run", head["facts"])
    records, _ = store._read(identity)
    assert len(records) and len(store.read_records(identity, records["key"])) == len(records)
    flip(file, place)
    assert len(store.read_records(identity, records["key"])) == 0
    assert f"{file} is damaged" in caplog.text


def test_a_damaged_reply_of_the_reference_is_drawn_again(copy, caplog):
    file = next((copy / "cache" / "reference").glob("*.replies"))
    head = json.loads(file.read_bytes().partition(b"\n")[0])
    identity = store.ReferenceIdentity("the SFT run", head["facts"])
    assert store.read_replies(identity, head["drawing"])
    flip(file, 0.9)
    assert store.read_replies(identity, head["drawing"]) is None
    assert f"{file} is damaged" in caplog.text


def test_a_damaged_answer_is_asked_for_again(copy, capsys, caplog):
    before = disk.read_record(copy / "runs/plain/dpo/eval.json")
    for file in (copy / "runs/plain/replies").iterdir():
        flip(file)
    assert main(EVAL) == 0
    assert len(re.findall(r"1 of \d+ lines are damaged", caplog.text)) == 3
    after = disk.read_record(copy / "runs/plain/dpo/eval.json")
    assert after["win_rates"] == before["win_rates"]


def test_damaged_fields_of_the_libraries_are_read_again(copy, caplog):
    file = only(copy, "cache/fields-*.json")
    before = disk.read_record(file)
    flip(file, 0.7)
    library_settings.cache_clear()
    library_settings()
    assert f"{file} cannot be used" in caplog.text
    assert {name: [*of] for name, of in disk.read_record(file).items()} == {name: [*of] for name, of in before.items()}


def unfinished(folder: Path) -> tuple[Run, Path]:
    """The DPO run as if it had been killed after its last checkpoint, and an earlier one, which is the best."""
    run = Run(folder / "runs/plain/dpo")
    (run.path / disk.MARKER).unlink()
    shutil.rmtree(run.model)
    run.note(status="running")
    last, best = run.checkpoints / "checkpoint-6", run.checkpoints / "checkpoint-3"
    assert last.is_dir() and best.is_dir()
    state = json.loads((last / "trainer_state.json").read_text())
    disk.write_json(last / "trainer_state.json", {**state, "best_model_checkpoint": str(best), "best_global_step": 3})
    disk.seal(last)
    return run, best


def test_a_damaged_best_checkpoint_is_not_what_is_kept(copy, caplog):
    """Neither it nor a later one that names it as the best: the run goes on from before both."""
    run, best = unfinished(copy)
    whole = (best / "adapter_model.safetensors").read_bytes()
    flip(best / "adapter_model.safetensors")
    assert main(["dpo", "plain"]) == 0
    for checkpoint in (best, run.checkpoints / "checkpoint-6"):
        assert f"{checkpoint.relative_to(copy)} is not whole and is removed" in caplog.text
    assert (best / "adapter_model.safetensors").read_bytes() == whole


def test_a_checkpoint_whose_pickle_torch_refuses_is_named(copy, capsys):
    import os

    import torch

    class Command:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    run, _ = unfinished(copy)
    last = run.checkpoints / "checkpoint-6"
    torch.save({"state": Command()}, last / "optimizer.pt")
    disk.seal(last)
    assert main(["dpo", "plain"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-6/optimizer.pt cannot be loaded: torch refuses it" in line and "system" in line
    assert f"remove {last.relative_to(copy)}" in line and not (copy / "pwned").exists()
