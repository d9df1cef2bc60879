"""Which runs a report is about: a folder, a recipe's name or file, or runs by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignlab.errors import RunError
from alignlab.facts import sweep
from alignlab.run import Run


def find_runs(recipe: str, names: Sequence[str] = ()) -> list[Path]:
    """The folders that `alignlab report RECIPE --run NAME …` is about.

    RECIPE is a run directory, a folder of runs, or a recipe's name or file, whose runs are under `runs/`; the recipe
    itself need not be there. Without names: the sweep where there is one, else the run of `last_run`.
    """
    folder = runs_folder(recipe)
    if names:
        return [_named(folder, name) for name in names]
    return [folder] if Run(folder).has_started or (folder / sweep.FILE).is_file() else [last_run(recipe)]


def last_run(recipe: str) -> Path:
    """The DPO run that was started last, else the last SFT run; RECIPE as for `find_runs`."""
    folder = runs_folder(recipe)
    if Run(folder).has_started:
        return folder
    runs = _runs_in(folder)
    if not runs and folder.is_dir() and (folder / "metrics.jsonl").is_file():
        raise RunError(
            f"{folder} has no manifest.json, so it is no run directory; copy it whole from where it was made"
        )
    if not runs:
        raise RunError(f"there is no run of {recipe} yet (looked in {folder}); make one with alignlab dpo {recipe}")
    return max(runs, key=lambda path: (Run(path).manifest.stage == "dpo", _started(path)))


def runs_to_compare(names: Sequence[str]) -> list[Path]:
    """Each name's last run; of one recipe or folder of runs alone all of its runs, SFT first, as they were started."""
    if len(names) > 1:
        return [last_run(name) for name in names]
    folder = runs_folder(names[0])
    runs = [] if Run(folder).has_started else sorted(_runs_in(folder), key=_sft_first)
    return runs if len(runs) > 1 else [last_run(names[0])]


def runs_folder(recipe: str) -> Path:
    """Where the runs of RECIPE are: `runs/NAME` for a recipe's name or file, a folder itself."""
    path = Path(recipe)
    if path.is_dir():
        return path
    return Path("runs") / (path.stem if path.suffix in (".yaml", ".yml") else recipe)


def _named(folder: Path, name: str) -> Path:
    if not Run(folder / name).has_started:
        there = ", ".join(path.name for path in _runs_in(folder)) or "none"
        raise RunError(f"{folder / name} holds no run; there: {there}")
    return folder / name


def _runs_in(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob("*/manifest.json"))


def _sft_first(path: Path) -> tuple[bool, str, str]:
    return Run(path).manifest.stage != "sft", _started(path), path.name


def _started(path: Path) -> str:
    return Run(path).manifest.started or ""
