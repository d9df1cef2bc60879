"""The listing is the diagram: each module imports only from those above it, and the light ones stay light."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import alignlab
from alignlab.recipe import load as recipe
from alignlab.recipe.fields import library_settings

PACKAGE = Path(alignlab.__file__).parent
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in PACKAGE.rglob("*.py")
}
HEAVY = ("torch", "trl", "transformers", "peft", "datasets", "accelerate", "wandb")
LIGHT = (
    *("", "cli.commands", "data.prepare", "data.toy", "data.transcript", "doctor.examination", "memory"),
    *("recipe.arguments", "recipe.load", "reports.page", "reports.summary", "runs.facts", "runs.run", "sweeps.choice"),
    "train.guards",
)
ROOMS = runpy.run_path(str(PACKAGE.parent / "docs" / "make.py"))["ROOMS"]  # the order of docs/architecture.md
ENTRIES = 20  # the listing is the diagram, and this is as much as one remembers
SECTIONS = [each for name, each in vars(recipe).items() if name.endswith("Section")]
READERS = set(TREES) - {"recipe.load", "recipe.rules", "recipe.show"}


def imported(tree: ast.AST) -> set[str]:
    """The package's modules that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below if below <= {f"alignlab.{name}" for name in TREES} else {node.module, *below}
    return {name.removeprefix("alignlab.") for name in found if name.startswith("alignlab.")} & set(TREES)


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({name: imported(tree) for name, tree in TREES.items()}).prepare()


def test_a_room_imports_only_from_those_before_it():
    def room(module: str) -> int:
        return ROOMS.index(module.partition(".")[0])

    rooms = {name for name in TREES if name.partition(".")[0] not in ("__init__", "__main__", "")}
    against = [(name, other) for name in rooms for other in imported(TREES[name]) if room(other) > room(name)]
    assert against == []


def test_the_listing_is_short():
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed", "recipes")]
    assert len(entries) <= ENTRIES, sorted(entries)


def test_an_import_inside_a_function_counts():
    lines = (
        "def f():",
        "    from alignlab.train.stages import x",
        "    import alignlab.runs.run",
        "    from alignlab import __version__",
        "    from alignlab.data import toy",
        "    from alignlab.memory import fakes",
    )
    assert imported(ast.parse("\n".join(lines))) == {"train.stages", "runs.run", "data.toy", "memory.fakes"}


@pytest.mark.parametrize("module", sorted(TREES))
def test_a_module_opens_with_one_sentence(module):
    opening = (ast.get_docstring(TREES[module]) or "").partition("\n\n")[0]
    assert opening.rstrip()[-1:] in (".", ":"), opening


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module):
    assert heavy_after(f"import alignlab.{module}".rstrip(".")) == "[]"


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["dpo", "--help"], ["list"], ["show", "tiny", "dpo.bta=1"]]
)
def test_a_command_that_trains_nothing_imports_nothing_heavy(command):
    library_settings()  # the first recipe after an installation reads the libraries' fields, once
    main = f"from alignlab.cli.commands import main\ntry:\n    main({command})\nexcept SystemExit:\n    pass"
    assert heavy_after(main) == "[]"


def heavy_after(statement: str) -> str:
    """The heavy packages that a fresh interpreter has imported after `statement`."""
    program = f"import sys\n{statement}\nprint('\\n' + str([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_read_somewhere(section):
    read = {node.attr for name in READERS for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert {field.name for field in dataclasses.fields(section)} <= read


def test_every_module_imports_where_what_only_posix_has_is_missing():
    """Of alignlab's own imports; libraries have theirs in hand."""
    program = f"""
import builtins, importlib
find = builtins.__import__
def absent(name, globals=None, *rest, **more):
    if (globals or {{}}).get("__name__", "").startswith("alignlab") and name in ("resource", "fcntl", "pwd", "termios"):
        raise ModuleNotFoundError(name)
    return find(name, globals, *rest, **more)
builtins.__import__ = absent
for name in {sorted(TREES)}:
    if name not in ("__init__", "__main__"):
        importlib.import_module("alignlab." + name.removesuffix(".__init__"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
