"""Files of other hands and versions: read as far as they are sound, refused by file and field where they are not."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import RunError
from alignlab.reports.page import write_report
from alignlab.reports.summary import summarize
from alignlab.runs import typed
from alignlab.runs.run import Manifest, Run, find_run, read_sweep
from alignlab.sweeps.choice import collect
from alignlab.sweeps.members import find_members

RUNS = Path(__file__).parent / "cases" / "runs"  # of the recipe `tiny`, cut to a few rows
OTHERS = (None, "abc", "", -1, 0, 1.5, 10**400, True, [], {}, [None], [{}], ["a"], {"a": 1}, {"a": {}})
MUTATIONS = 40  # of each file


@dataclass(frozen=True)
class Inner:
    name: str
    n: int | None = None


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner | None = None
    shares: Mapping[str, float] | None = None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"steps": "abc"}', "x.json: steps is 'abc', expected a valid integer; mend it"),
        ('{"steps": 3.0}', "x.json: steps is 3.0, expected a valid integer; mend it"),
        ('{"steps": true}', "x.json: steps is True, expected a valid integer; mend it"),
        ("{}", "x.json: steps is missing; mend it"),
        ("[]", "x.json is [], expected an object; mend it"),
        ("null", "x.json is None, expected an object; mend it"),
        ('{"steps": 1, "inner": {"name": 7}}', "x.json: inner.name is 7, expected a valid string; mend it"),
        ('{"steps": 1, "inner": {}}', "x.json: inner.name is missing; mend it"),
        ('{"steps": 1, "shares": {"a": "b"}}', "x.json: shares.a is 'b', expected a valid number; mend it"),
        ('{"steps": "' + "w" * 1000, "x.json is not JSON (EOF while parsing a string at line 1 column 1011); mend it"),
        ("[" * 100_000, "x.json is not JSON (recursion limit exceeded at line 1 column 202); mend it"),
    ],
)
def test_what_is_not_as_expected_is_one_line_that_names_the_field(content, said):
    with pytest.raises(RunError) as error:
        typed.read(Outer, content, "x.json", "mend it")
    assert str(error.value) == said


def test_a_long_value_is_cut():
    with pytest.raises(RunError) as error:
        typed.read(Outer, json.dumps({"steps": "w" * 1000}), "x.json", "mend it")
    assert len(str(error.value)) < 130


def test_unknown_keys_are_ignored_and_whole_numbers_are_numbers():
    found = typed.read(Outer, '{"steps": 1, "shares": {"a": 1}, "of another version": []}', "x.json", "mend it")
    assert found == Outer(1, None, {"a": 1.0})


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(RunError, match=rf"^{tmp_path} cannot be read \(Is a directory\); mend it$"):
        typed.read_file(Outer, tmp_path, "mend it")


def test_a_manifest_of_another_version_is_read_and_what_it_holds_besides_stays(tmp_path):
    run = Run(tmp_path)
    run.manifest_file.write_text('{"stage": "sft", "status": "finished", "test": {"f1": 3}, "of tomorrow": {"x": 1}}')
    assert run.manifest == Manifest(stage="sft", status="finished", test=run.manifest.test)
    run.note(steps=3)
    assert run.manifest.steps == 3 and json.loads(run.manifest_file.read_text())["of tomorrow"] == {"x": 1}


def test_a_sweep_that_names_a_folder_elsewhere_is_refused(tmp_path):
    written = {"members": [{"run": "../../home"}]}
    (tmp_path / "sweep.json").write_text(json.dumps(written))
    with pytest.raises(RunError, match=r"sweep\.json: '\.\./\.\./home' is no name of a run"):
        read_sweep(tmp_path)


def test_a_sweep_reads_back_as_it_was_written(tmp_path):
    shutil.copytree(RUNS / "tiny", tmp_path / "tiny")
    sweep = collect(find_members("tiny", [], "0.1", root=tmp_path))
    assert read_sweep(tmp_path / "tiny") == sweep and sweep.choice == "dpo"


# --- any value anywhere ---


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value below the root."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in below:
        yield (*at, key)
        yield from places(value, (*at, key))


def mutated(tree: Any, draw: random.Random) -> tuple[Any, str]:
    """The same with one value removed or of another type, and the name of the field."""
    tree = copy.deepcopy(tree)
    field = draw.choice(list(tree))
    place = draw.choice([place for place in places(tree) if place[0] == field])
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    if draw.random() < 0.3:
        del inner[place[-1]]
    else:
        inner[place[-1]] = draw.choice(OTHERS)
    return tree, field


def read_all(root: Path) -> Iterator[str]:
    """What each reader of a run directory makes of it, or the one line with which it refuses."""
    readers = (
        lambda: write_report(root / "tiny" / "dpo"),
        lambda: write_report(root / "tiny"),
        lambda: summarize(Run(root / "tiny" / "dpo")),
        lambda: summarize(Run(root / "tiny" / "sft")),
        lambda: find_run(str(root / "tiny")),
        lambda: find_run(str(root / "tiny"), best=True),
    )
    for read in readers:
        try:
            read()
        except RunError as error:
            yield str(error)


@pytest.fixture
def light(tmp_path) -> Path:
    """Runs that have just begun, so that a page has no curves to draw; beside them a sweep of others."""
    root = shutil.copytree(RUNS, tmp_path / "runs")
    for stage in ("sft", "dpo"):
        run = Run(root / "tiny" / stage)
        run.metrics_file.write_text("")
        run.note(status="running")
    return root


@pytest.mark.parametrize("name", ["dpo/manifest.json", "sft/manifest.json", "data.json", "sweep.json"])
def test_no_value_anywhere_is_a_traceback(light, name):
    """A value removed or replaced at a random place: whatever reads it succeeds, or says in one line what is wrong."""
    if name != "data.json":
        (light / "tiny/data.json").unlink()  # its pictures take time
    if name != "sweep.json":
        (light / "tiny/sweep.json").unlink()
    file, draw = light / "tiny" / name, random.Random(name)
    sound, refused = json.loads(file.read_text()), 0
    for _ in range(MUTATIONS):
        tree, field = mutated(sound, draw)
        file.write_text(json.dumps(tree))
        for line in read_all(light):
            assert "\n" not in line
            refused += file.name in line and field in line
    assert refused > 0 or name == "data.json"  # whose faults stand on the page
