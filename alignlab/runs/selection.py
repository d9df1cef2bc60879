"""Which runs are evaluated: a recipe's DPO run, one by name, the chosen of a sweep, or several; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from alignlab.errors import RecipeError, RunError
from alignlab.recipe.load import load_recipe, run_name
from alignlab.runs.run import RUNS, Run, find_run, finished, runs_folder


def find_runs(
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    run: str | None = None,
    runs: Sequence[str] = (),
    best: bool = False,
    root: Path = RUNS,
) -> list[Run]:
    """The finished runs that a command names; RunError says what to do where one is not there.

    One run stands for itself and what it was made from; several stand for themselves.
    """
    if recipe is None and not runs:
        raise RecipeError("which recipe? name one, as in `alignlab eval tiny`, or runs with --runs A B C")
    if sum((run is not None, bool(runs), best)) > 1:
        raise RecipeError("--run, --runs and --best each say which runs are evaluated; give one of them")
    if runs:
        if len({Path(each).as_posix() for each in runs}) < len(runs):
            raise RunError(f"the same run is named twice: {' '.join(runs)}")
        found = [_one_of(recipe, each, root) for each in runs]
        return [finished(run) for run in found]
    assert recipe is not None
    if run is not None or best or runs_folder(recipe, root) == Path(recipe):
        return [finished(find_run(recipe, run, best=best, root=root))]
    return [finished(_default(recipe, overrides, root))]


def _one_of(recipe: str | None, name: str, root: Path) -> Run:
    """A run by its name beside the recipe's others, or by its directory."""
    if recipe is None or Run(Path(name)).has_started:
        return find_run(name, root=root)
    return find_run(recipe, name, root=root)


def _default(recipe: str, overrides: Sequence[str], root: Path) -> Run:
    """The DPO run that these words make."""
    loaded = load_recipe(recipe, overrides)
    run = Run(root / loaded.name / run_name(loaded, "dpo"))
    if not run.has_started:
        raise RunError(f"there is no run at {run.path}; `alignlab dpo {' '.join([recipe, *overrides])}` trains it")
    return run


def folder_of(runs: Sequence[Run]) -> Path:
    """Where the evaluation is written: the run's own directory, or the nearest folder that holds all the runs."""
    if len(runs) == 1:
        return runs[0].path
    return Path(os.path.relpath(os.path.commonpath([run.path.resolve().parent for run in runs])))


def names_of(runs: Sequence[Run]) -> list[str]:
    """The runs' directory names, with their recipes' where they would not tell them apart."""
    for parts in (1, 2, 3):
        names = ["/".join(run.path.resolve().parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.path) for run in runs]
