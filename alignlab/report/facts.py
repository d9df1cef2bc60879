"""Run directories → the facts of a report: what the page shows, and what `report.json` holds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.errors import RunError
from alignlab.report.curves import charts
from alignlab.report.reading import read_evaluation, read_run, sweep_facts
from alignlab.report.replies import judged_cases, side_by_side
from alignlab.report.verdict import compare_verdict, sweep_verdict, verdict
from alignlab.run import Run, read_sweep
from alignlab.text import harmless

TEXT_CHARACTERS = 20_000  # of any other text than a reply: a recipe, an error, a name
FIRST = ("dpo", "model", "data", "sft", "monitor")  # the sections whose differences come first


def facts_of_run(path: Path) -> dict[str, Any]:
    """The facts of one run."""
    return _facts("run", [read_run(path)], lambda runs: verdict(runs[0]))


def facts_of_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """The facts of runs side by side, and the settings in which they differ."""
    if len(paths) < 2:
        raise RunError("one run cannot be compared; name two or more, or see alignlab report")
    found = [read_run(path) for path in paths]
    for run, name in zip(found, _names(paths), strict=True):
        run["name"] = name
    if len({run["stage"] for run in found}) > 1:
        stages = ", ".join(f"{run['name']} is {run['stage']}" for run in found)
        raise RunError(f"only runs of one stage can be compared: {stages}")
    return _facts("compare", found, lambda runs: compare_verdict(runs, _same_data(runs)))


def facts_of_sweep(folder: Path) -> dict[str, Any]:
    """The facts of a sweep: its members' runs as far as they are there, the frontier and the choice."""
    written = read_sweep(folder)
    assert written is not None, f"{folder} holds a sweep"
    sweep = sweep_facts(written)
    there = {m["name"]: folder / m["name"] for m in sweep["members"] if Run(folder / m["name"]).has_started}
    found = [read_run(path) for name, path in sorted(there.items(), key=lambda item: item[0] != sweep["choice"])]
    labels = {m["name"]: m["label"] for m in sweep["members"]}
    for run in found:
        run["label"] = labels[run["name"]]
    facts = _facts("sweep", found, lambda runs: sweep_verdict(sweep, runs))
    notices = [notice for member in sweep["members"] for notice in _lacking(member, folder, there)]
    evaluation = read_evaluation(folder / "eval.json")
    cases = evaluation and judged_cases(evaluation)
    return {
        **facts,
        "recipe": folder.resolve().name,
        "notices": notices + facts["notices"],
        "sweep": sweep,
        "frontiers": _frontiers(sweep),
        "evaluation": evaluation,
        "replies": cases or facts["replies"],
    }


def _lacking(member: Mapping[str, Any], folder: Path, there: Mapping[str, Path]) -> list[str]:
    if member["status"] != "finished":
        return [
            f"{member['name']} did not finish ({member['status']}{': ' + member['error'] if member['error'] else ''})"
        ]
    return [] if member["name"] in there else [f"{folder / member['name']} is not there; shown as sweep.json knows it"]


def _facts(kind: str, found: list[dict[str, Any]], say) -> dict[str, Any]:
    rows, samples = [run.pop("rows") for run in found], [run.pop("samples") for run in found]
    evaluation = found[0]["evaluation"] if kind == "run" else None
    cases = evaluation and judged_cases(evaluation)
    notices = [notice if kind == "run" else f"{run['name']}: {notice}" for run in found for notice in run["notices"]]
    return {
        "kind": kind,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "recipe": found[0]["recipe"] if found else "",
        "verdict": say(found),
        "notices": ([] if _same_data(found) else [_other_data(found)]) + notices,
        "runs": found,
        "differences": _differences(found),
        "charts": charts(found, rows) if found else [],
        "table": _table(found[0]) if len(found) == 1 and kind == "run" else None,
        "evaluation": evaluation,
        "replies": cases or side_by_side(found, samples),
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """The runs' names, with their recipes' where they would not tell them apart."""
    for parts in (1, 2, 3):
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunError(f"the same run is named twice: {', '.join(map(str, paths))}")
    return [str(path.resolve()) for path in paths]


def _fingerprint(run: Mapping[str, Any]) -> str | None:
    return run["data"].get("fingerprint")


def _same_data(runs: Sequence[Mapping[str, Any]]) -> bool:
    return len({print_ for run in runs if (print_ := _fingerprint(run))}) <= 1


def _other_data(runs: Sequence[Mapping[str, Any]]) -> str:
    return "These runs were made from different data, so their figures cannot be compared one to one: " + ", ".join(
        f"{run['name']} from {(_fingerprint(run) or 'unknown')[:8]}" for run in runs
    )


def _differences(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings whose values are not the same in all runs; None where a recipe has none of that name."""
    if len(runs) < 2:
        return []
    keys = dict.fromkeys(key for run in runs for key in run["settings"])
    rows = [{"key": key, "values": [run["settings"].get(key) for run in runs]} for key in keys]
    order = lambda row: FIRST.index(section) if (section := row["key"].partition(".")[0]) in FIRST else len(FIRST)
    return sorted((row for row in rows if len(set(row["values"])) > 1), key=order)


def _table(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Base, SFT and DPO side by side, from what the runs wrote of themselves."""
    rows = _of_dpo(run) if run["stage"] == "dpo" else _of_sft(run)
    columns = ["base", run["reference_name"], "DPO"] if run["stage"] == "dpo" else ["base", "SFT"]
    columns = [name for name in columns if any(row["values"].get(name) for row in rows)]
    return {"columns": columns, "rows": rows} if rows else None


def _of_dpo(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    test, reference = run["test"], run["reference_name"]
    judge = (run["win_rate"] or {}).get("judge")
    rows = [
        _row("test split", f"win rate over {run['versus']}", "share", "higher", {"DPO": run["win_rate"]}, judge),
        _row("test split", "accuracy of the implicit reward", "share", "higher", {"DPO": test.get("accuracy")}),
        _row("test split", "reward margin", "", "higher", {"DPO": test.get("margin")}),
        _row(
            "test split",
            "perplexity of chosen replies",
            "",
            "lower",
            {reference: test.get("reference_perplexity"), "DPO": test.get("perplexity")},
        ),
        _row("test split", "KL from the reference", "nats per reply", None, {"DPO": test.get("kl")}),
        _row("test split", "reply length", "tokens", None, {"DPO": test.get("reply_tokens")}),
        _row("test split", "replies that end by themselves", "share", None, {"DPO": test.get("eos_rate")}),
    ]
    at = run["evaluations"]
    columns = {"base": run["before"], reference: at.get("first"), "DPO": at.get("kept") or at.get("last")}
    return [row for row in rows if row["values"]] + _on_validation(columns)


def _of_sft(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [_row("test split", "perplexity of chosen replies", "", "lower", {"SFT": run["test"].get("perplexity")})]
    at = run["evaluations"]
    columns = {"base": at.get("first"), "SFT": at.get("kept") or at.get("last")}
    return [row for row in rows if row["values"]] + _on_validation(columns)


def _on_validation(columns: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    measures = (
        ("perplexity", "perplexity of chosen replies", "", "lower"),
        ("reply_tokens", "reply length", "tokens", None),
        ("eos_rate", "replies that end by themselves", "share", None),
    )
    rows = []
    for key, measure, unit, better in measures:
        values = {name: {"mean": row[key]} for name, row in columns.items() if row and key in row}
        rows.append(_row("validation split", measure, unit, better, values))
    return [row for row in rows if row["values"]]


def _row(group: str, measure: str, unit: str, better: str | None, values, note: str | None = None) -> dict[str, Any]:
    known = {name: value for name, value in values.items() if value}
    return {"group": group, "measure": measure, "unit": unit, "better": better, "values": known, "note": note}


def _frontiers(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reward against KL, one point a member; and the win rate against KL, where one was judged."""
    kinds = (
        ("margin", "Reward margin against KL", "reward margin", False),
        ("win_rate", "Win rate against KL", "win rate", True),
    )
    found = []
    for key, title, unit, share in kinds:
        points = [
            {"name": m["name"], "label": m["label"], "x": m["kl"], "y": m[key], "chosen": m["name"] == sweep["choice"]}
            for m in sweep["members"]
            if m["kl"] and m[key]
        ]
        if points:
            found.append({"title": title, "unit": unit, "share": share, "points": points, "limit": sweep["max_kl"]})
    return found


def plain(value: Any) -> Any:
    """The same facts as JSON and UTF-8 can hold them, and no text in them that could act on a page."""
    if isinstance(value, str):
        text = harmless(value[:TEXT_CHARACTERS])
        return text if len(value) <= TEXT_CHARACTERS else f"{text} … [{len(value) - TEXT_CHARACTERS:,} more characters]"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [plain(its) for its in value]
    return value if value is None or isinstance(value, bool | int) else str(value)
