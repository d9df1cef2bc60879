"""What one run directory says, as a report needs it: still going, stopped, failed or finished."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from alignlab.disk import read_record
from alignlab.errors import RunError
from alignlab.report.curves import is_number, read_metrics
from alignlab.report.replies import last_samples
from alignlab.report.verdict import with_interval
from alignlab.run import EXAMINATION, Run, refuse_changed

TEST = {  # name in the manifest → name here, and whether it is a share
    "rewards/accuracies": ("accuracy", True),
    "rewards/margins": ("margin", False),
    "perplexity": ("perplexity", False),
    "reference_perplexity": ("reference_perplexity", False),
    "kl": ("kl", False),
    "reply_tokens": ("reply_tokens", False),
    "eos_rate": ("eos_rate", True),
}
EXAMINED = {"tokens": dict, "histogram": dict, "findings": list, "features": list}  # what a report shows of the data
OVER_REPLIES = ("kl", "reply_tokens", "eos_rate")  # whose n is the number of sampled replies


def read_run(path: Path) -> dict[str, Any]:
    """The facts of a run, with its metric rows under `rows` and its last replies under `samples`."""
    run = Run(path)
    refuse_changed(run)
    rows, notices = read_metrics(run.metrics_file)
    manifest = _manifest(run, bool(rows))
    samples, split = last_samples(run.samples_file)
    stage, consumed = manifest["stage"], _table(manifest.get("consumed"))
    settings, data, model = (_table(consumed.get(key)) for key in (stage, "data", "model"))
    evaluation = read_evaluation(path / "eval.json")
    test = _test(_table(manifest.get("test")), sum(row.get("split") == "test" for row in samples))
    return {
        "name": path.resolve().name,
        "recipe": path.resolve().parent.name,
        "folder": str(path),
        "stage": stage,
        **_fate(manifest, rows, settings),
        "limits": _table(manifest.get("limits")),
        "warnings": [w for w in manifest.get("warnings") or [] if isinstance(w, dict) and "guard" in w],
        "versus": _versus(model),
        "reference_name": "SFT" if _versus(model) == "SFT" else "reference",
        "reference": manifest.get("reference"),
        "parent": _table(manifest.get("parent")).get("run"),
        "before": _before(path, manifest),
        "beta": settings.get("beta"),
        "test": test,
        "win_rate": _win_rate(stage, _table(manifest.get("test")), data.get("source"), evaluation),
        "evaluation": evaluation,
        "evaluations": _evaluations(rows, manifest.get("best_step")),
        "data": _table(manifest.get("data")),
        "examination": _examination(run, _table(manifest.get("data")), notices),
        "data_from": {key: data.get(key) for key in ("source", "path", "subset", "format") if data.get(key)},
        "samples_split": split,
        "where": _where(manifest),
        "recipe_yaml": _recipe_text(run, consumed),
        "settings": _settings(run, consumed),
        "command": manifest.get("command"),
        "repeat": f"alignlab {stage} {shlex.quote(str(run.recipe_file))} --run again",
        "notices": notices,
        "rows": rows,
        "samples": samples,
    }


def _manifest(run: Run, has_metrics: bool) -> dict[str, Any]:
    manifest = run.manifest
    if not manifest:
        raise RunError(
            f"{run.path} holds no run (it has no manifest.json); name a run directory, such as runs/tiny/dpo"
        )
    if manifest.get("stage") not in ("sft", "dpo"):
        raise RunError(f"{run.manifest_file} names no stage that a report knows ({manifest.get('stage')!r})")
    if manifest.get("status") == "finished" and not has_metrics:
        raise RunError(f"{run.path} is finished, but has no metrics.jsonl; copy it from where the run was made")
    return manifest


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _examination(run: Run, data: Mapping[str, Any], notices: list[str]) -> Mapping[str, Any] | None:
    """What `alignlab data` has found in these very rows, where it was asked; a notice where it cannot be read."""
    file = run.path.parent / EXAMINATION
    try:
        found = read_record(file)
    except OSError:
        return None
    except ValueError as e:
        notices.append(f"{file} is {e}, and left out; make it anew with alignlab data")
        return None
    if not data.get("fingerprint") or found.get("fingerprint") != data["fingerprint"]:
        return None
    if not all(isinstance(found.get(name), kind) for name, kind in EXAMINED.items()):
        return None
    return {name: found[name] for name in EXAMINED}


def _fate(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], settings) -> dict[str, Any]:
    """How far the run came, and what ended it: a guard, an interruption, or nothing but its plan."""
    status, reason = manifest.get("status", "running"), manifest.get("stop_reason")
    steps = manifest.get("steps", rows[-1]["step"] if rows else None)
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
        "best_step": manifest.get("best_step"),
        "kept": manifest.get("kept"),
        "silent_seconds": round(max(0.0, time.time() - logged)) if is_number(logged) else None,
    }


def _ended(manifest: Mapping[str, Any], status: str, reason: str) -> str | None:
    if status == "stopped" and reason.startswith("interrupted"):
        return "interrupted"
    stops = _table(manifest.get("limits")).get("action") == "stop" and manifest.get("warnings")
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


def _test(test: Mapping[str, Any], replies: int) -> dict[str, Any]:
    """The test figures, each an estimate with its interval as far as its error is known."""
    found = {}
    for name, (called, share) in TEST.items():
        value = test.get(name)
        if is_number(value):
            n = test.get("n", replies if called in OVER_REPLIES and replies else None)
            value = {"mean": value, "stderr": test.get(f"{name}_stderr"), "n": n}
        if isinstance(value, Mapping) and (estimate := with_interval(value, share)):
            found[called] = estimate
    return found


def _win_rate(stage: str, test, source: str | None, evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How often the policy beats its reference: as `alignlab eval` judged it, else by the toy's rule."""
    for row in (evaluation or {}).get("win_rates") or []:
        names = (row.get("a"), row.get("b"))
        if stage == "dpo" and set(names) == {"dpo", "sft"} and (estimate := with_interval(row.get("raw"), True)):
            ours = estimate if names[0] == "dpo" else mirrored(estimate)
            return {**ours, "judge": _judge(evaluation.get("judge"))}
    if estimate := with_interval(test.get("win_rate"), True):
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


def _before(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The SFT run's own evaluation before its first step, which is the base model's, and its figure on the test split.

    The SFT run is looked for where the manifest says and beside this run, so that folders may be moved.
    """
    name = _table(manifest.get("parent")).get("run")
    for folder in (path.resolve().parent / Path(str(name)).name, Path(str(name))) if name else ():
        rows, _ = read_metrics(folder / "metrics.jsonl")
        if rows and rows[0]["step"] == 0:
            return _evaluation_row(rows[0])
    return None


def _where(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, versions, time and memory."""
    machine, processes = _table(manifest.get("machine")), manifest.get("world_size")
    seconds = manifest.get("training_seconds")
    gpu = machine.get("gpu") or machine.get("gpus")
    hours = seconds * (processes or 1) / 3600 if is_number(seconds) else None
    return {
        "machine": machine,
        "versions": _table(manifest.get("versions")),
        "git_commit": manifest.get("git_commit"),
        "started": manifest.get("started"),
        "finished": manifest.get("finished"),
        "wall_seconds": _between(manifest.get("started"), manifest.get("finished")),
        "training_seconds": seconds,
        "processes": processes,
        "device": "GPU" if gpu else "CPU",
        "device_hours": hours,
        "peak_memory_gib": manifest.get("peak_memory_gib"),
        "planned_gib": manifest.get("planned_gib"),
        "base": _table(manifest.get("base")).get("name"),
        "wandb_id": manifest.get("wandb_id"),
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


def read_sweep(file: Path) -> dict[str, Any]:
    """What `alignlab sweep` wrote: the members with their estimates, and the choice."""
    try:
        found = read_record(file)
        members = [_member(member) for member in found["members"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise RunError(f"{file} is not a sweep's ({type(e).__name__}: {e}); make it anew with alignlab sweep") from None
    keys = ("rule", "max_kl", "choice", "why")
    return {"recipe": found.get("recipe") or "", **{key: found.get(key) for key in keys}, "members": members}


def _member(member: Mapping[str, Any]) -> dict[str, Any]:
    shares = {"accuracy": True, "win_rate": True}
    names = ("margin", "margin_over_beta", "accuracy", "kl", "win_rate")
    settings = _table(member.get("settings"))
    short = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
    return {
        "name": Path(member["run"]).name,
        "label": short or Path(member["run"]).name,
        "settings": dict(settings),
        "status": member.get("status"),
        "error": member.get("error"),
        **{name: with_interval(_table(member.get(name)), shares.get(name, False)) for name in names},
        "perplexity_change": member.get("perplexity_change"),
    }
