"""What is written is there whole or not at all, and what was changed since is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab import disk
from alignlab.cli.commands import main
from alignlab.data import prepared
from alignlab.data.account import make_folder

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def ended_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


# Records and results


@given(st.dictionaries(st.text().filter(lambda key: key != disk.CHECKSUM), values, max_size=4))
def test_a_record_is_read_as_it_was_written(tmp_path_factory, facts):
    file = tmp_path_factory.mktemp("records") / "record.json"
    disk.write_record(file, facts)
    assert disk.read_record(file) == facts


def test_a_flipped_bit_in_a_record_changes_nothing_that_is_read(tmp_path):
    """Each bit: it is refused, or the facts are the same (as with `1e5` for `1E5`, or in the checksum's own name)."""
    file, facts = tmp_path / "record.json", {"status": "finished", "n": 1e22, "text": "ü\n", "rows": [1, None]}
    disk.write_record(file, facts)
    content = file.read_bytes()
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found = disk.read_record(file)
        except ValueError as e:
            assert str(e).startswith("not ")
        else:
            assert {name: found.get(name) for name in facts} == facts


def test_a_record_of_other_hands_needs_no_checksum(tmp_path):
    (tmp_path / "record.json").write_text('{"a": 1}')
    assert disk.read_record(tmp_path / "record.json") == {"a": 1}


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_line_costs_only_itself(tmp_path, caplog, damage):
    path = tmp_path / "answers.jsonl"
    first = disk.ResultCache(path)
    first.add("one", "first answer", tokens=3)
    first.add("two", "second answer")
    content = path.read_bytes()
    path.write_bytes(content[:-9] if damage == "cut off" else content.replace(b"second", b"secomd"))
    cache = disk.ResultCache(path)
    assert f"{path}: 1 of 2 lines are damaged" in caplog.text
    cache.add("three", "third answer")
    caplog.clear()
    assert cache.values == disk.ResultCache(path).values == {"one": "first answer", "three": "third answer"}
    assert not caplog.text


# Folders


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    with disk.filling(tmp_path / "model") as beside:
        (beside / "weights").write_text("old")
        (beside / "weights").chmod(0o600)
    with pytest.raises(KeyboardInterrupt), disk.filling(tmp_path / "model") as beside:
        (beside / "weights").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/weights").read_text() == "old"
    assert (tmp_path / "model/weights").stat().st_mode & 0o777 == 0o644
    with disk.filling(tmp_path / "model") as beside:
        (beside / "weights").write_text("new")
    assert (tmp_path / "model/weights").read_text() == "new" and len([*tmp_path.iterdir()]) == 1


def test_a_seal_knows_each_file_by_name(tmp_path):
    (tmp_path / "ref").mkdir()
    for name in ("weights", "ref/weights", "log"):
        (tmp_path / name).write_text(name)
    assert disk.find_damage(tmp_path) == disk.MARKER and not disk.is_sealed(tmp_path)
    disk.seal(tmp_path, ["weights", "absent"])
    (tmp_path / "log").write_text("grows")
    assert disk.find_damage(tmp_path) is None
    disk.seal(tmp_path)
    (tmp_path / "ref/weights").unlink()
    assert disk.find_damage(tmp_path) == "ref/weights"


def test_a_large_file_is_hashed_once_until_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LARGE", 4)
    read, whole = [], disk._hash
    monkeypatch.setattr(disk, "_hash", lambda file: read.append(file.name) or whole(file))
    file = tmp_path / "weights"
    file.write_bytes(b"12345678")
    assert disk.hash_file(file) == disk.hash_file(file) and read == ["weights"]
    file.write_bytes(b"12345679")
    os.utime(file, ns=(1, 1))
    assert disk.hash_file(file) == whole(file) and read == ["weights"] * 2


# Left behind


def test_what_an_ended_process_was_writing_is_removed_and_a_running_ones_is_not(tmp_path):
    names = [f".model.{ended_process()}-0123abcd.tmp", f".manifest.json.{ended_process()}", ".keep", "notes.tmp"]
    running = f".report.html.{os.getpid()}-0123abcd.tmp"
    for name in [*names, running]:
        (tmp_path / name).write_text("x")
    disk.remove_left_behind(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".keep", "notes.tmp", running}


def test_the_cache_lists_what_was_left_behind_and_clears_it(cache, capsys):
    ended = ended_process()
    left = [f".toy-base-1.{ended}-0123abcd.tmp", f"prepared/.2.{ended}-0123abcd.tmp", "prepared/.2.abcd", "tmpa1b2c3d4"]
    kept = [f".toy-base-1.{os.getpid()}-0123abcd.tmp", ".ssh", "tmp", "toy-base-1", "judgements/1.jsonl"]
    for name in [*left, *kept]:
        (cache / name).mkdir(parents=True)
        (cache / name / "model.safetensors").write_bytes(b"x" * 2**20)
    assert main(["cache"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[-1] for line in listed.splitlines()] == sorted(str(cache / name) for name in left)
    assert all("left behind      1.0 MiB" in line for line in listed.splitlines())
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == "4.0 MiB freed\n"
    assert all((cache / name).exists() for name in kept) and not any((cache / name).exists() for name in left)


def test_rows_of_a_killed_process_are_left_behind_until_rows_are_prepared_again(cache):
    code = "import os; from alignlab.data.account import make_folder; make_folder(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    own = make_folder()
    (left,) = disk.left_in_cache()
    assert left.parent == cache and left != own and own.is_dir()
    prepared.find_or_make({"of": 1}, "of a test", lambda folder: {})
    assert not left.exists() and own.is_dir()


def test_a_marker_is_json_with_size_and_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    disk.seal(tmp_path)
    assert json.loads((tmp_path / disk.MARKER).read_text()) == {"a": [0, "99aa06d3014798d86001c324468d497f"]}
