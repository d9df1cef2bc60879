"""Run directories → one HTML page, and the same facts as JSON beside it; imports no torch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from alignlab import __version__
from alignlab.disk import write_text
from alignlab.errors import RunError
from alignlab.report.facts import facts_of_run, facts_of_runs, facts_of_sweep, plain
from alignlab.report.verdict import duration, number
from alignlab.run import SWEEP, Run, find_run, runs_folder

log = logging.getLogger(__name__)

SECTIONS = {
    "differences": "What differs",
    "curves": "Curves",
    "frontier": "Reward against KL",
    "comparison": "Figures",
    "replies": "Replies",
    "data": "Data",
    "run": "What ran where",
}
TEST_ROWS = (
    ("accuracy", "accuracy of the implicit reward", "share"),
    ("margin", "reward margin", ""),
    ("perplexity", "perplexity of chosen replies", ""),
    ("kl", "KL from the reference, nats per reply", ""),
    ("reply_tokens", "tokens per reply", ""),
    ("eos_rate", "replies that end by themselves", "share"),
)


SWEEP_COLUMNS = (
    ("win_rate", "win rate", "share"),
    ("accuracy", "accuracy", "share"),
    ("margin", "margin", ""),
    ("margin_over_beta", "margin ÷ beta", ""),
    ("kl", "KL, nats per reply", ""),
)


def write_report(path: Path) -> Path:
    """Writes `report.html` and `report.json` into a run directory, or into a folder that holds a `sweep.json`."""
    facts = facts_of_sweep(path) if (path / SWEEP).is_file() else facts_of_run(path)
    return _write(facts, path / "report.html")


def write_comparison(paths: Sequence[Path], page: Path | None = None) -> Path:
    """Writes one page on several runs, by default `compare.html` in the nearest folder that holds them all."""
    facts = facts_of_runs(paths)
    return _write(facts, page or Path(os.path.commonpath([path.absolute().parent for path in paths])) / "compare.html")


def report_line(path: Path) -> str:
    """The path of the page just written, or one line on why there is none: no run fails for its report."""
    try:
        return str(write_report(path))
    except Exception as e:
        log.debug("no report of %s", path, exc_info=True)
        return f"no report of {path} ({type(e).__name__}: {e}); alignlab report {path} --debug says more"


def find_runs(recipe: str, names: Sequence[str] = ()) -> list[Path]:
    """The folders that `alignlab report RECIPE --run NAME …` is about; RECIPE as for `run.find_run`.

    Without names: the sweep where there is one, else the last run.
    """
    if names:
        return [find_run(recipe, name).path for name in names]
    folder = runs_folder(recipe)
    is_sweep = (folder / SWEEP).is_file() and not Run(folder).has_started
    return [folder if is_sweep else find_run(recipe).path]


def _write(facts: Mapping[str, Any], page: Path) -> Path:
    facts, beside = plain(facts), page.with_suffix(".json")
    try:
        write_text(beside, json.dumps(facts, ensure_ascii=False, separators=(",", ":")) + "\n")
        write_text(page, render(facts, page))
    except OSError as e:
        if not isinstance(e, PermissionError | FileNotFoundError | NotADirectoryError):
            raise
        raise RunError(f"{page} cannot be written ({e.strerror}); copy the runs to where you may write") from None
    return page


def render(facts: Mapping[str, Any], page: Path) -> str:
    """The page of these facts, as it would lie at `page`."""
    from alignlab.report.charts import draw_curves, draw_frontier  # matplotlib: most of a second

    runs = facts["runs"]
    labels = {run["name"]: run.get("label") or run["name"] for run in runs}
    drawn = [(chart, Markup(draw_curves(chart, labels))) for chart in facts["charts"]]
    frontiers = [(frontier, Markup(draw_frontier(frontier))) for frontier in facts.get("frontiers", [])]
    evaluation, examination = facts["evaluation"] or {}, _examination(runs)
    context = {
        **facts,
        "css": Markup(_css()),
        "title": f"{_heading(facts)} · alignlab",
        "heading": _heading(facts),
        "labels": labels,
        "drawn": drawn,
        "frontiers": frontiers,
        "warnings": [(run, warning) for run in runs for warning in run["warnings"]],
        "how_to_read": _how_to_read(runs),
        "sweep_columns": SWEEP_COLUMNS,
        "eval_columns": list(dict.fromkeys(name for row in evaluation.get("table") or [] for name in row["values"])),
        "test_rows": TEST_ROWS,
        "data_rows": _side_by_side(runs, _data_rows),
        "examination": examination,
        "pictures": _pictures(examination) if examination else [],
        "where_rows": _side_by_side(runs, _where_rows),
        "links": [_link(Path(run["folder"]), page) for run in runs],
        "json_name": page.with_suffix(".json").name,
        "version": __version__,
    }
    return _template().render({**context, "sections": _sections(facts)})


def _examination(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What is known of the data that the runs share."""
    return runs[0]["examination"] if runs and len({run["data"].get("fingerprint") for run in runs}) == 1 else None


def _pictures(examination: Mapping[str, Any]) -> list[tuple[str, str, Markup]]:
    """Drawings of the data with what they show in words, and the numbers behind them as text."""
    from alignlab.report.pictures import draw_features, draw_lengths

    histogram, features = examination["histogram"], [f for f in examination["features"] if f["n"] and f["high"]]
    tokens = "; ".join(
        f"{name}: median {of['median']:,}, 95% at most {of['p95']:,}, longest {of['max']:,}"
        for name, of in examination["tokens"].items()
    )
    shares = "; ".join(f"{f['name']} {f['accuracy']:.1%} ({f['low']:.1%} to {f['high']:.1%})" for f in features)
    return [
        ("Length in tokens", f"{tokens} tokens.", Markup(draw_lengths(histogram))),
        ("What tells the chosen reply", f"Share of pairs, 95% interval: {shares}.", Markup(draw_features(features))),
    ]


def _sections(facts: Mapping[str, Any]) -> dict[str, str]:
    """The sections that this page has, in their order: anchor and title."""
    absent = {
        "differences": len(facts["runs"]) < 2,
        "curves": not facts["charts"],
        "frontier": facts["kind"] != "sweep",
        "comparison": not (facts["table"] or facts["evaluation"] or facts["kind"] == "compare"),
    }
    return {anchor: title for anchor, title in SECTIONS.items() if not absent.get(anchor)}


@cache
def _template():
    environment = Environment(loader=PackageLoader("alignlab.report", "."), autoescape=True)
    environment.filters["groupby_in_order"] = _groups
    environment.globals |= {
        "figure": _figure,
        "signed": _signed,
        "number_rows": _number_rows,
        "facts_table": _facts_table,
    }
    return environment.get_template("report.html.jinja")


def _css() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _heading(facts: Mapping[str, Any]) -> str:
    if facts["kind"] == "sweep":
        return f"{facts['recipe']}, sweep of {len(facts['sweep']['members'])}"
    if facts["kind"] == "compare":
        return f"{len(facts['runs'])} runs compared"
    return f"{facts['recipe']} / {facts['runs'][0]['name']}"


def _how_to_read(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the marks in the curves stand for."""
    kept = any(run["best_step"] is not None for run in runs)
    if len(runs) > 1:
        parts = ["Held-out values, one curve a run; a run's own page has its training curves."]
        parts += ["A ring marks the step whose weights were kept."] if kept else []
    else:
        parts = ["A ring and the dotted line mark the step whose weights were kept."] if kept else []
        parts += ["The solid upright line is where training stopped."] if runs and runs[0]["ended_early"] else []
    does = {"stop": "A run that leaves a guard limit is stopped.", "warn": "Leaving a guard limit only warns."}
    acts = dict.fromkeys(does[run["limits"]["action"]] for run in runs if run["limits"].get("action") in does)
    return " ".join([*parts, *acts])


def _groups(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows by their group, both in the order in which they come."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("group") or "", []).append(row)
    return list(groups.items())


def _figure(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else number(value).replace("-", "−")


def _signed(value: float, unit: str) -> str:
    return f"{value:+.1%}" if unit == "share" else f"{'+' if value > 0 else ''}{_figure(value, unit)}"


def _number_rows(points: Sequence[Sequence[float | None]]) -> Markup:
    """Table rows without their end tags, which HTML does not need and thousands of numbers would."""
    columns = 4 if any(point[2] is not None for point in points) else 2
    cells = (["" if n is None else n for n in point[:columns]] for point in points)
    return Markup("\n".join("<tr>" + "".join(f"<td>{n}" for n in row) for row in cells))


def _facts_table(rows: Mapping[str, Sequence[Any]], label: str) -> Markup:
    """Names and values, one column a run; a row whose runs all agree is said once."""
    lines = []
    for name, values in rows.items():
        if not any(values):
            continue
        once = len(values) > 1 and len(set(values)) == 1
        span = Markup(f' colspan="{len(values)}"') if once else ""
        cells = "".join(f"<td{span}>{escape(value or '–')}</td>" for value in (values[:1] if once else values))
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="plain"><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _side_by_side(runs: Sequence[Mapping[str, Any]], rows_of) -> dict[str, list[Any]]:
    columns = [rows_of(run) for run in runs]
    named = {"run": [run["name"] for run in runs]} if len(runs) > 1 else {}
    return named | {
        name: [column.get(name) for column in columns] for name in dict.fromkeys(n for c in columns for n in c)
    }


def _data_rows(run: Mapping[str, Any]) -> dict[str, str]:
    data = run["data"]
    kept = data.get("kept") or {}
    pairs = ", ".join(f"{count:,} {split}" for split, count in kept.items())
    rows = {
        "source": ", ".join(str(value) for value in run["data_from"].values()),
        "rows read": f"{data['rows']:,}" if isinstance(data.get("rows"), int) else "",
        "pairs kept": f"{sum(kept.values()):,} ({pairs})" if kept else "",
        "rows dropped": _counts(data.get("dropped")),
        "repaired": _counts(data.get("repaired")),
        "fingerprint": data.get("fingerprint"),
    }
    return rows if data else {"source": rows["source"], "rows read": "not recorded yet"}


def _counts(reasons: Mapping[str, int] | None) -> str:
    if not reasons:
        return "none"
    total = sum(reasons.values())
    return f"{total:,}: " + ", ".join(
        f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda i: -i[1])
    )


def _where_rows(run: Mapping[str, Any]) -> dict[str, str | None]:
    where = run["where"]
    machine, device, processes = where["machine"], where["device"], where["processes"] or 1
    peak, planned, hours = where["peak_memory_gib"], where["planned_gib"], where["device_hours"]
    wall, training = where["wall_seconds"], where["training_seconds"]
    return {
        "status": f"{run['status']}{': ' + run['stop_reason'] if run['stop_reason'] else ''}",
        "kept weights": "" if run["best_step"] is None else f"step {run['best_step']}",
        "base model": where["base"],
        "reference": run["reference"],
        "parent run": run["parent"],
        "machine": ", ".join(f"{name} {_words(value)}" for name, value in machine.items()),
        "processes": f"{processes}",
        "started": where["started"],
        "wall time": f"{duration(wall)}, of them {duration(training)} training" if wall and training else "",
        f"{device}-hours": f"{hours:.3g} ({processes} process{'es' if processes > 1 else ''})" if hours else "",
        "peak memory": f"{peak} GiB of {device} memory{f', {planned} GiB planned' if planned else ''}" if peak else "",
        "versions": ", ".join(f"{name} {version}" for name, version in where["versions"].items()),
        "git commit": where["git_commit"],
        "wandb id": where["wandb_id"],
    }


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _link(folder: Path, page: Path) -> str:
    """A relative link from the page to a run's folder, with its slash; empty for the page's own."""
    there = os.path.relpath(folder.absolute(), page.absolute().parent)
    return "" if there == "." else f"{quote(there)}/"
