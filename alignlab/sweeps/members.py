"""A sweep's members: one recipe with several settings, each an ordinary DPO run; imports no torch."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import RecipeError, RunError
from alignlab.recipe.load import Recipe, consumed, load_recipe, run_name
from alignlab.runs.run import SWEEP, Run, Sweep, read_sweep

log = logging.getLogger(__name__)

BETA = "dpo.beta"


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    settings: Mapping[str, Any]  # what is its own: "dpo.beta" → 0.3
    recipe: Recipe  # with its settings
    words: tuple[str, ...]  # the same on a command line, as overrides

    @property
    def name(self) -> str:
        return run_name(self.recipe, "dpo")

    @property
    def beta(self) -> float:
        return self.recipe.dpo["beta"]


@dataclass(frozen=True)
class Members:
    """The runs that a command asks for, and those that an earlier one left in its table."""

    recipe: Recipe  # without any member's own settings
    folder: Path  # runs/RECIPE
    command: tuple[str, ...]  # the recipe and the overrides that all share, as written
    grid: Mapping[str, Sequence[str]]  # key → its values, as written
    asked: Sequence[Member]
    earlier: Sequence[Member] = ()

    @property
    def all(self) -> list[Member]:
        return sorted([*self.earlier, *self.asked], key=lambda member: (-member.beta, member.name))

    @property
    def shared(self) -> list[str]:
        """The overrides that all members share and that change the recipe."""
        return [word for word in self.recipe.overrides if not word.startswith("sweep.")]


def find_members(
    recipe: str,
    overrides: Sequence[str] = (),
    betas: str | None = None,
    grid: Sequence[str] = (),
    root: Path = Path("runs"),
) -> Members:
    """The members that `alignlab sweep RECIPE OVERRIDES --betas BETAS --grid GRID` names, and the earlier ones.

    They are each beta with each combination of the grid's values; the betas are the recipe's unless said. A key
    without a section is one of `dpo`. RecipeError where a value is no good, or two members would be one run.
    """
    given = _read_grid(grid)
    if betas is not None and BETA in given:
        raise RecipeError(f"--betas {betas} and --grid {BETA}={','.join(given[BETA])} both name betas; leave one out")
    axes = {key: values for key, values in given.items() if len(values) > 1 or key == BETA}
    shared = [*overrides, *(f"{key}={values[0]}" for key, values in given.items() if key not in axes)]
    asked = [f"sweep.betas=[{', '.join(map(_number, _split(betas, '--betas ')))}]"] if betas is not None else []
    base = load_recipe(recipe, [*shared, *asked])
    axes = {BETA: [repr(beta) for beta in base.sweep.betas]} | axes
    _refuse_settings_of_all(shared, axes)
    found = [
        _member(recipe, shared, [f"{key}={value}" for key, value in zip(axes, values, strict=True)])
        for values in product(*axes.values())
    ]
    _refuse_equal(found)
    members = Members(base, root / base.name, (recipe, *shared), axes, found)
    return replace(members, earlier=list(_earlier(members)))


def _read_grid(words: Sequence[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise RecipeError(f"--grid {word} is no setting with its values; write dpo.learning_rate=5e-6,1e-6")
        key = name if "." in name else f"dpo.{name}"
        if key != name:
            log.info("--grid %s means %s", name, key)
        if key in grid:
            raise RecipeError(f"--grid names {key} twice; write all of its values in one list")
        grid[key] = _split(text, f"--grid {name}=")
    return grid


def _split(text: str, option: str) -> list[str]:
    """The items of a list as they are written, commas inside of brackets and quotes left alone."""
    written = f"[{text}]"
    try:
        node = yaml.compose(written, yaml.SafeLoader)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{option}{text} is no list of values: {why}; write 0.5,0.3") from None
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise RecipeError(f"{option.strip()} has no values; write some, such as 0.5,0.3")
    return [written[item.start_mark.index : item.end_mark.index] for item in node.value]


def _number(text: str) -> str:
    """The same number as YAML writes it, which takes 1e-06 for text; what is no number stays, and is refused later."""
    try:
        written = repr(float(text))
    except ValueError:
        return text
    return written if "." in written else written.replace("e", ".0e")


def _refuse_settings_of_all(shared: Sequence[str], axes: Mapping[str, Sequence[str]]) -> None:
    for word in shared:
        if (key := word.partition("=")[0]) in axes:
            raise RecipeError(
                f"{word} is for all members, but {key} is swept over {', '.join(axes[key])}; leave one out"
            )


def _member(recipe: str, shared: Sequence[str], own: Sequence[str]) -> Member:
    loaded = load_recipe(recipe, [*shared, *own])
    inputs = consumed(loaded, "dpo")
    keys = [word.partition("=")[0] for word in own]
    return Member({key: _value_at(inputs, key) for key in keys}, loaded, (*shared, *own))


def _value_at(inputs: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; RecipeError where a DPO run does not depend on such a key."""
    value: Any = inputs
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise RecipeError(f"--grid {key} would make equal members: no DPO run depends on it")
        value = value[name]
    return value


def _refuse_equal(members: Sequence[Member]) -> None:
    seen: dict[str, Member] = {}
    for member in members:
        if other := seen.get(member.name):
            both = " and ".join(" ".join(each.words[-len(each.settings) :]) for each in (other, member))
            raise RecipeError(f"{both} are two equal members, {member.name}; leave one out")
        seen[member.name] = member


def _earlier(members: Members) -> Iterator[Member]:
    """The members of the table that is there whose runs are there too, where all but their own settings is the same."""
    recorded = _recorded(members.folder)
    if recorded is None:
        return
    if recorded.overrides is not None and [*recorded.overrides] != members.shared:
        table, others = members.folder / SWEEP, " ".join(recorded.overrides) or "none"
        log.info("%s is of other settings for all members (%s): its members are not of this sweep", table, others)
        return
    names = {member.name for member in members.asked}
    for row in recorded.members:
        if row.run in names or not Run(members.folder / row.run).has_started:
            continue
        own = [f"{key}={json.dumps(value)}" for key, value in row.settings.items()]
        try:
            member = _member(members.command[0], members.command[1:], own)
        except RecipeError:
            continue  # the recipe has changed meanwhile: its run is another sweep's
        if member.name == row.run:
            yield member


def _recorded(folder: Path) -> Sweep | None:
    """The sweep as it was written; none where there is none that can be read, as it is made anew."""
    try:
        return read_sweep(folder)
    except RunError as error:
        log.warning("%s", error)
        return None


def commands(members: Members) -> list[str]:
    """One complete command a line: first what all members share, then each member."""
    program = ["alignlab"] if shutil.which("alignlab") else [sys.executable, "-m", "alignlab"]
    recipe, *shared = members.command
    grid = [f"{key}={','.join(values)}" for key, values in members.grid.items()]
    first = ["sweep", recipe, *shared, "--grid", *grid, "--shared"]
    return [shlex.join([*program, *words]) for words in (first, *(["dpo", recipe, *m.words] for m in members.asked))]
