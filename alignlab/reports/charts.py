"""Charts → SVG, by matplotlib with its own layout and legend; in a page they take the page's colours.

Text stays text. Curves differ in dash and marker and are named in the legend, so that none is told by colour alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts is nobody's news

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

from alignlab.reports.curves import Chart, Frontier, Point, Series  # noqa: E402
from alignlab.runs.run import Feature, Histogram  # noqa: E402
from alignlab.text.estimate import Estimate  # noqa: E402
from alignlab.text.tables import ellipsis  # noqa: E402

# The light colours of report.css; a page puts var(--name) in their place, so that one drawing serves dark and paper too
INK, SOFT, GRID, WARN = "#1b1c1e", "#5c6067", "#e3e3df", "#9a3412"
RUNS = ("#0b55c4", "#b45309", "#047857", "#7c3aed", "#be185d", "#0e7490", "#4d7c0f", "#6b4a2b")
ACCENT = RUNS[0]
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", WARN: "warn"}
VARIABLES |= {colour: f"run-{number}" for number, colour in enumerate(RUNS, 1)}

WIDTH, HEIGHT, WIDE = 360, 220, 420  # of charts, in units that are shown at about one CSS pixel each, on a phone too
TEXT = 11
ROW, LETTER, SAMPLE = 17, 6.4, 52  # of a legend: a row's height, a letter, and the line drawn before a name
MANY = 30  # points from which on a curve has no marker at each
FAR = 2.5  # a limit so many heights of the curve above it is named in the legend, and not drawn
DOTTED, DASHED = (0, (1.2, 1.6)), (0, (5, 2))
DASHES = ("-", DASHED, DOTTED, (0, (7, 2, 1.5, 2)), (0, (3, 1.2)), (0, (9, 3)), (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX*"
LONGEST_NAME = 34  # letters of a name
STYLE = {
    "svg.fonttype": "none",
    "path.simplify": False,  # the curves are thinned already, and honestly
    "font.size": TEXT,
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page sets its own
    "text.color": INK,
    "text.parse_math": False,  # a run's name may hold dollar signs
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": SOFT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def draw_curves(chart: Chart, labels: Mapping[str, str]) -> str:
    """A chart over steps as an SVG file; `labels` name the runs where there are several."""
    several = len(labels) > 1
    with _drawing(chart.title):
        figure, axes = _axes(WIDTH, HEIGHT, chart.unit, "step", chart.share)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for series in chart.series:
            number = list(labels).index(series.run)
            look = _look_of_run(number) if several else _look_of_kind(series)
            _curve(axes, series, look, _name(series, labels), with_band=not several)
        for limit in chart.limits:
            _draw_limit(axes, axes.axhline, limit, f"guard limit {_shown(limit, chart.share)}", axes.get_ylim())
        for mark in chart.marks:
            kept = mark.label == "kept"
            colour, dash = (INK, DOTTED) if kept else (WARN, "-")
            axes.axvline(mark.step, color=colour, lw=0.9, ls=dash, zorder=1, label=f"{mark.label} step {mark.step}")
        _legend(figure, axes)
        return _svg(figure)


def draw_frontier(frontier: Frontier) -> str:
    """Reward against KL, one point a member with its 95 % intervals, as an SVG file."""
    with _drawing(frontier.title):
        across = "KL from the reference, nats per reply"
        figure, axes = _axes(WIDE, 280, frontier.unit, across, frontier.share)
        axes.grid(axis="x", lw=0.8)
        ordered = sorted(frontier.points, key=lambda point: point.x.mean)
        axes.plot([p.x.mean for p in ordered], [p.y.mean for p in ordered], color=SOFT, lw=1, ls=DOTTED)
        for number, point in enumerate(ordered):
            colour, name = RUNS[number % len(RUNS)], f"{point.label} (chosen)" if point.chosen else point.label
            bars = {"xerr": _reach(point.x), "yerr": _reach(point.y), "lw": 1, "capsize": 2.5}
            size = 9 if point.chosen else 5
            marker = MARKERS[number % len(MARKERS)]
            axes.errorbar(point.x.mean, point.y.mean, **bars, color=colour, fmt=marker, ms=size, label=_named(name))
        if frontier.limit is not None:
            _draw_limit(axes, axes.axvline, frontier.limit, f"limit {frontier.limit:g}", axes.get_xlim())
        _legend(figure, axes)
        return _svg(figure)


def draw_lengths(histogram: Histogram) -> str:
    """How many pairs have so many tokens in prompt, chosen and rejected; counts are on a logarithmic axis."""
    with _drawing("Length of prompts and replies"):
        figure, axes = _axes(WIDE, 260, "pairs", "tokens", False)
        for (name, colour), dash in zip(
            {"prompt": SOFT, "chosen": ACCENT, "rejected": INK}.items(), DASHES, strict=False
        ):
            axes.stairs(getattr(histogram, name), histogram.edges, color=colour, ls=dash, lw=1.4, label=name)
        most = max(*histogram.prompt, *histogram.chosen, *histogram.rejected)
        powers = [10**k for k in range(len(str(most)))]
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_yticks([0, *powers], labels=[f"{n:,}" for n in (0, *powers)])
        axes.minorticks_off()
        _legend(figure, axes)
        return _svg(figure)


def draw_features(features: Sequence[Feature]) -> str:
    """Of each feature how often the reply that has more of it is the chosen one, with its 95 % interval."""
    shown = sorted(features, key=lambda one: abs(one.accuracy - 0.5))
    with _drawing("What a model could win by without reading"):
        across = "pairs whose chosen reply has more of it"
        figure, axes = _axes(WIDE, 70 + 18 * len(shown), "", across, False)
        axes.axvline(0.5, color=SOFT, lw=1, ls=DASHED)
        for row, one in enumerate(shown):
            axes.plot([one.low, one.high], [row, row], color=ACCENT, lw=1.6)
            axes.plot([one.accuracy], [row], "o", color=ACCENT, ms=5)
        axes.set_yticks(range(len(shown)), labels=[ellipsis(one.name, LONGEST_NAME) for one in shown])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return _svg(figure)


def in_page(svg: str, words: str) -> str:
    """A drawing as an element of a page: in the page's colours, with ids of its own, and said in words."""
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    own = re.sub(r"\W+", "-", words[:40])
    for before in ('id="', 'xlink:href="#', "url(#"):
        svg = svg.replace(before, f"{before}{own}-")
    return f'<div class="drawing" role="img" aria-label="{escape(words)}">{svg[svg.index("<svg") :]}</div>'


@contextlib.contextmanager
def _drawing(title: str) -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever a matplotlibrc says; the same drawing has the same bytes."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's fonts have it
        yield


def _axes(width: int, height: int, unit: str, across: str, share: bool) -> tuple[Figure, Axes]:
    figure = Figure((width / 72, height / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_title(unit)
    axes.set_xlabel(across, loc="right")
    axes.grid(axis="y", lw=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, in as many columns as there is room for."""
    handles, names = axes.get_legend_handles_labels()
    widest = SAMPLE + LETTER * max(map(len, names))
    columns = max(1, int(figure.get_figwidth() * 72 / widest))
    figure.set_figheight(figure.get_figheight() + ROW / 72 * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def _name(series: Series, labels: Mapping[str, str]) -> str:
    """What stands in the legend: the run where there are several, else what is drawn."""
    if len(labels) > 1:
        return _named(labels[series.run])
    return " ".join(filter(None, [series.called, series.kind]))


def _named(name: str) -> str:
    """A name for the legend, which leaves out those that begin with an underscore."""
    short = ellipsis(name, LONGEST_NAME)
    return f" {short}" if short.startswith("_") else short


def _look_of_run(number: int) -> dict[str, Any]:
    kinds = len(RUNS)
    width = 2 if number == 0 else 1.2
    return {"color": RUNS[number % kinds], "ls": DASHES[number % kinds], "lw": width, "marker": MARKERS[number % kinds]}


def _look_of_kind(series: Series) -> dict[str, Any]:
    second = series.called == "rejected"
    dash = DASHED if second else "-"
    if series.kind == "training":
        return {"color": SOFT, "ls": dash, "lw": 0.9, "marker": ""}
    return {"color": INK if second else ACCENT, "ls": dash, "lw": 1.8, "marker": "s" if second else "o"}


def _curve(axes: Axes, series: Series, look: Mapping[str, Any], name: str, with_band: bool) -> None:
    steps, values = [point.step for point in series.points], [point.value for point in series.points]
    every = max(1, len(steps) // 12) if len(steps) > MANY else 1
    axes.plot(steps, values, markevery=every, ms=4.2, mew=0, label=name, **look)
    if with_band and any(point.low is not None for point in series.points):
        _band(axes, series.points, look["color"])
    kept = [point for point in series.points if point.step == series.kept]
    if kept and series.kind == "held-out":
        axes.plot(kept[0].step, kept[0].value, "o", ms=9, mfc="none", mec=look["color"], mew=1.4, zorder=4)


def _band(axes: Axes, points: Sequence[Point], colour: str) -> None:
    steps = [point.step for point in points]
    low = [point.value if point.low is None else point.low for point in points]
    high = [point.value if point.high is None else point.high for point in points]
    if len(points) == 1:
        axes.vlines(steps, low, high, color=colour, lw=1)
    else:
        axes.fill_between(steps, low, high, color=colour, alpha=0.16, lw=0)


def _draw_limit(axes: Axes, draw: Any, limit: float, name: str, drawn: tuple[float, float]) -> None:
    """A line at a limit; one so far away that it would squash the curve is only named."""
    low, high = drawn
    if limit > low + FAR * (high - low):
        axes.plot([], [], color=WARN, ls=DASHED, lw=1.2, label=f"{name}, far beyond")
    else:
        draw(limit, color=WARN, lw=1.2, ls=DASHED, zorder=1, label=name)


def _shown(limit: float, share: bool) -> str:
    return f"{limit:.0%}" if share else f"{limit:g}"


def _reach(estimate: Estimate) -> list[list[float]] | None:
    """How far the interval reaches below and above, as matplotlib takes it."""
    if estimate.low is None or estimate.high is None:
        return None
    return [[max(0.0, estimate.mean - estimate.low)], [max(0.0, estimate.high - estimate.mean)]]


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=NO_METADATA)
    return out.getvalue()
