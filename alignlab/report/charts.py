"""Curves → inline SVG: drawn by matplotlib, coloured by the page, legible without colour.

Every colour is a custom property of the page's style sheet, so that one drawing serves light, dark and print; text
stays text. Curves differ in dash and marker and carry their names, so that none is told by its colour alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts is nobody's news

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

# Stand-ins that matplotlib draws with; each becomes var(--name) in the page.
INK, MUTED, GRID, ACCENT, PAPER, WARN = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
NAMES = {INK: "ink", MUTED: "soft", GRID: "grid", ACCENT: "accent", PAPER: "paper", WARN: "warn"}

WIDTH, HEIGHT = 360, 230  # units of the drawing; shown at about one CSS pixel each, on a phone too
LETTER = 5.6  # units that a letter of the labels takes, at most on average
TEXT = 11
MANY = 30  # points from which on a curve has no marker at each
DASHES = [
    "-",
    (0, (5, 2)),
    (0, (1.2, 1.6)),
    (0, (7, 2, 1.5, 2)),
    (0, (3, 1.2)),
    (0, (9, 3)),
    (0, (1, 3)),
    (0, (5, 1, 1, 1, 1, 1)),
]
MARKERS = "osD^vPX*"
STYLE = {
    "svg.fonttype": "none",
    "path.simplify": False,  # the curves are thinned already, and honestly
    "font.size": TEXT,
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page sets its own
    "text.parse_math": False,  # a run's name may hold dollar signs
    "axes.unicode_minus": True,
}
NEARBY = [
    place for k in range(8) for place in ((9, 7 + 14 * k), (9, -16 - 14 * k), (-9, 7 + 14 * k), (-9, -16 - 14 * k))
]
FRACTION = re.compile(r"-?\d+\.\d{2,}")
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def draw_curves(chart: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A chart over steps as an SVG element; `labels` name the runs where there are several."""
    several = len(labels) > 1
    names = [_name(s, labels, several) for s in chart["series"]]
    named = [(s, name) for s, name in zip(chart["series"], names, strict=True) if name]
    with drawing(chart["title"]):
        figure, axes = make_axes(chart, max((len(name) for _, name in named), default=0))
        for at, series in enumerate(chart["series"]):
            _curve(axes, series, _look(series, at, list(labels).index(series["run"]), several), several)
        _limits(axes, chart)
        for mark in chart["marks"]:
            _mark(axes, mark)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _names_at_the_ends(
            axes, [(s["points"][-1], name, _colour(s, list(labels).index(s["run"]), several)) for s, name in named]
        )
        return to_svg(figure, f"{chart['title']}: {spoken(chart, labels)}")


def draw_frontier(frontier: Mapping[str, Any]) -> str:
    """Reward against KL, one point a member with its 95 % intervals, as an SVG element."""
    points = frontier["points"]
    with drawing(frontier["title"]):
        figure, axes = make_axes({**frontier, "across": "KL from the reference, nats per reply"}, 6, wide=True)
        ordered = sorted(points, key=lambda point: point["x"]["mean"])
        axes.plot([p["x"]["mean"] for p in ordered], [p["y"]["mean"] for p in ordered], color=MUTED, lw=1, ls=DASHES[2])
        for point in points:
            _point(axes, point)
        axes.margins(0.08, 0.15)
        if frontier["limit"] is not None:
            _upright_limit(axes, frontier["limit"])
        axes.get_xlim(), axes.get_ylim()  # settles the axes: names are placed by where the points lie on the drawing
        _name_points(axes, points)
        said = [f"{p['label']} at KL {p['x']['mean']:.3g}, {p['y']['mean']:.3g}" for p in ordered]
        return to_svg(figure, f"{frontier['title']}: {'; '.join(said)}")


@contextlib.contextmanager
def drawing(title: str) -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever a matplotlibrc says; ids that no other chart of the page has."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's fonts have it
        yield


def spoken(chart: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A chart in words, for those who do not see it: where each curve starts and ends."""
    parts = []
    for series in chart["series"]:
        (first, start, *_), (last, end, *_) = series["points"][0], series["points"][-1]
        who = " ".join(
            filter(None, [labels[series["run"]] if len(labels) > 1 else "", series["called"], series["kind"]])
        )
        parts.append(f"{who} from {start:.3g} at step {first} to {end:.3g} at step {last}")
    return "; ".join(parts)


def make_axes(chart: Mapping[str, Any], longest: int, wide: bool = False) -> tuple[Figure, Axes]:
    width, height = (400, 270) if wide else (WIDTH, HEIGHT)
    left, right, top, bottom = 46, max(36, min(longest, 18) * LETTER + 12), 30, 36 if wide else 24
    figure = Figure((width / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(box)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color=MUTED, linewidth=0.8)
    axes.grid(axis="both" if wide else "y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=TEXT - 0.5, pad=5)
    axes.tick_params(axis="x", length=3, color=MUTED)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if chart["share"]:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.text(4 / width, 1 - 12 / height, chart["unit"], color=MUTED, fontsize=TEXT - 0.5, transform=figure.transFigure)
    write = partial(axes.text, color=MUTED, fontsize=TEXT - 0.5, transform=figure.transFigure)
    if wide:
        write(1 - right / width, 3 / height, chart["across"], ha="right")
    else:
        write(1 - (right - 8) / width, (bottom - 15.5) / height, chart.get("across", "step"))
    return figure, axes


def _name(series: Mapping[str, Any], labels: Mapping[str, str], several: bool) -> str:
    """What stands at the end of a curve: the run where there are several, else what is drawn."""
    if several:
        return ellipsis(labels[series["run"]], 18)
    return (
        series["called"]
        if series["called"] and series["kind"] == "held-out"
        else ""
        if series["called"]
        else series["kind"]
    )


def ellipsis(name: str, most: int) -> str:
    """A name of at most `most` letters that keeps both its ends."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def _colour(series: Mapping[str, Any], run: int, several: bool) -> str:
    if several:
        return ACCENT if run == 0 else INK if run % 2 else MUTED
    return MUTED if series["kind"] == "training" else INK if series["called"] == "rejected" else ACCENT


def _look(series: Mapping[str, Any], at: int, run: int, several: bool) -> dict[str, Any]:
    colour = _colour(series, run, several)
    if several:
        dash, marker, width = DASHES[run % len(DASHES)], MARKERS[run % len(MARKERS)], 2 if run == 0 else 1.2
    else:
        held_out, second = series["kind"] == "held-out", series["called"] == "rejected"
        dash, marker, width = DASHES[1 if second else 0], "s" if second else "o", 1.8 if held_out else 0.9
        marker = marker if held_out else ""
    return {
        "color": colour,
        "ls": dash,
        "lw": width,
        "marker": marker,
        "ms": 4.2,
        "mew": 0,
        "zorder": 3 if marker else 2,
    }


def _curve(axes: Axes, series: Mapping[str, Any], look: Mapping[str, Any], several: bool) -> None:
    steps, values, lows, highs = zip(*series["points"], strict=True)
    every = max(1, len(steps) // (6 if several else 12)) if len(steps) > MANY else 1
    axes.plot(steps, values, markevery=every, solid_joinstyle="round", **look)
    if any(low is not None for low in lows):
        low = [value if edge is None else edge for value, edge in zip(values, lows, strict=True)]
        high = [value if edge is None else edge for value, edge in zip(values, highs, strict=True)]
        if len(steps) == 1:
            axes.vlines(steps, low, high, color=look["color"], lw=1)
        elif not several:
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.16, lw=0)
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if step == series["kept"]]
    if kept and series["kind"] == "held-out":
        axes.plot(*kept[0], "o", ms=9, mfc="none", mec=look["color"], mew=1.4, zorder=4)


def _limits(axes: Axes, chart: Mapping[str, Any]) -> None:
    """The guards' limits; one that would squash the curve is named at the top instead of drawn."""
    low, high = axes.get_ylim()
    for limit in chart["limits"]:
        shown = f"{limit:.0%}" if chart["share"] else f"{limit:g}"
        write = partial(axes.annotate, color=WARN, fontsize=TEXT - 0.5, ha="right", textcoords="offset points")
        if limit > low + 2.5 * (high - low):
            write(f"guard limit {shown}, above ↑", (1, 1), xycoords="axes fraction", xytext=(0, 17))
            continue
        axes.axhline(limit, color=WARN, lw=1.2, ls=DASHES[1], zorder=1)
        write(f"guard limit {shown}", (1, limit), xycoords=axes.get_yaxis_transform(), xytext=(0, 3))
        axes.set_ylim(min(low, limit), max(high, limit + 0.12 * (max(high, limit) - low)))


def _upright_limit(axes: Axes, limit: float) -> None:
    low, high = axes.get_xlim()
    write = partial(axes.annotate, color=WARN, fontsize=TEXT - 0.5, textcoords="offset points")
    if limit > low + 2.5 * (high - low):
        write(f"limit {limit:g} →", (1, 1), xycoords="axes fraction", xytext=(0, 6), ha="right")
        return
    axes.axvline(limit, color=WARN, lw=1.2, ls=DASHES[1], zorder=1)
    axes.set_xlim(low, max(high, limit + 0.05 * (limit - low)))
    write(f"limit {limit:g}", (limit, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 6), ha="center")


def _mark(axes: Axes, mark: Mapping[str, Any]) -> None:
    kept = mark["label"] == "kept"
    axes.axvline(mark["step"], color=INK if kept else WARN, lw=0.9, ls=DASHES[2] if kept else DASHES[0], zorder=1)
    low, high = axes.get_xlim()
    past_half = mark["step"] > (low + high) / 2
    axes.annotate(
        mark["label"],
        (mark["step"], 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(3 if past_half else -3, 3),
        textcoords="offset points",
        ha="right" if past_half else "left",
        color=INK if kept else WARN,
        fontsize=TEXT - 0.5,
    )


def _names_at_the_ends(axes: Axes, ends: Sequence[tuple[Sequence[float], str, str]]) -> None:
    """Each curve's name beside its last point, moved apart where they would lie on each other."""
    if not ends:
        return
    height = axes.get_window_extent().height
    at = axes.transData.transform([(point[0], point[1]) for point, _, _ in ends])[:, 1] - axes.get_window_extent().y0
    right = axes.get_xlim()[1]
    for (point, name, colour), y in zip(ends, apart([float(a) for a in at], TEXT + 1.5, height), strict=True):
        axes.annotate(
            name,
            (right, point[1]),
            xytext=(1, y / height),
            textcoords=partial(_beside, axes),
            color=colour,
            fontsize=TEXT - 0.5,
            va="center",
            annotation_clip=False,
        )


def _beside(axes: Axes, renderer: Any) -> Any:
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(5 / 72, 0, axes.figure.dpi_scale_trans)


def apart(wanted: Sequence[float], least: float, top: float) -> list[float]:
    """The positions nearest to the wanted ones, in their order, no two nearer than `least`; within 0 and `top`.

    Isotonic regression of what is wanted less the distances that are needed (pool adjacent violators).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    least = min(least, top / max(1, len(wanted) - 1))
    pools: list[list[float]] = []  # of neighbours that touch: what they want, as if all lay at the first one's place
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * least])
        while len(pools) > 1 and _mean(pools[-2]) >= _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    starts = [_mean(pool) for pool in pools for _ in pool]
    highest = top - (len(wanted) - 1) * least
    placed = {
        i: min(max(start, 0.0), highest) + rank * least
        for rank, (i, start) in enumerate(zip(order, starts, strict=True))
    }
    return [placed[i] for i in range(len(wanted))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _point(axes: Axes, point: Mapping[str, Any]) -> None:
    x, y, chosen = point["x"], point["y"], point["chosen"]
    colour = ACCENT if chosen else INK
    errors = {"xerr": _reach(x), "yerr": _reach(y)}
    axes.errorbar(
        x["mean"], y["mean"], **errors, color=colour, lw=1, capsize=2.5, fmt="o", ms=6 if chosen else 4.5, zorder=3
    )
    if chosen:
        axes.plot(x["mean"], y["mean"], "o", ms=13, mfc="none", mec=colour, mew=1.6, zorder=4)


def _name_points(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Each point's name beside it, in the first of a few places where it lies on no other name and no point."""
    taken: list[tuple[float, float, float, float]] = []
    places = [tuple(axes.transData.transform((p["x"]["mean"], p["y"]["mean"]))) for p in points]
    taken += [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda both: not both[0]["chosen"]):
        name = f"{ellipsis(point['label'], 24)}{' — chosen' if point['chosen'] else ''}"
        width = len(name) * (LETTER + 0.6 * point["chosen"])
        boxes = [_box(x, y, dx, dy, width) for dx, dy in NEARBY]
        free = (i for i, box in enumerate(boxes) if _inside(box, axes) and not any(_overlap(box, o) for o in taken))
        at = next(free, 0)
        taken.append(boxes[at])
        dx, dy = NEARBY[at]
        axes.annotate(
            name,
            (point["x"]["mean"], point["y"]["mean"]),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right",
            color=ACCENT if point["chosen"] else INK,
            fontweight="bold" if point["chosen"] else "normal",
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkB": 4} if at >= 4 else None,
        )


def _inside(box: tuple[float, float, float, float], axes: Axes) -> bool:
    figure = axes.figure.bbox
    return box[0] >= axes.bbox.x0 and box[1] >= axes.bbox.y0 and box[2] <= figure.width and box[3] <= axes.bbox.y1


def _box(x: float, y: float, dx: float, dy: float, width: float) -> tuple[float, float, float, float]:
    left = x + dx if dx > 0 else x + dx - width
    return left, y + dy - 2, left + width, y + dy + TEXT


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _reach(estimate: Mapping[str, Any]) -> list[list[float]] | None:
    if estimate["low"] is None:
        return None
    return [[max(0.0, estimate["mean"] - estimate["low"])], [max(0.0, estimate["high"] - estimate["mean"])]]


def to_svg(figure: Figure, words: str) -> str:
    """The drawing as an element to stand in a page: no document around it, no size, the page's colours and fonts."""
    from html import escape

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=NO_METADATA)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>|<!--.*?-->\s*|<defs>\s*</defs>\s*", "", svg, flags=re.S
    )
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view, "matplotlib gives its drawings a viewBox"
    head = f'<svg {view[0]} role="img" aria-label="{escape(words, quote=True)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\w ]*?)([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", svg).replace(
        "font-weight: ;", ""
    )
    svg = re.sub(r'(?<= )(?:d|x|y|transform)="[^"]*"', lambda place: FRACTION.sub(_tenths, place[0]), svg)
    svg = re.sub(r" transform=\"rotate\(-0 [^\"]*\"|font-family: 'DejaVu Sans'; ", "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return re.sub("|".join(NAMES), lambda colour: f"var(--{NAMES[colour[0]]})", svg)


def _tenths(digits: re.Match[str]) -> str:
    return f"{float(digits[0]):.1f}"
