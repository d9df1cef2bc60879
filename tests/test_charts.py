"""Drawings: well-formed, in the page's colours, legible without colour, and with nothing of a document around them."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.report.charts import apart, draw_curves, draw_frontier, ellipsis

SVG = "{http://www.w3.org/2000/svg}"


def chart(series, **facts) -> dict:
    its = {
        "title": "KL",
        "unit": "nats per reply",
        "note": "",
        "share": False,
        "limits": [],
        "marks": [],
        "thinned": False,
    }
    return {**its, "series": series, **facts}


def series(run="dpo", kind="held-out", called="", values=(0.0, 1.0, 2.0), reach=None, kept=None) -> dict:
    points = [(10 * i, v, *((None, None) if reach is None else (v - reach, v + reach))) for i, v in enumerate(values)]
    return {"run": run, "kind": kind, "called": called, "points": points, "of": len(points), "kept": kept}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def texts(svg: str) -> list[str]:
    return [found.text for found in parsed(svg).iter(f"{SVG}text")]


def test_a_drawing_is_one_element_with_words_for_those_who_do_not_see_it():
    svg = draw_curves(chart([series()]), {"dpo": "dpo"})
    assert svg.startswith("<svg viewBox=") and parsed(svg).get("role") == "img"
    assert parsed(svg).get("aria-label") == "KL: held-out from 0 at step 0 to 2 at step 20"


def test_every_colour_is_the_pages():
    svg = draw_curves(
        chart([series(reach=0.2, kept=10)], limits=[1.5], marks=[{"step": 10, "label": "kept"}]), {"dpo": "dpo"}
    )
    assert not re.search(r"#[0-9a-f]{6}\b", svg) and "var(--accent)" in svg and "var(--warn)" in svg


def test_text_is_text_and_the_axes_say_their_units():
    assert {"nats per reply", "step", "held-out"} <= set(texts(draw_curves(chart([series()]), {"dpo": "dpo"})))


def test_ticks_are_not_rounded():
    """Only positions are: 1.225 on an axis stays 1.225."""
    assert "1.225" in texts(draw_curves(chart([series(values=(1.2, 1.25, 1.3))]), {"dpo": "dpo"}))


def test_two_charts_of_a_page_share_no_id():
    ids = [set(re.findall(r'id="([^"]+)"', draw_curves(chart([series()], title=t), {"dpo": "x"}))) for t in ("A", "B")]
    assert ids[0] and not ids[0] & ids[1]


def test_several_runs_differ_in_more_than_colour():
    names = [f"run{i}" for i in range(8)]
    svg = draw_curves(
        chart([series(run=name, values=(i, i + 1.0)) for i, name in enumerate(names)]),
        dict(zip(names, names, strict=True)),
    )
    dashes = re.findall(r'<path d="[^"]*" [^>]*style="([^"]*)"', svg)
    looks = {
        re.sub(r"var\(--\w+\)", "", look) for look in dashes if "stroke-width: 1.2" in look or "stroke-width: 2" in look
    }
    assert len(looks) >= 7 and set(names) <= set(texts(svg))


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'a" onload="alert(1)', "a&b", "$x_1$ $y$", "名前", "⟨U+202E⟩"]
)
def test_a_runs_name_is_text(name):
    svg = draw_curves(chart([series(run=name), series(run="b")]), {name: name, "b": "b"})
    assert ellipsis(name, 18) in texts(svg)
    assert not list(parsed(svg).iter(f"{SVG}script")) and parsed(svg).get("onload") is None


def test_a_limit_far_above_is_named_and_does_not_squash_the_curve():
    near, far = (texts(draw_curves(chart([series()], limits=[limit]), {"dpo": "x"})) for limit in (2.5, 20.0))
    assert "guard limit 2.5" in near and "guard limit 20, above ↑" in far and "20" not in far


@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (1e-12, 1e12), tuple(float(i % 7) for i in range(500))])
def test_any_curve_can_be_drawn(values):
    assert parsed(draw_curves(chart([series(values=values, reach=0.1)]), {"dpo": "dpo"})) is not None


def test_the_frontier_marks_the_choice_and_the_limit_in_words():
    estimate = lambda mean: {"mean": mean, "stderr": 0.1, "n": 9, "low": mean - 0.2, "high": mean + 0.2}
    points = [
        {"name": f"m{i}", "label": f"beta {i}", "x": estimate(float(i)), "y": estimate(1.0), "chosen": i == 2}
        for i in range(4)
    ]
    found = texts(draw_frontier({"title": "F", "unit": "margin", "share": False, "points": points, "limit": 3.5}))
    assert {"beta 2 — chosen", "beta 0", "limit 3.5", "KL from the reference, nats per reply"} <= set(found)


def test_a_point_without_an_interval_can_be_drawn():
    bare = {"mean": 1.0, "stderr": None, "n": 1, "low": None, "high": None}
    point = {"name": "m", "label": "m", "x": bare, "y": bare, "chosen": False}
    assert "m" in texts(draw_frontier({"title": "F", "unit": "", "share": True, "points": [point], "limit": None}))


@given(st.lists(st.floats(0, 170), min_size=1, max_size=10))
def test_names_at_the_ends_do_not_lie_on_each_other(wanted):
    placed = sorted(apart(wanted, 12, 170))
    assert all(b - a >= 12 - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1e-6 and placed[-1] <= 170 + 1e-6


def test_names_that_collide_move_apart_both_ways():
    """Three wishes for 50 with 12 between them: 38, 50, 62."""
    assert sorted(apart([50.0, 50.0, 50.0], 12, 170)) == pytest.approx([38, 50, 62])


@given(st.text(max_size=60))
def test_an_ellipsis_keeps_both_ends(name):
    short = ellipsis(name, 18)
    assert len(short) <= 18 and (short == name or (short[:3] == name[:3] and short[-3:] == name[-3:]))
