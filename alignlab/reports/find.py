"""Which runs a report is about: a folder, a recipe's name or file, or runs by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignlab.runs.run import SWEEP, Run, find_run, runs_folder, runs_in


def find_runs(recipe: str, names: Sequence[str] = ()) -> list[Path]:
    """The folders that `alignlab report RECIPE --run NAME …` is about; RECIPE as for `run.find_run`.

    Without names: the sweep where there is one, else the last run.
    """
    if names:
        return [find_run(recipe, name).path for name in names]
    folder = runs_folder(recipe)
    is_sweep = (folder / SWEEP).is_file() and not Run(folder).has_started
    return [folder if is_sweep else find_run(recipe).path]


def runs_to_compare(names: Sequence[str]) -> list[Path]:
    """Each name's last run; of one recipe or folder of runs alone all of its runs, SFT first, as they were started."""
    if len(names) > 1:
        return [find_run(name).path for name in names]
    folder = runs_folder(names[0])
    runs = [] if Run(folder).has_started else sorted(runs_in(folder), key=_sft_first)
    return [run.path for run in runs] if len(runs) > 1 else [find_run(names[0]).path]


def _sft_first(run: Run) -> tuple[bool, str, str]:
    return run.manifest.stage != "sft", run.manifest.started or "", run.path.name
