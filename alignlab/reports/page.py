"""Run directories → one HTML page, and the same facts as JSON beside it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader

from alignlab import __version__
from alignlab.disk import write_text
from alignlab.errors import RunError, lacks, need
from alignlab.reports.curves import Chart, Frontier, Member, draw_up, spoken_curves, spoken_frontier
from alignlab.reports.replies import MOST_ROWS, Replies, judged_replies, sampled_replies
from alignlab.reports.rows import compare_rows, own_rows
from alignlab.reports.verdict import Verdict, compare_verdict, duration, sweep_verdict, verdict
from alignlab.runs.evaluation import FILE, Evaluation, StoredEvaluation, read_evaluation
from alignlab.runs.facts import RunFacts, judged_together, read_run, seconds_between, section
from alignlab.runs.run import SWEEP, Examination, Run, Sweep, SweepMember, read_sweep
from alignlab.runs.sweep import columns_of, label_of, settings_of, sweep_rows
from alignlab.text.safe import harmless, publishable
from alignlab.text.tables import SHARE, Row, counts_of, number

log = logging.getLogger(__name__)

TEXT_CHARACTERS = 20_000  # of any other text than a reply: a recipe, an error, a name
FIRST = ("dpo", "kto", "orpo", "model", "data", "sft", "monitor")  # the sections whose differences come first
SECTIONS = {
    "differences": "What differs",
    "comparison": "Figures",
    "frontier": "Reward against KL",
    "curves": "Curves",
    "replies": "Replies",
    "data": "Data",
    "run": "What ran where",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows, and what `report.json` holds."""

    kind: str  # run, sweep or compare
    recipe: str
    title: str
    verdict: Verdict
    runs: Sequence[RunFacts]
    notices: Sequence[str]
    differences: Sequence[tuple[str, Sequence[str | None]]]  # a setting and its value in each run
    charts: Sequence[Chart]
    frontiers: Sequence[Frontier]
    sweep: Sweep | None
    evaluation: StoredEvaluation | None
    others: Sequence[StoredEvaluation]  # evaluations that are not shown
    columns: Sequence[str]
    rows: Sequence[Row]
    replies: Replies
    made: str


def write_report(path: Path, figures: Path | None = None) -> Path:
    """Writes `report.html` and `report.json` into a run directory, or into a folder that holds a `sweep.json`."""
    page = page_of_sweep(path) if (path / SWEEP).is_file() else page_of_run(path)
    return _write(page, path / "report.html", figures)


def write_comparison(paths: Sequence[Path], file: Path | None = None, figures: Path | None = None) -> Path:
    """Writes one page on several runs, by default `compare.html` in the nearest folder that holds them all."""
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return _write(page_of_runs(paths), file or folder / "compare.html", figures)


def report_line(path: Path) -> str:
    """The path of the page just written, or one line on why there is none: no run fails for its report."""
    try:
        return str(write_report(path))
    except Exception as e:
        log.debug("no report of %s", path, exc_info=True)
        return f"no report of {path} ({type(e).__name__}: {e}); alignlab report {path} --debug says more"


# --- what a page is of ---


def page_of_run(path: Path) -> Page:
    run = read_run(path)
    kept = StoredEvaluation(path / FILE, run.evaluation) if run.evaluation else None
    columns, rows = own_rows(run) if kept is None else (run.evaluation.names, _shown(run.evaluation))
    return _page("run", [run], verdict(run), f"{run.recipe} / {run.name}", columns, rows, kept, run.others)


def page_of_runs(paths: Sequence[Path]) -> Page:
    """Runs side by side, and the settings in which they differ."""
    if len(paths) < 2:
        raise RunError("one run cannot be compared; name two or more, or see alignlab report")
    names = _names(paths)
    runs = [replace(read_run(path), name=name) for path, name in zip(paths, names, strict=True)]
    kept, called = judged_together(runs)
    said = compare_verdict(runs, called, kept.found if kept else None)
    title = f"{len(runs)} runs compared"
    columns, rows = compare_rows(runs, kept.found if kept else None, called)
    return _page("compare", runs, said, title, columns, rows, kept, ())


def page_of_sweep(folder: Path) -> Page:
    """A sweep: its members' runs as far as they are there, the frontier and the choice."""
    sweep = read_sweep(folder)
    assert sweep is not None, f"{folder} holds a sweep"
    there = [member for member in sweep.members if Run(folder / member.run).has_started]
    chosen_first = sorted(there, key=lambda member: member.run != sweep.choice)
    runs = [replace(read_run(folder / member.run), label=label_of(member)) for member in chosen_first]
    found = read_evaluation(folder / FILE)
    kept = StoredEvaluation(folder / FILE, found) if found else None
    title = f"{folder.resolve().name}, sweep of {len(sweep.members)}"
    page = _page("sweep", runs, sweep_verdict(sweep, runs), title, columns_of(sweep), sweep_rows(sweep), kept, ())
    lacking = [line for member in sweep.members for line in _lacking(member, folder, there)]
    notices = [*lacking, *sweep.warnings, *page.notices]
    return replace(page, sweep=sweep, frontiers=_frontiers(sweep), notices=notices, recipe=folder.resolve().name)


def _page(
    kind: str,
    runs: Sequence[RunFacts],
    said: Verdict,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    kept: StoredEvaluation | None,
    others: Sequence[StoredEvaluation],
) -> Page:
    of_stage = [run for run in runs if run.stage != "sft"] or list(runs)
    return Page(
        kind=kind,
        recipe=runs[0].recipe if runs else "",
        title=title,
        verdict=said,
        runs=runs,
        notices=list(_notices(kind, runs)),
        differences=list(_differences(runs)),
        charts=draw_up(of_stage, [run.rows for run in of_stage]) if of_stage else [],
        frontiers=(),
        sweep=None,
        evaluation=kept,
        others=others,
        columns=columns,
        rows=rows,
        replies=(kept and judged_replies(kept.file.parent, kept.found)) or sampled_replies(runs),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _shown(found: Evaluation) -> list[Row]:
    """The rows of an evaluation that are not said elsewhere on the page."""
    return [row for row in found.table if row.group != "win rate"]


def _names(paths: Sequence[Path]) -> list[str]:
    """The runs' names, with their recipes' where they would not tell them apart."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunError(f"the same run is named twice: {', '.join(map(str, paths))}")
    for parts in (1, 2, 3):
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path.resolve()) for path in paths]


def _notices(kind: str, runs: Sequence[RunFacts]) -> Iterator[str]:
    fingerprints = {run.fingerprint for run in runs if run.fingerprint}
    if len(fingerprints) > 1:
        each = ", ".join(f"{run.name} from {(run.fingerprint or 'unknown')[:8]}" for run in runs)
        yield f"These runs were made from different data, so their figures cannot be compared one to one: {each}"
    for run in runs:
        for notice in run.notices:
            yield notice if kind == "run" else f"{run.name}: {notice}"


def _lacking(member: SweepMember, folder: Path, there: Sequence[SweepMember]) -> Iterator[str]:
    if member.status != "finished":
        error = f": {member.error}" if member.error else ""
        yield f"{member.run} did not finish ({member.status}{error})"
    elif member not in there:
        yield f"{folder / member.run} is not there; shown as {SWEEP} knows it"


def _differences(runs: Sequence[RunFacts]) -> Iterator[tuple[str, list[str | None]]]:
    """The settings whose values are not the same in all runs; none where a recipe has none of that name."""
    stages = [run.stage for run in runs]
    if len(set(stages)) > 1:
        yield "stage", stages
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    for key in sorted(keys, key=lambda key: ranks.get(key.partition(".")[0], len(FIRST))):
        values = [run.settings.get(key) for run in runs]
        if len(set(values)) > 1:
            yield key, values


def _frontiers(sweep: Sweep) -> list[Frontier]:
    """Reward against KL, one point a setting; and the win rate against KL, where one was judged."""
    kinds = (
        ("margin", "Reward margin against KL", "reward margin", False),
        ("win_rate", "Win rate against KL", "win rate", True),
    )
    found = []
    for name, title, unit, share in kinds:
        points = [
            Member(label_of(member), member.kl, value, member.run == sweep.choice)
            for member in settings_of(sweep)
            if (value := getattr(member, name)) and member.kl
        ]
        if points:
            found.append(Frontier(title, unit, share, points, sweep.max_kl))
    return found


# --- written down ---


def _write(page: Page, file: Path, figures: Path | None) -> Path:
    if figures:
        need("--figures", "report", "matplotlib")
    try:
        if not _is_of_another(file.with_suffix(".json")):
            write_text(
                file.with_suffix(".json"), json.dumps(as_json(page), ensure_ascii=False, separators=(",", ":")) + "\n"
            )
        write_text(file, render(page, file))
        if figures:
            _write_figures(page, figures)
    except OSError as e:
        if not isinstance(e, PermissionError | FileNotFoundError | NotADirectoryError):
            raise
        raise RunError(f"{file} cannot be written ({e.strerror}); copy the runs to where you may write") from None
    return file


def _is_of_another(file: Path) -> bool:
    """Whether no page wrote this JSON file: `rounds.json` beside `rounds.html` is what `alignlab rounds` found."""
    if file.name in ("report.json", "compare.json") or not file.is_file():  # ours, and made again where damaged
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return True
    return not (isinstance(found, dict) and "kind" in found and "columns" in found)


def _write_figures(page: Page, folder: Path) -> None:
    """Each chart as an SVG file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in _drawings(page):
        write_text(folder / f"{drawing.title.lower().replace(' ', '-')}.svg", drawing.svg)


@dataclass(frozen=True)
class Drawing:
    """A chart as a file, and in words for those who do not see it."""

    title: str
    svg: str  # empty without matplotlib, which is optional
    words: str
    note: str = ""
    chart: Chart | None = None  # whose numbers stand below it

    @property
    def element(self) -> str:
        from alignlab.reports.charts import in_page

        return in_page(self.svg, self.words)


def _no_charts() -> str | None:
    return lacks("drawing charts", "report", "matplotlib")


def _charts() -> Any:
    """The module that draws; none where matplotlib, which is optional, is not installed."""
    if _no_charts():
        return None
    from alignlab.reports import charts

    return charts


def _drawings(page: Page) -> Iterator[Drawing]:
    charts = _charts()
    labels = _labels(page.runs)
    for frontier in page.frontiers:
        svg = charts.draw_frontier(frontier) if charts else ""
        yield Drawing(frontier.title, svg, spoken_frontier(frontier))
    for chart in page.charts:
        svg = charts.draw_curves(chart, labels) if charts else ""
        yield Drawing(chart.title, svg, spoken_curves(chart, labels), chart.note, chart)


def _drawings_of_data(found: Examination) -> Iterator[Drawing]:
    """Of the data, with the numbers behind them as text."""
    charts = _charts()
    tokens = "; ".join(
        f"{name}: median {of.median:,}, 95% at most {of.p95:,}, longest {of.max:,}" for name, of in found.tokens.items()
    )
    lengths = charts.draw_lengths(found.histogram) if charts else ""
    yield Drawing("Length in tokens", lengths, "Length of texts", f"{tokens} tokens.")
    features = [each for each in found.features if each.n and each.high is not None]
    shares = "; ".join(f"{each.name} {each.accuracy:.1%} ({each.low:.1%} to {each.high:.1%})" for each in features)
    note = f"Share of pairs, 95% interval: {shares}."
    telling = charts.draw_features(features) if charts else ""
    yield Drawing("What tells the chosen reply", telling, "What tells the chosen reply", note)


def as_json(page: Page) -> dict[str, Any]:
    """What `report.json` holds: everything but the replies, which lie in files of their own."""
    found = {name: value for name, value in vars(page).items() if name != "replies"}
    runs = [run.as_json() for run in page.runs]
    evaluation = page.evaluation and page.evaluation.found
    others = [{"file": str(each.file), "about": each.found.about} for each in page.others]
    return plain({**found, "runs": runs, "evaluation": evaluation, "others": others})


def plain(value: Any) -> Any:
    """The same as JSON and UTF-8 can hold it, without absolute paths, and no text in it that could act on a page."""
    if is_dataclass(value):
        return plain(asdict(value))
    if isinstance(value, str | Path):
        return shown_text(publishable(str(value)))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [plain(its) for its in value]
    return value if value is None or isinstance(value, bool | int) else str(value)


def shown_text(text: str) -> str:
    """Harmless, and not longer than anybody reads."""
    more = len(text) - TEXT_CHARACTERS
    return harmless(text[:TEXT_CHARACTERS]) + (f" … [{more:,} more characters]" if more > 0 else "")


def render(page: Page, file: Path) -> str:
    """The page, as it would lie at `file`."""
    runs = page.runs
    examination = runs[0].examination if runs and len({run.fingerprint for run in runs}) == 1 else None
    drawings = list(_drawings(page))
    context = {
        **vars(page),
        "css": Path(__file__).with_name("report.css").read_text(encoding="utf-8"),
        "notices": [*page.notices, *filter(None, [_no_charts()])],
        "curves": [drawing for drawing in drawings if drawing.chart],
        "frontiers": [drawing for drawing in drawings if not drawing.chart],
        "labels": _labels(runs),
        "sections": _sections(page),
        "about": _about(runs[0]) if page.kind == "run" else "",
        "targets": runs[0].targets if page.kind == "run" else (),
        "warnings": [(run, warning) for run in runs for warning in run.warnings],
        "eval_warnings": page.evaluation.found.warnings if page.evaluation else (),
        "data_rows": _by_name(runs, _data_rows),
        "where_rows": _by_name(runs, _where_rows),
        "examination": examination,
        "pictures": list(_drawings_of_data(examination)) if examination else [],
        "links": [_link(Path(run.folder), file) for run in runs],
        "json_name": file.with_suffix(".json").name,
        "version": __version__,
    }
    return _template().render(context)


@cache
def _template():
    environment = Environment(
        loader=PackageLoader("alignlab.reports", "."),
        autoescape=True,
        finalize=lambda value: shown_text(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"public": publishable, "figure": _figure, "signed": _signed, "in_groups": _in_groups}
    environment.globals |= {"counts_of": counts_of, "most_rows": MOST_ROWS}
    return environment.get_template("report.html.jinja")


def _labels(runs: Sequence[RunFacts]) -> dict[str, str]:
    return {run.name: run.label or run.name for run in runs}


def _sections(page: Page) -> dict[str, str]:
    """The sections that this page has, in their order: anchor and title."""
    absent = {
        "differences": page.kind != "compare",
        "comparison": not (page.rows or page.evaluation),
        "frontier": not page.frontiers,
        "curves": not page.charts,
    }
    return {anchor: title for anchor, title in SECTIONS.items() if not absent.get(anchor)}


def _in_groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(group, list(its)) for group, its in groupby(rows, key=lambda row: row.group)]


def _figure(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == SHARE else number(value).replace("-", "−")


def _signed(value: float, unit: str) -> str:
    return f"{'+' if value > 0 else ''}{_figure(value, unit)}".replace("-", "−")


def _about(run: RunFacts) -> str:
    """Model, data, date and machine, in a line."""
    manifest = run.manifest
    model, data = section(manifest, "model"), section(manifest, "data")
    source = data.get("path") or data.get("source")
    pairs = manifest.data.kept.get("train") if manifest.data else None
    trained_on = ", ".join([*([str(source)] if source else []), *([f"{pairs:,} training pairs"] if pairs else [])])
    named = {"model": model.get("name"), "data": trained_on}
    said = [f"{name}: {value}" for name, value in named.items() if value]
    said += [manifest.started[:10]] if manifest.started else []
    return publishable("; ".join([*said, ", ".join(_machine(run))]))


def _machine(run: RunFacts) -> list[str]:
    machine = run.manifest.machine
    said = list(machine.gpus)
    if machine.cpus and not machine.gpus:
        said.append(f"{machine.cpus} CPUs")
    seconds = run.manifest.training_seconds
    return [*said, f"{duration(seconds)} of training"] if seconds else said


def _by_name(runs: Sequence[RunFacts], rows_of) -> list[tuple[str, list[str]]]:
    """Rows of names and values, one column a run; a row in which no run has a value is left out."""
    found = [rows_of(run) for run in runs]
    rows = [("run", [run.name for run in runs])] if len(runs) > 1 else []
    names = dict.fromkeys(name for its in found for name in its)
    rows += [(name, [its.get(name) or "" for its in found]) for name in names]
    return [(name, values) for name, values in rows if any(values)]


def _data_rows(run: RunFacts) -> dict[str, str]:
    rows, written = (
        run.manifest.data,
        (run.settings.get(f"data.{key}") for key in ("source", "path", "subset", "format")),
    )
    source = ", ".join(str(value).strip('"') for value in written if value not in (None, "null"))
    if rows is None:
        return {"source": source, "rows read": "not recorded yet"}
    pairs = ", ".join(f"{count:,} {split}" for split, count in rows.kept.items())
    return {
        "source": source,
        "rows read": "not recorded" if rows.rows is None else f"{rows.rows:,}",
        "pairs kept": f"{sum(rows.kept.values()):,} ({pairs})",
        "rows dropped": _counts(rows.dropped),
        "repaired": _counts(rows.repaired),
        "fingerprint": rows.fingerprint or "",
    }


def _counts(reasons: Mapping[str, int]) -> str:
    each = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda one: -one[1]))
    return f"{sum(reasons.values()):,}: {each}" if reasons else "none"


def _where_rows(run: RunFacts) -> dict[str, str | None]:
    manifest, machine = run.manifest, run.manifest.machine
    processes, training = manifest.world_size or 1, manifest.training_seconds
    device = "GPU" if machine.gpus else "CPU"
    wall = seconds_between(manifest.started, manifest.finished)
    hours = training * processes / 3600 if training else None
    planned = f", {manifest.planned_gib} GiB planned" if manifest.planned_gib else ""
    peak = manifest.peak_memory_gib
    cpus = f"{machine.cpus} CPUs" if machine.cpus else ""
    python = f"Python {machine.python}" if machine.python else ""
    return {
        "status": f"{run.status}{f': {run.stop_reason}' if run.stop_reason else ''}",
        "kept weights": "" if run.best_step is None else f"step {run.best_step}",
        "base model": manifest.base.name if manifest.base else "",
        "reference": manifest.reference,
        "parent run": manifest.parent.run if manifest.parent else "",
        "machine": ", ".join(filter(None, [*machine.gpus, cpus, python, machine.platform])),
        "processes": f"{processes}",
        "started": manifest.started,
        "wall time": f"{duration(wall)}, of them {duration(training)} training" if wall and training else "",
        f"{device}-hours": f"{hours:.3g} ({processes} process{'es' if processes > 1 else ''})" if hours else "",
        "peak memory": f"{peak} GiB of {device} memory{planned}" if peak else "",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "git commit": manifest.git_commit,
        "wandb id": manifest.wandb_id,
    }


def _link(folder: Path, page: Path) -> str:
    """A relative link from the page to a run's folder, with its slash; empty for the page's own."""
    there = os.path.relpath(folder.absolute(), page.absolute().parent)
    return "" if there == "." else f"{quote(there)}/"
