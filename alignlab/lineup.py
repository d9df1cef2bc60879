"""Which runs are evaluated: a recipe's DPO run, one by name, the chosen of a sweep, or several; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from alignlab.errors import RecipeError, RunError
from alignlab.recipe import load_recipe, run_name
from alignlab.run import Run
from alignlab.sweep.choice import chosen_run


def find_runs(
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    run: str | None = None,
    runs: Sequence[str] = (),
    best: bool = False,
    root: Path = Path("runs"),
) -> list[Run]:
    """The finished runs that a command names; RunError says what to do where one is not there.

    One run stands for itself and what it was made from; several stand for themselves.
    """
    if recipe is None and not runs:
        raise RecipeError("which recipe? name one, as in `alignlab eval tiny`, or runs with --runs A B C")
    if sum((bool(run), bool(runs), best)) > 1:
        raise RecipeError("--run, --runs and --best each say which runs are evaluated; give one of them")
    if recipe is not None and (Path(recipe) / "manifest.json").is_file():
        if run or runs or best:
            raise RecipeError(f"{recipe} is a run itself; leave --run, --runs and --best out, or name its recipe")
        return [_finished(Path(recipe), None)]
    name = load_recipe(recipe, overrides).name if recipe else None
    folder = root / name if name else root
    if runs:
        if len({Path(each).as_posix() for each in runs}) < len(runs):
            raise RunError(f"the same run is named twice: {' '.join(runs)}")
        return [_finished(folder / each if (folder / each).is_dir() else Path(each), None) for each in runs]
    if best:
        return [_finished(chosen_run(folder), recipe)]
    return [_finished(folder / (run or run_name(load_recipe(recipe, overrides), "dpo")), _command(recipe, overrides))]


def _command(recipe: str | None, overrides: Sequence[str]) -> str:
    return " ".join([str(recipe), *overrides])


def _finished(path: Path, recipe: str | None) -> Run:
    found = Run(path)
    status = found.manifest.status if found.has_started else None
    if status == "finished" and found.model.is_dir():
        return found
    stage = "sft" if path.name.startswith("sft") else "dpo"
    remedy = f"`alignlab {stage} {recipe}` trains it" if recipe else "name a finished run, or train it first"
    if status is None:
        raise RunError(f"there is no run at {path}; {remedy}")
    what = "finished, but its model/ is gone" if status == "finished" else f"not finished ({status})"
    raise RunError(f"{path} is {what}; {remedy}")


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
