"""Logged metrics → the curves of a report, thinned so that every extreme stays."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignlab.runs.facts import RunFacts
from alignlab.runs.logs import MetricRow
from alignlab.text.estimate import Estimate, is_number

POINTS = 240  # of a curve that has its chart to itself: more than the chart has pixels to show
POINTS_SHARED = 960  # of all runs' curves together, in a chart that several share
FEWEST = 40


class Point(NamedTuple):
    """A value at a step, with its 95 % interval where one is known."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One curve."""

    run: str
    kind: str  # training or held-out
    called: str  # what is drawn, empty where the chart has only one metric
    metric: str
    points: Sequence[Point]
    of: int  # points before thinning
    kept: int | None  # the step whose weights were kept


@dataclass(frozen=True)
class Mark:
    """An upright line at a step."""

    step: int
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves over steps that share their axes."""

    title: str
    unit: str
    note: str
    share: bool
    series: Sequence[Series]
    limits: Sequence[float] = ()
    marks: Sequence[Mark] = ()

    @property
    def thinned(self) -> bool:
        return any(series.of > len(series.points) for series in self.series)


@dataclass(frozen=True)
class Member:
    """A member of a sweep in a chart of reward against KL."""

    label: str
    x: Estimate
    y: Estimate
    chosen: bool


@dataclass(frozen=True)
class Frontier:
    """Reward against KL, one point a member."""

    title: str
    unit: str
    share: bool
    points: Sequence[Member]
    limit: float | None


@dataclass(frozen=True)
class Panel:
    """Which metrics a chart shows, under their names without `train/` and `eval/`."""

    title: str
    unit: str
    metrics: Mapping[str, str]  # name → what its curve is called, empty where the chart has no other
    note: str
    share: bool = False
    limit: str = ""  # the attribute of the run's limits


MARGIN = Panel("Reward margin", "reward", {"rewards/margins": ""}, "chosen minus rejected reward, mean over pairs")
ACCURACY = Panel(
    "Accuracy of the implicit reward",
    "share of pairs",
    {"rewards/accuracies": ""},
    "pairs whose chosen reply has the higher reward; chance is 50%, and step 0 has none",
    share=True,
    limit="max_accuracy",
)
CHOSEN = Panel("Reward of chosen replies", "reward", {"rewards/chosen": ""}, "below 0: less likely than before")
REJECTED = Panel("Reward of rejected replies", "reward", {"rewards/rejected": ""}, "below 0: less likely than before")
REWARDS = Panel(
    "Chosen and rejected reward",
    "reward",
    {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "beta times the log-ratio to the reference; below 0: less likely than before (ORPO's have no reference)",
)
LOSS = Panel("Loss", "loss", {"loss": ""}, "as TRL reports it, all its terms together")
SFT_LOSS = Panel("Loss", "nats per token", {"loss": ""}, "of the reply's tokens")
KL = Panel("KL from the reference", "nats per reply", {"kl": ""}, "on replies sampled from the policy", limit="max_kl")
LENGTH = Panel("Reply length", "tokens per reply", {"reply_tokens": ""}, "mean of the sampled replies")
PERPLEXITY = Panel("Perplexity of chosen replies", "perplexity", {"perplexity": ""}, "held-out; lower is likelier")

OF_ONE = {"dpo": (MARGIN, ACCURACY, REWARDS, LOSS, KL, LENGTH, PERPLEXITY), "sft": (SFT_LOSS, PERPLEXITY, LENGTH)}
OF_SEVERAL = {"dpo": (MARGIN, ACCURACY, CHOSEN, REJECTED, LOSS, KL, LENGTH, PERPLEXITY), "sft": OF_ONE["sft"]}


def draw_up(runs: Sequence[RunFacts], rows: Sequence[Sequence[MetricRow]]) -> list[Chart]:
    """The charts over steps for runs that are all SFT's or all not, with their points; an empty one is left out.

    Losses of different objectives share no chart.

    A single run shows its training and its held-out curve; several show the held-out one, or training's where a run
    has no other.
    """
    several = len(runs) > 1
    most = max(FEWEST, POINTS_SHARED // len(runs)) if several else POINTS
    found = []
    stages = {run.stage for run in runs}
    panels = (OF_SEVERAL if several else OF_ONE)["sft" if stages == {"sft"} else "dpo"]
    for panel in panels if len(stages) == 1 else (each for each in panels if each is not LOSS):
        series = [s for run, its in zip(runs, rows, strict=True) for s in _series(panel, run, its, several, most)]
        if series:
            found.append(_chart(panel, runs, series))
    return found


def _chart(panel: Panel, runs: Sequence[RunFacts], series: list[Series]) -> Chart:
    limits = {getattr(run.limits, panel.limit) for run in runs} if panel.limit else set()
    has_band = len(runs) == 1 and any(point.low is not None for each in series for point in each.points)
    return Chart(
        panel.title,
        panel.unit,
        f"{panel.note}; the band is a 95% interval" if has_band else panel.note,
        panel.share,
        series,
        sorted(limit for limit in limits if limit),
        _marks(runs[0]) if len(runs) == 1 else (),
    )


def _marks(run: RunFacts) -> list[Mark]:
    """The step whose weights were kept, and where the run ended before its last planned step."""
    marks = []
    if run.best_step is not None:
        marks.append(Mark(run.best_step, "kept"))
    if run.ended_early and run.steps is not None and run.steps != run.best_step:
        marks.append(Mark(run.steps, "stopped"))
    return marks


def _series(panel: Panel, run: RunFacts, rows: Sequence[MetricRow], several: bool, most: int) -> Iterable[Series]:
    for metric, called in panel.metrics.items():
        held_out = _points(rows, f"eval/{metric}")
        training = [] if several and held_out else _points(rows, f"train/{metric}")
        for kind, split, points in (("training", "train", training), ("held-out", "eval", held_out)):
            if points:
                thinned = [Point(*map(_rounded, point)) for point in thin(points, most, run.best_step)]
                yield Series(run.name, kind, called, f"{split}/{metric}", thinned, len(points), run.best_step)


def _points(rows: Sequence[MetricRow], name: str) -> list[Point]:
    """The finite values of a metric; of a step that was logged twice, the last."""
    found = {row["step"]: row for row in rows if is_number(row.get(name))}
    return [_point(step, row[name], row.get(f"{name}_stderr")) for step, row in found.items()]


def _point(step: int, value: float, stderr: Any) -> Point:
    if not is_number(stderr):
        return Point(step, value)
    known = Estimate(value, stderr).with_interval()
    return Point(step, value, known.low, known.high)


def _rounded(value: float | None) -> float | None:
    """Six significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def thin(points: Sequence[Point], most: int, always: int | None = None) -> list[Point]:
    """At most `most` of the points: the first, the last, and of each stretch between its lowest and its highest.

    Where points have intervals, the lowest low and the highest high of each stretch are kept as well; and the point at
    the step `always`.
    """
    if len(points) <= most:
        return list(points)
    values = [point.value for point in points]
    edges = [(min, values), (max, values)]
    if any(point.low is not None for point in points):
        edges += [(min, [p.value if p.low is None else p.low for p in points])]
        edges += [(max, [p.value if p.high is None else p.high for p in points])]
    stretches = (most - 3) // len(edges)
    bounds = [i * len(points) // stretches for i in range(stretches + 1)]
    kept = {0, len(points) - 1, *(at for at, point in enumerate(points) if point.step == always)}
    for start, end in itertools.pairwise(bounds):
        for pick, edge in edges:
            stretch = edge[start:end]
            kept.add(start + stretch.index(pick(stretch)))
    return [points[at] for at in sorted(kept)]


def spoken_curves(chart: Chart, labels: Mapping[str, str]) -> str:
    """A chart in words, for those who do not see it: where each curve starts and ends."""
    parts = []
    for series in chart.series:
        first, last = series.points[0], series.points[-1]
        name = labels[series.run] if len(labels) > 1 else ""
        who = " ".join(filter(None, [name, series.called, series.kind]))
        parts.append(f"{who} from {first.value:.3g} at step {first.step} to {last.value:.3g} at step {last.step}")
    return f"{chart.title}: {'; '.join(parts)}"


def spoken_frontier(frontier: Frontier) -> str:
    points = [f"{p.label} at KL {p.x.mean:.3g}, {p.y.mean:.3g}" for p in frontier.points]
    return f"{frontier.title}: {'; '.join(points)}"
