"""What one run directory says, as a report needs it: still going, stopped, failed or finished."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from alignlab import typed
from alignlab.disk import read_record
from alignlab.errors import RunError
from alignlab.estimate import Estimate, is_number
from alignlab.report.curves import read_metrics
from alignlab.report.replies import last_samples
from alignlab.report.verdict import with_interval
from alignlab.run import (
    EXAMINATION,
    Examination,
    Figures,
    Manifest,
    Rows,
    Run,
    Sweep,
    SweepMember,
    parent_of,
    refuse_changed,
)

SHARES = ("accuracy", "eos_rate")
OVER_REPLIES = ("kl", "reply_tokens", "eos_rate")  # whose n is the number of sampled replies


def read_run(path: Path) -> dict[str, Any]:
    """The facts of a run, with its metric rows under `rows` and its last replies under `samples`."""
    run = Run(path)
    refuse_changed(run)
    rows, notices = read_metrics(run.metrics_file)
    manifest = _manifest(run, bool(rows))
    samples, split = last_samples(run.samples_file)
    stage, consumed = manifest.stage, manifest.consumed
    settings, data, model = (_table(consumed.get(key)) for key in (stage, "data", "model"))
    evaluation = read_evaluation(path / "eval.json")
    examination, faults = _examination(run, manifest.data)
    test = _test(manifest.test, sum(row.get("split") == "test" for row in samples))
    return {
        "name": path.resolve().name,
        "recipe": path.resolve().parent.name,
        "folder": str(path),
        "stage": stage,
        **_fate(manifest, rows, settings),
        "limits": asdict(manifest.limits) if manifest.limits else {},
        "warnings": [asdict(warning) for warning in manifest.warnings],
        "versus": _versus(model),
        "reference_name": "SFT" if _versus(model) == "SFT" else "reference",
        "reference": manifest.reference,
        "parent": manifest.parent and manifest.parent.run,
        "before": _before(parent_of(run)),
        "beta": settings.get("beta"),
        "test": test,
        "win_rate": _win_rate(stage, manifest.test, data.get("source"), evaluation),
        "evaluation": evaluation,
        "evaluations": _evaluations(rows, manifest.best_step),
        "data": asdict(manifest.data) if manifest.data else {},
        "examination": examination,
        "data_from": {key: data.get(key) for key in ("source", "path", "subset", "format") if data.get(key)},
        "samples_split": split,
        "where": _where(manifest),
        "recipe_yaml": _recipe_text(run, consumed),
        "settings": _settings(run, consumed),
        "command": manifest.command,
        "repeat": f"alignlab {stage} {shlex.quote(str(run.recipe_file))} --run again",
        "notices": [*notices, *faults],
        "rows": rows,
        "samples": samples,
    }


def _manifest(run: Run, has_metrics: bool) -> Manifest:
    if not run.has_started:
        raise RunError(
            f"{run.path} holds no run (it has no manifest.json); name a run directory, such as runs/tiny/dpo"
        )
    manifest = run.manifest
    if manifest.status == "finished" and not has_metrics:
        raise RunError(f"{run.path} is finished, but has no metrics.jsonl; copy it from where the run was made")
    return manifest


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _examination(run: Run, data: Rows | None) -> tuple[Mapping[str, Any] | None, list[str]]:
    """What `alignlab data` has found in these very rows, where it was asked; and what is wrong with its file."""
    file = run.path.parent / EXAMINATION
    if not data or not data.fingerprint or not file.is_file():
        return None, []
    try:
        found = typed.read_file(Examination, file, f"make it anew with alignlab data {run.path.parent.name}")
    except RunError as e:
        return None, [str(e)]
    return (asdict(found) if found.fingerprint == data.fingerprint else None), []


def _fate(manifest: Manifest, rows: Sequence[Mapping[str, Any]], settings) -> dict[str, Any]:
    """How far the run came, and what ended it: a guard, an interruption, or nothing but its plan."""
    status, reason = manifest.status, manifest.stop_reason
    steps = rows[-1]["step"] if manifest.steps is None and rows else manifest.steps
    planned = _planned_steps(settings, rows)
    logged = rows[-1].get("time") if rows else None
    early = status != "running" and planned is not None and steps is not None and steps < planned
    return {
        "status": status,
        "stop_reason": reason,
        "ended": _ended(manifest, status, str(reason)),
        "steps": steps,
        "planned_steps": planned,
        "ended_early": early,
        "best_step": manifest.best_step,
        "silent_seconds": round(max(0.0, time.time() - logged)) if is_number(logged) else None,
    }


def _ended(manifest: Manifest, status: str, reason: str) -> str | None:
    if status == "stopped" and reason.startswith("interrupted"):
        return "interrupted"
    stops = manifest.limits and manifest.limits.action == "stop" and manifest.warnings
    planned = reason.startswith(("all ", "no better"))
    return "guard" if stops and status in ("stopped", "finished") and not planned else None


def _planned_steps(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int | None:
    """`max_steps`, or what the epochs come to by the last logged step; None where neither is known."""
    if is_number(most := settings.get("max_steps")) and most > 0:
        return int(most)
    epochs = settings.get("num_train_epochs")
    last = next((row for row in reversed(rows) if is_number(row.get("train/epoch")) and row["train/epoch"] > 0), None)
    return round(last["step"] / last["train/epoch"] * epochs) if last and is_number(epochs) else None


def _versus(model: Mapping[str, Any]) -> str:
    if model.get("reference", "sft") == "base":
        return "the base model"
    return "the model it started from" if model.get("start") else "SFT"


def _test(test: Figures | None, replies: int) -> dict[str, Any]:
    """The test figures, each an estimate with its interval as far as its error is known."""
    if test is None:
        return {}
    figures = {"accuracy": test.accuracy, "margin": test.margin}
    for name in ("perplexity", "reference_perplexity", *OVER_REPLIES):
        n = replies or None if name in OVER_REPLIES else test.n
        figures[name] = Estimate(getattr(test, name), getattr(test, f"{name}_stderr", None), n)
    found = {name: with_interval(asdict(of), name in SHARES) for name, of in figures.items() if of}
    return {name: of for name, of in found.items() if of}


def _win_rate(
    stage: str, test: Figures | None, source: str | None, evaluation: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """How often the policy beats its reference: as `alignlab eval` judged it, else by the toy's rule."""
    for row in (evaluation or {}).get("win_rates") or []:
        names = (row.get("a"), row.get("b"))
        if stage == "dpo" and set(names) == {"dpo", "sft"} and (estimate := with_interval(row.get("raw"), True)):
            ours = estimate if names[0] == "dpo" else mirrored(estimate)
            return {**ours, "judge": _judge(evaluation.get("judge"))}
    if test and test.win_rate and (estimate := with_interval(asdict(test.win_rate), True)):
        return {**estimate, "judge": "by the toy's rule" if source == "toy" else None}
    return None


def mirrored(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """The share of the other side."""
    flip = lambda edge: None if edge is None else 1 - edge
    return {**estimate, "mean": 1 - estimate["mean"], "low": flip(estimate["high"]), "high": flip(estimate["low"])}


def _judge(judge: str | None) -> str | None:
    kind, _, name = (judge or "").partition(":")
    said = {"rule": "by a rule", "llm": f"judged by {name}", "reward": f"scored by {name}", "votes": "by votes"}
    return said.get(kind, judge)


def _evaluations(rows: Sequence[Mapping[str, Any]], best_step: int | None) -> dict[str, dict[str, Any]]:
    """The evaluations before the first step, at the step that was kept and at the last one, as far as there are."""
    evaluated = [row for row in rows if "eval/loss" in row]
    found = {
        "first": evaluated[:1],
        "kept": [r for r in evaluated if r["step"] == best_step][-1:],
        "last": evaluated[-1:],
    }
    return {when: _evaluation_row(row) for when, its in found.items() for row in its}


def _evaluation_row(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {"rewards/accuracies": "accuracy"} | {
        n: n for n in ("loss", "kl", "perplexity", "reply_tokens", "eos_rate")
    }
    figures = {called: row.get(f"eval/{name}") for name, called in names.items()}
    return {"step": row["step"], **{called: value for called, value in figures.items() if is_number(value)}}


def _before(parent: Run | None) -> dict[str, Any] | None:
    """The SFT run's own evaluation before its first step, which is the base model's."""
    rows, _ = read_metrics(parent.metrics_file) if parent else ([], [])
    return _evaluation_row(rows[0]) if rows and rows[0]["step"] == 0 else None


def _where(manifest: Manifest) -> dict[str, Any]:
    """Machine, versions, time and memory."""
    processes, seconds = manifest.world_size, manifest.training_seconds
    hours = seconds * (processes or 1) / 3600 if is_number(seconds) else None
    return {
        "machine": {name: value for name, value in asdict(manifest.machine).items() if value is not None},
        "versions": manifest.versions,
        "git_commit": manifest.git_commit,
        "started": manifest.started,
        "finished": manifest.finished,
        "wall_seconds": _between(manifest.started, manifest.finished),
        "training_seconds": seconds,
        "processes": processes,
        "device": "GPU" if manifest.machine.gpus else "CPU",
        "device_hours": hours,
        "peak_memory_gib": manifest.peak_memory_gib,
        "planned_gib": manifest.planned_gib,
        "base": manifest.base and manifest.base.name,
        "wandb_id": manifest.wandb_id,
    }


def _between(start: Any, end: Any) -> float | None:
    try:
        moments = [datetime.strptime(moment, "%Y-%m-%dT%H:%M:%SZ") for moment in (start, end)]
    except (TypeError, ValueError):
        return None
    return (moments[1] - moments[0]).total_seconds()


def _recipe_text(run: Run, consumed: Mapping[str, Any]) -> str:
    try:
        return run.recipe_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return yaml.safe_dump(json.loads(json.dumps(consumed)), sort_keys=False)


def _settings(run: Run, consumed: Mapping[str, Any]) -> dict[str, str]:
    """Every setting of the recipe by its dotted name, as JSON."""
    try:
        tree = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        tree = consumed
    return {
        key: json.dumps(value, ensure_ascii=False, default=str) for key, value in _flat(_table(tree)) if key != "about"
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found += _flat(value, f"{key}.") if isinstance(value, Mapping) and value else [(key, value)]
    return found


def read_evaluation(file: Path) -> dict[str, Any] | None:
    """What `alignlab eval` wrote; None where it has not run."""
    if not file.is_file():
        return None
    try:
        return read_record(file)
    except ValueError as e:
        raise RunError(f"{file} is {e}; make it anew with alignlab eval") from None


def sweep_facts(sweep: Sweep) -> dict[str, Any]:
    """What `alignlab sweep` wrote: the members with their estimates, and the choice."""
    return {**asdict(sweep), "members": [_member(member) for member in sweep.members]}


def _member(member: SweepMember) -> dict[str, Any]:
    short = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in member.settings.items())
    figures = {}
    for name in ("margin", "margin_over_beta", "accuracy", "kl", "win_rate"):
        figure = getattr(member, name)
        figures[name] = figure and with_interval(asdict(figure), name in ("accuracy", "win_rate"))
    return {
        "name": member.run,
        "label": short or member.run,
        "settings": dict(member.settings),
        "status": member.status,
        "error": member.error,
        **figures,
        "perplexity_change": member.perplexity_change,
    }
