"""What an installation without extras does: all but what needs them, and one line for that."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from alignlab.errors import MachineError, lacks, need

ROOT = Path(__file__).parents[1]
OPTIONAL = ("openai", "evalica", "datasketch", "ftfy", "matplotlib", "fastapi", "uvicorn")
PROGRAM = """
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {optional} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
from alignlab.cli.commands import main

for words in {commands}:
    print("==", *words, flush=True)
    code = main(words)
    print("exit", code, flush=True)

import alignlab.train.stages, alignlab.evaluation.evaluator, alignlab.rounds.constitution, alignlab.rounds.rounds
from alignlab.evaluation.ratings import rate
print("==", "rate")
print(rate({{("a", "b"): [1.0, 0.0]}}, "a"))
assert not set(sys.modules) & set({optional})
"""
RUN = "runs/tiny/dpo"
COMMANDS = {
    "list": ["list"],
    "show": ["show", "seconds.yaml"],
    "data": ["data", "seconds.yaml"],
    "gate": ["data", "seconds.yaml", "--fail-on", "near-overlap"],
    "report": ["report", RUN],
    "figures": ["report", RUN, "--figures", "figures"],
    "judge": ["eval", RUN, "--judge", "llm:some-model"],
    "writer": ["pairs", "seconds.yaml", "--judge", "llm:some-model", "--out", "pairs.jsonl"],
    "vote": ["vote", RUN],
}


@pytest.fixture(scope="module")
def folder(folders, of_seconds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    (folder / "seconds.yaml").write_text(of_seconds(folders["llama"]))
    shutil.copytree(ROOT / "tests/cases/runs", folder / "runs")
    return folder


@pytest.fixture(scope="module")
def said(folder) -> dict[str, str]:
    """What each command says in one process in which the optional libraries cannot be found."""
    program = PROGRAM.format(optional=OPTIONAL, commands=list(COMMANDS.values()))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    _, *parts = re.split(r"^== .*\n", done.stdout, flags=re.MULTILINE)
    return dict(zip([*COMMANDS, "rate"], parts, strict=True))


@pytest.mark.parametrize("name", ["list", "show", "data", "report"])
def test_a_command_works_without_the_extras(said, name):
    assert said[name].splitlines()[-1] == "exit 0", said[name]


def test_data_says_once_what_it_does_not_look_for(said):
    line = (
        "data: looking for near-duplicates, near-overlap, prompt-overlap, mojibake needs datasketch and ftfy, "
        "which are not installed; pip install 'alignlab[doctor]'"
    )
    assert said["data"].splitlines().count(line) == 1 and said["data"].count("not installed") == 1


def test_a_page_without_charts_says_in_one_sentence_what_to_install(said, folder):
    page = (folder / RUN / "report.html").read_text(encoding="utf-8")
    line = "drawing charts needs matplotlib, which is not installed; pip install &#39;alignlab[report]&#39;"
    assert page.count(line) == 1 and page.count("not installed") == 1
    assert "<svg" not in page and 'id="curves"' in page and "A ring marks" not in page


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gate", "--fail-on near-overlap: looking for"),
        ("figures", "--figures needs matplotlib, which is not installed; pip install 'alignlab[report]'"),
        ("judge", "--judge llm:some-model needs openai, which is not installed; pip install 'alignlab[judge]'"),
        ("writer", "--judge llm:some-model needs openai, which is not installed; pip install 'alignlab[judge]'"),
        ("vote", "alignlab vote needs fastapi and uvicorn and evalica, which are not installed; pip install 'ali"),
    ],
)
def test_what_needs_an_extra_is_one_line_that_says_what_to_install(said, name, line):
    first, *more = said[name].splitlines()  # and nothing before it: no run is looked up, no model loaded
    assert first.startswith(line) and more == ["exit 2"], said[name]


def test_without_evalica_there_are_no_ratings_and_one_line(said):
    line = "no ratings: rating models needs evalica, which is not installed; pip install 'alignlab[judge]'"
    assert said["rate"].splitlines() == [line, "{}"]


def test_only_what_is_missing_is_named():
    assert lacks("this", "judge", "json") is None
    need("this", "judge", "json")
    with pytest.raises(MachineError) as e:
        need("this", "x", "json", "no_such")
    assert str(e.value) == "this needs no-such, which is not installed; pip install 'alignlab[x]'"


def test_every_extra_that_the_code_names_is_declared():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "alignlab").rglob("*.py"))
    named = set(re.findall(r'(?:need|lacks)\(f?".*?", "([a-z-]+)", ', code))
    declared = set(re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) == 5 and named <= declared


def test_a_wheel_holds_recipes_and_launch_files(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    names = set(ZipFile(next(wheel.build(directory=str(tmp_path), versions=["standard"]))).namelist())
    for folder in ("recipes", "accelerate_configs"):
        assert {f"alignlab/{folder}/{path.name}" for path in (ROOT / folder).glob("*.yaml")} <= names
