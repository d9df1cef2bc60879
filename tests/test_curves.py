"""Reading metrics files, and thinning that keeps what a curve has to say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.disk import append_line
from alignlab.reports.curves import OF_ONE, OF_SEVERAL, Mark, Point, draw_up, thin
from alignlab.runs.logs import NAMES, read_metrics
from alignlab.runs.run import Limits

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


def run(name: str = "dpo", **facts):
    """As much of a run's facts as curves look at."""
    its = {"stage": "dpo", "limits": Limits(), "best_step": None, "ended_early": False, "steps": 10}
    return SimpleNamespace(name=name, **{**its, **facts})


def points(values, reach=None):
    return [Point(i, v, *((None, None) if reach is None else (v - reach, v + reach))) for i, v in enumerate(values)]


@given(values, st.integers(10, 100))
def test_thinning_keeps_the_ends_and_the_extremes_of_every_stretch(values, most):
    kept = thin(points(values), most)
    assert len(kept) <= most
    assert kept[0] == points(values)[0] and kept[-1] == points(values)[-1]
    assert (min(v for _, v, *_ in kept), max(v for _, v, *_ in kept)) == (min(values), max(values))
    assert set(kept) <= set(points(values)) and kept == sorted(kept, key=lambda point: point[0])


@given(values)
def test_a_short_curve_is_left_as_it_is(values):
    assert thin(points(values), 400) == points(values)


def test_one_spike_in_five_thousand_steps_survives():
    values = [0.0] * 5000
    values[3217] = 9.0
    assert (3217, 9.0, None, None) in thin(points(values), 100)


def test_the_step_that_was_kept_survives():
    assert (1234, 0.0, None, None) in thin(points([0.0] * 5000), 50, always=1234)


def test_the_widest_interval_survives():
    """A flat curve whose band is wide at one step only."""
    flat = points([1.0] * 1000, 0.1)
    flat[500] = Point(500, 1.0, -5.0, 7.0)
    assert flat[500] in thin(flat, 50)


def test_a_last_line_cut_off_by_a_crash_is_said(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (0, 10):
        append_line(file, {"step": step, "train/loss": 1.0})
    with file.open("ab") as stream:
        stream.write(b'{"step": 20, "train/lo')
    rows, notices = read_metrics(file)
    assert [row["step"] for row in rows] == [0, 10]
    assert notices == ["the last line of metrics.jsonl is cut off, by a crash or a write under way: used up to step 10"]


def test_a_last_line_that_lacks_only_its_newline_counts(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "train/loss": 1.0}\n{"step": 5, "train/loss": 0.5}')
    assert [row["step"] for row in read_metrics(file)[0]] == [0, 5] and not read_metrics(file)[1]


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\nnonsense\n[1]\n\xff\xfe\n{"train/loss": 1}\n\n{"step": 5}\n')
    rows, notices = read_metrics(file)
    assert [row["step"] for row in rows] == [0, 5]
    assert notices == ["4 lines of metrics.jsonl cannot be read and are left out"]


@pytest.mark.parametrize("content", [None, b"", b"\n"])
def test_no_metrics_are_no_rows(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], [])


def test_what_is_not_a_number_is_not_drawn(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "train/loss": v} for i, v in enumerate([1.0, float("nan"), None, "x", True, float("inf"), 0.5])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (loss,) = draw_up([run()], [read_metrics(file)[0]])
    assert loss.title == "Loss" and [point[:2] for point in loss.series[0].points] == [(0, 1.0), (6, 0.5)]


def test_one_run_shows_training_and_held_out_several_only_held_out():
    rows = [{"step": i, "train/loss": 1.0, "eval/loss": 1.1} for i in range(3)]
    (alone,) = draw_up([run()], [rows])
    (together,) = draw_up([run(), run("other")], [rows, [{"step": 0, "train/loss": 1.0}]])
    assert [s.kind for s in alone.series] == ["training", "held-out"]
    assert [(s.run, s.kind) for s in together.series] == [("dpo", "held-out"), ("other", "training")]


def test_the_band_is_1_96_standard_errors():
    rows = [{"step": 0, "eval/kl": 1.0, "eval/kl_stderr": 0.1}]
    (kl,) = draw_up([run()], [rows])
    assert kl.series[0].points == [(0, 1.0, pytest.approx(0.804, abs=1e-4), pytest.approx(1.196, abs=1e-4))]


def test_limits_the_kept_step_and_an_early_stop_are_marked():
    stopped = run(limits=Limits(max_kl=20.0), best_step=5, ended_early=True)
    (kl,) = draw_up([stopped], [[{"step": 0, "eval/kl": 1.0}]])
    assert kl.limits == [20.0]
    assert kl.marks == [Mark(5, "kept"), Mark(10, "stopped")]


def test_every_metric_that_is_drawn_is_read():
    drawn = {
        name for panels in (OF_ONE, OF_SEVERAL) for its in panels.values() for panel in its for name in panel.metrics
    }
    assert drawn <= set(NAMES)
