"""The listing is the diagram: each module imports only from those above it, and the light ones stay light."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import alignlab
from alignlab import recipe
from alignlab.fields import library_settings

PACKAGE = Path(alignlab.__file__).parent
ORDER = (
    "errors rules fields store written recipe listing arguments shapes tape layers memory plan run launch guards "
    "quality summary transcript toy curves verdict replies reading facts charts report "
    "files rows words format sources splits pairing ledger prepared identity preparation data describe "
    "intervals winrate ratings judge endpoint model measures generate heldout samples layout packing reference "
    "monitor pretrain trainers figures train probe members choice sweep chat card merge difference hub export "
    "lineup kept candidates answers estimates prompts refusals harm stereotypes watch preference contests safety "
    "benchmarks scoreboard evaluate options cli __main__"
).split()
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
HEAVY = ("torch", "trl", "transformers", "peft", "datasets", "accelerate", "wandb")
SECTIONS = [each for name, each in vars(recipe).items() if name.endswith("Section")]
READERS = set(TREES) - {"recipe", "rules", "listing"}


def imported(tree: ast.AST) -> set[str]:
    """The package's modules that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "alignlab":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            found |= (
                {(node.module or "").removeprefix("alignlab.")}
                if (node.module or "").startswith("alignlab.")
                else set()
            )
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("alignlab.") for a in node.names if a.name.startswith("alignlab.")}
    return found & set(TREES)


def test_the_order_names_every_module_once():
    assert sorted(ORDER) == sorted(set(TREES) - {"__init__"})


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module):
    assert imported(TREES[module]) <= set(ORDER[: ORDER.index(module)])


def test_an_import_inside_a_function_counts():
    nested = (
        "def f():\n    from alignlab.train import x\n    import alignlab.run\n    from alignlab import toy, __version__"
    )
    assert imported(ast.parse(nested)) == {"train", "run", "toy"}


@pytest.mark.parametrize("module", sorted(TREES))
def test_a_module_opens_with_one_sentence(module):
    opening = (ast.get_docstring(TREES[module]) or "").partition("\n\n")[0]
    assert opening.rstrip()[-1:] in (".", ":"), opening


@pytest.mark.parametrize(
    "module", "__init__ recipe run summary transcript toy arguments data memory plan guards report judge".split()
)
def test_a_light_module_imports_nothing_heavy(module):
    name = "alignlab" if module == "__init__" else f"alignlab.{module}"
    assert heavy_after(f"import {name}") == "[]"


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["dpo", "--help"], ["list"], ["show", "tiny", "dpo.bta=1"]]
)
def test_a_command_that_trains_nothing_imports_nothing_heavy(command):
    library_settings()  # the first recipe after an installation reads the libraries' fields, once
    main = f"import alignlab.cli\ntry:\n    alignlab.cli.main({command})\nexcept SystemExit:\n    pass"
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
