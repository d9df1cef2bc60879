"""A metrics file → the curves of a report: read as far as it is whole, and thinned so that every extreme stays."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.estimate import is_number

Z95 = 1.96  # standard errors to each side of a 95 % band over many pairs or replies
POINTS = 240  # of a curve that has its chart to itself: more than the chart has pixels to show
POINTS_SHARED = 960  # of all runs' curves together, in a chart that several share
FEWEST = 40


@dataclass(frozen=True)
class Panel:
    """One chart over steps: the metrics in it, under their names without `train/` and `eval/`."""

    title: str
    unit: str
    metrics: Mapping[str, str]  # name → what its curve is called, empty where the chart has no other
    note: str
    share: bool = False
    limit: str | None = None  # the key of the manifest's limits


MARGIN = Panel("Reward margin", "reward", {"rewards/margins": ""}, "chosen minus rejected reward, mean over pairs")
ACCURACY = Panel(
    "Accuracy of the implicit reward",
    "share of pairs",
    {"rewards/accuracies": ""},
    "pairs whose chosen reply has the higher reward; chance is 50%, and step 0 has none",
    share=True,
    limit="max_accuracy",
)
CHOSEN = Panel("Reward of chosen replies", "reward", {"rewards/chosen": ""}, "below 0: less likely than before DPO")
REJECTED = Panel("Reward of rejected replies", "reward", {"rewards/rejected": ""}, "below 0: less likely than before")
REWARDS = Panel(
    "Chosen and rejected reward",
    "reward",
    {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "beta times the log-ratio to the reference; below 0: less likely than before DPO",
)
LOSS = Panel("Loss", "loss", {"loss": ""}, "as TRL reports it, all terms of dpo.loss_type together")
SFT_LOSS = Panel("Loss", "nats per token", {"loss": ""}, "of the reply's tokens")
KL = Panel("KL from the reference", "nats per reply", {"kl": ""}, "on replies sampled from the policy", limit="max_kl")
LENGTH = Panel("Reply length", "tokens per reply", {"reply_tokens": ""}, "mean of the sampled replies")
PERPLEXITY = Panel("Perplexity of chosen replies", "perplexity", {"perplexity": ""}, "held-out; lower is likelier")

OF_ONE = {"dpo": (MARGIN, ACCURACY, REWARDS, LOSS, KL, LENGTH, PERPLEXITY), "sft": (SFT_LOSS, PERPLEXITY, LENGTH)}
OF_SEVERAL = {"dpo": (MARGIN, ACCURACY, CHOSEN, REJECTED, LOSS, KL, LENGTH, PERPLEXITY), "sft": OF_ONE["sft"]}

PANELS = (*OF_ONE["dpo"], *OF_ONE["sft"], *OF_SEVERAL["dpo"])
METRICS = {name for panel in PANELS for name in panel.metrics} | {"eos_rate", "epoch"}
READ = {f"{split}/{name}{of}" for split in ("eval", "train") for name in METRICS for of in ("", "_stderr")} | {
    "step",
    "time",
}

Point = tuple[float, float, float | None, float | None]  # step, value, and its 95 % interval where one is known


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that can be read, in order of their steps, and one sentence for each thing that was left out.

    A row holds what reports show; the rest of a long run's log would only take memory and time.
    """
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    tail = lines.pop() if lines else b""
    with _no_garbage():
        found = [_row(line) for line in lines if line.strip()]
    bad = found.count(None)
    cut = bool(tail.strip()) and _row(tail) is None
    rows = sorted((row for row in [*found, *([] if cut else [_row(tail)])] if row), key=lambda row: row["step"])
    last = f"used up to step {rows[-1]['step']}" if rows else "nothing before it"
    notices = [f"the last line of {file.name} is cut off, by a crash or a write under way: {last}"] if cut else []
    if bad:
        notices.append(
            f"{bad} line{'s' * (bad > 1)} of {file.name} cannot be read and {'are' if bad > 1 else 'is'} left out"
        )
    return rows, notices


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Without the collector, which would walk tens of thousands of new rows again and again to find none to free."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        return None
    if not isinstance(row, dict) or not is_number(row.get("step")):
        return None
    return {key: row[key] for key in READ & row.keys()}


def charts(runs: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The charts over steps for runs of one stage, with their points; one that would be empty is left out.

    A single run shows its training and its held-out curve; several show the held-out one, or training's where a run
    has no other.
    """
    several = len(runs) > 1
    most = max(FEWEST, POINTS_SHARED // len(runs)) if several else POINTS
    found = []
    for panel in (OF_SEVERAL if several else OF_ONE)[runs[0]["stage"]]:
        series = [s for run, its in zip(runs, rows, strict=True) for s in _series(panel, run, its, several, most)]
        if series:
            found.append(_chart(panel, runs, series))
    return found


def _chart(panel: Panel, runs: Sequence[Mapping[str, Any]], series: list[dict[str, Any]]) -> dict[str, Any]:
    limits = sorted({run["limits"][panel.limit] for run in runs if panel.limit and run["limits"].get(panel.limit)})
    marks = [] if len(runs) > 1 else _marks(runs[0])
    band = len(runs) == 1 and any(point[2] is not None for s in series for point in s["points"])
    return {
        "title": panel.title,
        "unit": panel.unit,
        "note": f"{panel.note}; the band is a 95% interval" if band else panel.note,
        "share": panel.share,
        "series": series,
        "limits": limits,
        "marks": marks,
        "thinned": any(s["of"] > len(s["points"]) for s in series),
    }


def _marks(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the run ended before its last planned step, and the step whose weights it kept."""
    marks = []
    if run["best_step"] is not None:
        marks.append({"step": run["best_step"], "label": "kept"})
    if run["ended_early"] and run["steps"] is not None and run["steps"] != run["best_step"]:
        marks.append({"step": run["steps"], "label": "stopped"})
    return marks


def _series(panel: Panel, run: Mapping[str, Any], rows, several: bool, most: int) -> Iterable[dict[str, Any]]:
    for metric, called in panel.metrics.items():
        held_out = _points(rows, f"eval/{metric}")
        training = [] if several and held_out else _points(rows, f"train/{metric}")
        for kind, points in (("training", training), ("held-out", held_out)):
            if points:
                yield {
                    "run": run["name"],
                    "kind": kind,
                    "called": called,
                    "metric": f"{'eval' if kind == 'held-out' else 'train'}/{metric}",
                    "points": [tuple(map(rounded, point)) for point in thin(points, most, run["best_step"])],
                    "of": len(points),
                    "kept": run["best_step"],
                }


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """The finite values of a metric; of a step that was logged twice, the last."""
    stderr = f"{name}_stderr"
    found = {row["step"]: (row[name], row.get(stderr)) for row in rows if name in row and is_number(row[name])}
    return [(step, value, *_interval(value, error)) for step, (value, error) in found.items()]


def _interval(value: float, error: Any) -> tuple[float | None, float | None]:
    return (value - Z95 * error, value + Z95 * error) if error is not None and is_number(error) else (None, None)


def rounded(value: float | None) -> float | None:
    """Six significant digits."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def thin(points: Sequence[Point], most: int, always: int | None = None) -> list[Point]:
    """At most `most` of the points: the first, the last, and of each stretch between its lowest and its highest.

    Where points have intervals, the lowest low and the highest high of each stretch are kept as well; and the point at
    the step `always`.
    """
    if len(points) <= most:
        return list(points)
    values = [point[1] for point in points]
    edges = [(min, values), (max, values)]
    if any(point[2] is not None for point in points):
        edges += [(min, [p[1] if p[2] is None else p[2] for p in points])]
        edges += [(max, [p[1] if p[3] is None else p[3] for p in points])]
    stretches = (most - 3) // len(edges)
    bounds = [i * len(points) // stretches for i in range(stretches + 1)]
    kept = {0, len(points) - 1, *(at for at, point in enumerate(points) if point[0] == always)}
    for start, end in itertools.pairwise(bounds):
        for pick, edge in edges:
            stretch = edge[start:end]
            kept.add(start + stretch.index(pick(stretch)))
    return [points[at] for at in sorted(kept)]
