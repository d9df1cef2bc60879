"""Standard benchmarks by lm-eval (an optional extra) on the models as they are: what alignment cost elsewhere."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from alignlab.disk import hash_file
from alignlab.errors import DataError, MachineError, need
from alignlab.text.estimate import Estimate
from alignlab.text.tables import Row


def check_benchmarks(tasks: Sequence[str], folder: Path | None) -> None:
    """Says at once that a task's folder is not there, or that lm-eval is not installed."""
    if folder and not folder.is_dir():
        raise DataError(f"{folder}: no such folder of lm-eval tasks")
    if tasks:
        need("--lm-eval", "lm-eval", "lm_eval")


def run_benchmarks(
    model, tokenizer, tasks: Sequence[str], folder: Path | None, limit: int | None, batch_size: int
) -> dict[str, dict[str, Any]]:
    """lm-eval's figures by `task: metric`, each an estimate; its own prompts, zero-shot unless the task says more."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = _known_tasks(folder)
    if unknown := [task for task in tasks if task not in known.all_tasks]:
        raise DataError(
            f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, --tasks-folder adds more"
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    quiet = contextlib.redirect_stderr(io.StringIO()) if os.environ.get("TQDM_DISABLE") else contextlib.nullcontext()
    try:
        with quiet:
            found = evaluate(wrapped, known.load(list(tasks)), limit=limit, bootstrap_iters=1000, log_samples=False)
    except (OSError, ConnectionError) as e:
        raise MachineError(
            f"lm-eval cannot read the data of {', '.join(tasks)} ({str(e).splitlines()[0]}); fetch it where there is a "
            f"network, or point a task of --tasks-folder at a local file"
        ) from e
    return _figures(found["results"], found["n-samples"])


@cache
def _known_tasks(folder: Path | None):
    """lm-eval's list of tasks, which takes it seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


def identify_tasks(tasks: Sequence[str], folder: Path | None, limit: int | None) -> list[Any]:
    """What kept figures belong to: the tasks' names, the files of their folder, and lm-eval's version."""
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder else []
    contents = [[str(file.relative_to(folder)), hash_file(file)] for file in files]
    return [list(tasks), contents, limit, importlib.metadata.version("lm-eval")]


def _figures(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    found = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, way = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not way:
                continue
            stderr = metrics.get(f"{metric}_stderr,{way}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            error = float(stderr) if known else None
            its = Estimate(float(value), error).with_interval()
            n = samples.get(task, {}).get("effective")
            found[f"{task}: {metric}" + ("" if way == "none" else f" ({way})")] = asdict(replace(its, n=n))
    return found


def benchmark_rows(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """Rows of the table, from each model's figures; lm-eval gives no paired changes."""
    measures = dict.fromkeys(measure for its in figures.values() for measure in its)
    return [
        Row(
            group="lm-eval",
            measure=measure,
            values={model: Estimate(**its[measure]) for model, its in figures.items() if measure in its},
            note="lm-eval's own figure and error",
        )
        for measure in measures
    ]
