"""The laws of the cache of prepared data: found again by content alone, whole or not at all, never needed."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from alignlab import disk
from alignlab.data import identity
from alignlab.data.prepare import prepare
from alignlab.data.prepared import clear_prepared, find_or_make, list_prepared, prepared_folder
from alignlab.errors import DataError
from alignlab.recipe.load import DataSection

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 40)


def write_rows(path, count):
    lines = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no" if n else "yes"} for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def section(path, **settings):
    return DataSection(**{"path": str(path), "validation_share": 0.2, "test_share": 0.2, **settings})


def entries(cache):
    return [path for path in cache.glob("*") if path.is_dir()]


def contents(found):
    return {split: getattr(found, split)[:] for split in ("train", "validation", "test")}


def test_a_second_time_reads_what_the_first_has_made(rows, tokenizer, cache, caplog):
    first = prepare(section(rows), tokenizer)
    with caplog.at_level("INFO", "alignlab"):
        second = prepare(section(rows), tokenizer)
    assert "40 rows read: 39 kept, 1 dropped (1 the two replies are identical" in caplog.text
    assert "from the cache" in caplog.text
    assert contents(second) == contents(first) and second.dialogues == first.dialogues
    same = ("rows", "kept", "dropped", "repaired", "parts", "fingerprint", "folder")
    assert {name: getattr(second, name) for name in same} == {name: getattr(first, name) for name in same}
    assert len(entries(cache)) == 1


def test_another_place_finds_the_same_rows_under_its_own_names(rows, tokenizer, tmp_path, cache):
    prepare(section(rows), tokenizer)
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    shutil.copyfile(rows, copy)
    found = prepare(section(copy), tokenizer)
    assert len(entries(cache)) == 1
    (entry,) = map(json.loads, found.dropped_rows.read_text().splitlines())
    assert (entry["file"], entry["line"]) == (str(copy), 1)
    assert [part["path"] for part in found.parts] == [str(copy)]


@pytest.mark.parametrize(
    "change",
    [
        {"max_prompt_tokens": 100},
        {"max_reply_tokens": 100},
        {"long_replies": "cut"},
        {"max_pairs": 30},
        {"max_pairs_per_prompt": 1},
        {"validation_share": 0.3},
        {"seed": 1},
        {"format": "alpaca"},
    ],
)
def test_a_setting_that_matters_is_another_entry(rows, tokenizer, cache, change):
    prepare(section(rows), tokenizer)
    prepare(section(rows, **change), tokenizer)
    assert len(entries(cache)) == 2


def test_content_tokenizer_template_and_code_are_part_of_the_key(rows, tokenizer, cache, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    prepare(section(rows), tokenizer)
    rows.write_text(rows.read_text().replace("question 7", "question seven"))
    prepare(section(rows), tokenizer)
    assert len(entries(cache)) == 2
    backend = tokenizer.backend_tokenizer
    prepare(section(rows), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<pad>", pad_token="<eos>"))
    assert len(entries(cache)) == 3
    for template in ("{{ messages[0]['content'] }}", "{{ 'ask: ' + messages[0]['content'] }}"):
        whole = template + "{% if messages | length > 1 %}{{ messages[1]['content'] }}{% endif %}"
        prepare(section(rows, format="chat"), tokenizer, whole)
    assert len(entries(cache)) == 5
    monkeypatch.setattr(identity, "_code", lambda: "another version of the modules")
    prepare(section(rows), tokenizer)
    assert len(entries(cache)) == 6


def test_what_another_call_has_set_on_the_tokenizer_is_not_part_of_the_key(rows, tokenizer, cache):
    prepare(section(rows), tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    prepare(section(rows), tokenizer)
    tokenizer("a")
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("file", ["train.arrow", "dropped.jsonl", "dialogues.bin", "account.json", "COMPLETE.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_entry_is_made_again_and_said(rows, tokenizer, cache, caplog, file, damage):
    before = contents(prepare(section(rows), tokenizer))
    (entry,) = entries(cache)
    content = (entry / file).read_bytes()
    (entry / file).unlink()
    if damage != "gone":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (entry / file).write_bytes(content[:middle] if damage == "cut" else flipped)
    found = prepare(section(rows), tokenizer)
    assert contents(found) == before
    assert f"data: {entry} is damaged ({file}); making it again" in caplog.text
    assert disk.find_damage(entry) is None


def test_a_preparation_that_fails_leaves_nothing_behind(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "broken.jsonl", 40)
    path.write_text(path.read_text() + '{"prompt": "cut sho')
    with pytest.raises(DataError, match=r"broken.jsonl:41: not JSON"):
        prepare(section(path), tokenizer)
    assert entries(cache) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_costs_a_line(cache, caplog, number, tmp_path):
    def make(folder):
        if folder.parent == cache:
            raise OSError(number, os.strerror(number))
        (folder / "rows").write_text("kept")
        return {"kept": {}}

    found = find_or_make({"facts": 1}, "rows", make)
    assert (found.folder / "rows").read_text() == "kept" and entries(cache) == []
    assert [record.getMessage() for record in caplog.records] == [
        f"data: cannot keep prepared rows in {cache} ({os.strerror(number)}); going on without"
    ]


def test_a_cache_folder_that_is_a_file_costs_a_line(rows, tokenizer, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "file"))
    assert prepare(section(rows), tokenizer).rows == 40
    assert "cannot keep prepared rows" in caplog.text


RACE = """
import sys, time
from pathlib import Path
from alignlab.data.prepared import find_or_make
def make(folder):
    time.sleep(1)
    (folder / "rows").write_text("x" * 1000)
    print("made", flush=True)
    return {"kept": {"train": 1}}
entry = find_or_make({"facts": 1}, "rows", make)
assert (entry.folder / "rows").read_text() == "x" * 1000
"""


def test_of_processes_at_once_one_prepares_and_the_others_read(cache):
    racing = [subprocess.Popen([sys.executable, "-c", RACE], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in racing]
    assert [process.returncode for process in racing] == [0, 0, 0]
    assert sorted(said) == ["", "", "made\n"] and len(entries(cache)) == 1


def test_a_process_that_is_killed_leaves_no_half_entry(cache):
    slow = RACE.replace(
        "time.sleep(1)", '(folder / "rows").write_text("x"); print("begun", flush=True); time.sleep(60)'
    )
    killed = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "begun\n"
    killed.kill()
    killed.wait()
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "made\n" and len(list_prepared()) == 1


def test_the_cache_lists_its_entries_and_clears_them(rows, tokenizer, cache):
    assert list_prepared() == [] and clear_prepared() == 0
    prepare(section(rows), tokenizer)
    time.sleep(0.02)
    found = prepare(replace(section(rows), seed=1), tokenizer)
    listed = list_prepared()
    assert listed[0].path == found.folder and [entry.pairs for entry in listed] == [39, 39]
    assert listed[0].bytes == sum(file.stat().st_size for file in found.folder.iterdir())
    assert str(rows) in listed[0].about and listed[0].last_used >= listed[1].last_used
    assert clear_prepared() >= sum(entry.bytes for entry in listed) and list_prepared() == []
    assert len(found.train["prompt"]) == found.kept["train"]  # who has it open reads on
    assert prepared_folder() == cache


def test_listing_imports_nothing_heavy():
    code = "import sys, alignlab.data.prepared; print({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_second_time_takes_no_longer_than_reading(tmp_path, tokenizer):
    path = write_rows(tmp_path / "many.jsonl", 20_000)
    prepare(section(path), tokenizer)
    began = time.process_time()
    prepare(section(path), tokenizer)
    assert time.process_time() - began < 0.5
