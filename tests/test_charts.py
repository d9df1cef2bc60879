"""Drawings: well-formed, in the page's colours, legible without colour, and files of their own."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.reports.charts import VARIABLES, draw_curves, draw_features, draw_frontier, draw_lengths, in_page
from alignlab.reports.curves import Chart, Frontier, Mark, Member, Point, Series
from alignlab.runs.run import Feature, Histogram
from alignlab.text.estimate import Estimate
from alignlab.text.tables import ellipsis

SVG = "{http://www.w3.org/2000/svg}"


def chart(series, title="KL", **facts) -> Chart:
    return Chart(title, "nats per reply", "", False, series, **facts)


def series(run="dpo", kind="held-out", called="", values=(0.0, 1.0, 2.0), reach=None, kept=None) -> Series:
    points = [
        Point(10 * i, v, *((None, None) if reach is None else (v - reach, v + reach))) for i, v in enumerate(values)
    ]
    return Series(run, kind, called, "eval/kl", points, len(points), kept)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [found.text for found in parsed(svg).iter(f"{SVG}text")]


def test_a_drawing_is_a_file_of_its_own():
    svg = draw_curves(chart([series()]), {"dpo": "dpo"})
    assert svg.startswith("<?xml") and parsed(svg).tag == f"{SVG}svg" and "var(--" not in svg


def test_the_same_chart_is_drawn_the_same():
    assert draw_curves(chart([series()]), {"dpo": "dpo"}) == draw_curves(chart([series()]), {"dpo": "dpo"})


def test_every_colour_in_a_page_is_the_pages():
    drawn = chart([series(reach=0.2, kept=10)], limits=[1.5], marks=[Mark(10, "kept"), Mark(20, "stopped")])
    element = in_page(draw_curves(drawn, {"dpo": "dpo"}), "words")
    assert not re.search(r"#[0-9a-f]{6}\b", element) and "var(--run-1)" in element and "var(--warn)" in element


def test_the_page_defines_every_colour_of_the_drawings():
    from pathlib import Path

    from alignlab import reports

    css = Path(reports.__file__).with_name("report.css").read_text()
    for colour, name in VARIABLES.items():
        assert f"--{name}: {colour};" in css, "the light colours are the drawings' own"
        assert css.count(f"--{name}:") >= 2, "and there are dark ones"


def test_a_drawing_in_a_page_is_said_in_words():
    element = in_page(draw_curves(chart([series()]), {"dpo": "dpo"}), 'a "quoted" & <b>word</b>')
    assert 'role="img" aria-label="a &quot;quoted&quot; &amp; &lt;b&gt;word&lt;/b&gt;"' in element


def test_text_is_text_and_the_axes_say_their_units():
    assert {"nats per reply", "step", "held-out"} <= set(texts(draw_curves(chart([series()]), {"dpo": "dpo"})))


def test_ticks_are_not_rounded():
    assert "1.225" in texts(draw_curves(chart([series(values=(1.2, 1.25, 1.3))]), {"dpo": "dpo"}))


def test_two_charts_of_a_page_share_no_id():
    elements = [in_page(draw_curves(chart([series()], title), {"dpo": "x"}), title) for title in ("A", "B")]
    ids = [set(re.findall(r'id="([^"]+)"', element)) for element in elements]
    assert ids[0] and not ids[0] & ids[1]
    for element, own in zip(elements, ids, strict=True):
        referred = re.findall(r'(?:href="|url\()#([^")]+)', element)
        assert referred and set(referred) <= own


def test_several_runs_differ_in_more_than_colour():
    names = [f"run{i}" for i in range(8)]
    many = chart([series(run=name, values=(i, i + 1.0)) for i, name in enumerate(names)])
    svg = draw_curves(many, dict(zip(names, names, strict=True)))
    styles = re.findall(r'<path d="[^"]*" [^>]*style="([^"]*)"', svg)
    looks = {
        re.sub(r"stroke: #\w+", "", style)
        for style in styles
        if "stroke-width: 1.2" in style or "stroke-width: 2" in style
    }
    assert len(looks) >= 7 and set(names) <= set(texts(svg))


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'a" onload="alert(1)', "a&b", "$x_1$ $y$", "名前", "⟨U+202E⟩", "_hidden"]
)
def test_a_runs_name_is_text(name):
    svg = draw_curves(chart([series(run=name), series(run="b")]), {name: name, "b": "b"})
    assert name in [text.strip() for text in texts(svg)]
    assert not list(parsed(svg).iter(f"{SVG}script")) and parsed(svg).get("onload") is None


def test_a_limit_far_above_is_named_and_does_not_squash_the_curve():
    near, far = (texts(draw_curves(chart([series()], limits=[limit]), {"dpo": "x"})) for limit in (2.5, 20.0))
    assert "guard limit 2.5" in near and "guard limit 20, far beyond" in far and "20" not in far


@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (1e-12, 1e12), tuple(float(i % 7) for i in range(500))])
def test_any_curve_can_be_drawn(values):
    assert parsed(draw_curves(chart([series(values=values, reach=0.1)]), {"dpo": "dpo"})) is not None


def test_no_legend_is_wider_than_its_drawing():
    """matplotlib lays legends out, but does not break them: eight long names stand below each other."""
    names = [f"dpo-beta0.{i}-learning_rate5e-06-{'x' * 30}" for i in range(8)]
    svg = draw_curves(chart([series(run=name) for name in names]), dict(zip(names, names, strict=True)))
    width = float(parsed(svg).get("viewBox").split()[2])
    places = [float(found.get("x") or 0) for found in parsed(svg).iter(f"{SVG}text") if "…" in (found.text or "")]
    assert len(places) == 8 and max(places) < width / 3


def test_the_frontier_marks_the_choice_and_the_limit_in_words():
    at = lambda mean: Estimate(mean, 0.1, 9, mean - 0.2, mean + 0.2)
    points = [Member(f"beta {i}", at(float(i)), at(1.0), i == 2) for i in range(4)]
    found = texts(draw_frontier(Frontier("F", "margin", False, points, 3.5)))
    assert {"beta 2 (chosen)", "beta 0", "limit 3.5", "KL from the reference, nats per reply"} <= set(found)


def test_a_point_without_an_interval_can_be_drawn():
    point = Member("m", Estimate(1.0, None, 1), Estimate(1.0, None, 1), False)
    assert "m" in texts(draw_frontier(Frontier("F", "", True, [point], None)))


def test_the_data_can_be_drawn():
    lengths = draw_lengths(Histogram(edges=[0, 10, 20], prompt=[80, 9], chosen=[0, 1200], rejected=[1, 0]))
    assert {"prompt", "chosen", "rejected", "1,000"} <= set(texts(lengths))
    features = draw_features([Feature(name="longer", n=9, accuracy=0.62, low=0.58, high=0.66)])
    assert "longer" in texts(features)


@given(st.text(max_size=60))
def test_an_ellipsis_keeps_both_ends(name):
    short = ellipsis(name, 18)
    assert len(short) <= 18 and (short == name or (short[:3] == name[:3] and short[-3:] == name[-3:]))
