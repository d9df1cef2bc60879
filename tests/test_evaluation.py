"""What an eval.json says, whoever wrote it: read, or refused in one line; which of several is shown; and targets."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from built import evaluation, wins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignlab.errors import RunError
from alignlab.recipe.load import TargetsSection
from alignlab.reports.page import write_report
from alignlab.reports.replies import judged_replies
from alignlab.runs.evaluation import (
    FILE,
    REPLIES,
    Evaluation,
    ModelFacts,
    Rating,
    all_evaluations,
    judge_targets,
    keep,
    read_evaluation,
    targets_figures,
)
from alignlab.text.estimate import Estimate
from alignlab.text.tables import Row, WinRate

RATE = wins(68, 40, 9)
ROW = Row(group="win rate", measure="over sft", unit="share", values={"dpo": RATE}, change={"dpo": None}, note="x")
FULL = replace(
    evaluation(RATE, identical=25),
    table=[
        ROW,
        Row(group="held-out preference", measure="margin", values={"dpo": Estimate(0.5, 0.02, 117, 0.46, 0.54)}),
    ],
    ratings=[Rating("dpo", Estimate(1100.0, 20.0, 117, 1060.0, 1140.0))],
    pairs=250,
    warnings=["a warning"],
    decoding={"sampled": True, "max_new_tokens": 48},
)
PLAIN = json.loads(json.dumps(asdict(FULL)))


def written(folder: Path, tree) -> Path:
    file = folder / FILE
    file.write_text(json.dumps(tree))
    return file


def test_what_was_written_is_read_back(tmp_path):
    assert json.loads(json.dumps(asdict(read_evaluation(written(tmp_path, PLAIN))))) == PLAIN
    assert read_evaluation(tmp_path / "nothing.json") is None


def test_a_win_rate_keeps_its_counts_and_turns_round(tmp_path):
    found = read_evaluation(written(tmp_path, PLAIN))
    ours, theirs = found.over("dpo", "sft"), found.over("sft", "dpo")
    assert ours.counts == "68 wins, 40 ties, 9 losses" and theirs.counts == "9 wins, 40 ties, 68 losses"
    assert theirs.mean == pytest.approx(1 - ours.mean) and (theirs.low, theirs.n) == (pytest.approx(1 - ours.high), 117)
    assert isinstance(found.table[0].values["dpo"], WinRate) and found.over("dpo", "base") is None


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["models"], 3, "models is 3"),
        (["models", 0], {}, "models.0.name is missing"),
        (["pairs"], "many", "pairs is 'many'"),
        (["win_rates", 0, "win_rate"], {"mean": "x"}, "win_rates.0.win_rate.mean is 'x'"),
        (["win_rates", 0, "wins"], 1.5, "win_rates.0.wins is 1.5"),
        (["table", 0, "values"], [], "table.0.values is []"),
        (["warnings"], {"a": 1}, "warnings is {'a': 1}"),
        (["ratings", 0, "elo"], None, "ratings.0.elo is None"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_file(tmp_path, place, value, said):
    tree = copy.deepcopy(PLAIN)
    at = tree
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    with pytest.raises(RunError) as error:
        read_evaluation(written(tmp_path, tree))
    assert said in str(error.value) and str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)
    assert "make it anew with alignlab eval" in str(error.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(tree, path=()) -> list[tuple]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(*path, key) for key, _ in items] + [p for key, its in items for p in places(its, (*path, key))]


def changed(place: tuple, value, remove: bool):
    """The evaluation with any value at any place, or with nothing there."""
    tree = copy.deepcopy(PLAIN)
    at = tree
    for key in place[:-1]:
        at = at[key]
    if remove:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return tree


OF_ANOTHER_HAND = st.builds(changed, st.sampled_from(places(PLAIN)), ANYTHING, st.booleans())
QUICKLY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@given(OF_ANOTHER_HAND)
@settings(max_examples=300, **QUICKLY)
def test_an_evaluation_of_another_hand_is_read_or_refused_in_one_line(tmp_path, tree):
    file = written(tmp_path, tree)
    try:
        assert isinstance(read_evaluation(file), Evaluation)
    except RunError as error:
        assert str(file) in str(error) and "\n" not in str(error)


@given(OF_ANOTHER_HAND)
@settings(max_examples=25, **QUICKLY)
def test_the_page_of_an_evaluation_of_another_hand_is_written_or_refused_in_one_line(tmp_path, tree):
    run = prepared(tmp_path)
    written(run, tree)
    try:
        page = write_report(run)
    except RunError as error:
        assert FILE in str(error) and "\n" not in str(error)
    else:
        assert page.read_text(encoding="utf-8").endswith("</html>")


@given(st.binary(max_size=40))
@settings(max_examples=50, **QUICKLY)
def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunError) as error:
        read_evaluation(tmp_path / FILE)
    assert "\n" not in str(error.value)


def prepared(folder: Path) -> Path:
    """A run directory with metrics and replies, made once."""
    from test_report import make

    run = folder / "tiny" / "dpo"
    return run if run.exists() else make(run, rows=[{"step": 0, "eval/loss": 0.7}, {"step": 40, "eval/loss": 0.6}])


# --- several evaluations ---


def kept(folder: Path, **facts) -> tuple[Path, Evaluation]:
    found = replace(FULL, made="2026-01-01T00:00:00Z", **facts)
    reply = {"prompts": "held-out", "number": 0, "prompt": "?", "model": "dpo"}
    return keep(folder, str(facts), found, [reply], []), found


def test_the_fullest_is_shown(tmp_path):
    quick, _ = kept(tmp_path, limit=2, pairs=2, prompts=2)
    assert (tmp_path / FILE).read_bytes() == quick.read_bytes()
    full, _ = kept(tmp_path)
    kept(tmp_path, limit=4, pairs=4, prompts=4)
    unjudged, _ = kept(tmp_path, judge=None, pairs=400)
    assert (tmp_path / FILE).read_bytes() == full.read_bytes()
    assert [each.file for each in all_evaluations(tmp_path)][:2] == [full, unjudged]
    assert (tmp_path / REPLIES).read_bytes() == full.with_suffix(f".{REPLIES}").read_bytes()


def test_the_same_again_replaces_itself(tmp_path):
    first, _ = kept(tmp_path)
    assert kept(tmp_path)[0] == first and len(all_evaluations(tmp_path)) == 1


def test_another_judge_of_the_same_prompts_stands_beside_and_the_newer_is_shown(tmp_path):
    kept(tmp_path)
    found = replace(FULL, made="2026-01-02T00:00:00Z", judge="llm:m")
    newer = keep(tmp_path, "another", found, [], [])
    assert (tmp_path / FILE).read_bytes() == newer.read_bytes() and len(all_evaluations(tmp_path)) == 2


def test_one_that_cannot_be_read_is_named_and_left_out(tmp_path, caplog):
    kept(tmp_path)
    (tmp_path / "eval" / "broken.json").write_text("{")
    assert len(all_evaluations(tmp_path)) == 1 and "broken.json is not JSON" in caplog.text


def test_an_evaluation_of_other_weights_counts_no_longer(tmp_path):
    models = [ModelFacts(name="sft", content="a"), ModelFacts(name="dpo", content="b")]
    kept(tmp_path, models=models)
    again, _ = kept(tmp_path, models=[models[0], ModelFacts(name="dpo", content="c")], limit=2)
    assert (tmp_path / FILE).read_bytes() == again.read_bytes()


def test_an_older_evaluation_without_replies_shows_none(tmp_path):
    kept(tmp_path)
    (tmp_path / REPLIES).unlink()
    assert judged_replies(tmp_path, FULL) is None


# --- targets ---


def interval(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, 0.1, 50, low, high)


@pytest.mark.parametrize(
    ("figure", "found", "outcome"),
    [
        ("win_rate", interval(0.61, 0.8), "met"),
        ("win_rate", interval(0.5, 0.7), "not decidable"),
        ("win_rate", interval(0.4, 0.59), "missed"),
        ("margin", interval(0.51, 0.9), "met"),
        ("accuracy", interval(0.3, 0.5), "missed"),
        ("kl", interval(3.0, 9.9), "met"),
        ("kl", interval(9.0, 11.0), "not decidable"),
        ("kl", interval(10.1, 60.0), "missed"),
        ("perplexity", interval(-0.01, 0.04), "met"),
        ("perplexity", interval(0.02, 0.06), "not decidable"),
        ("perplexity", interval(0.06, 0.3), "missed"),
        ("perplexity", interval(-0.3, -0.06), "missed"),
        ("kl", Estimate(3.0), "not decidable"),
        ("kl", None, "not measured"),
    ],
)
def test_a_target_is_met_where_the_whole_interval_is_on_its_side(figure, found, outcome):
    targets = replace(
        TargetsSection(**dict.fromkeys(vars(TargetsSection()))), **{figure: vars(TargetsSection())[figure]}
    )
    (target,) = judge_targets(targets, {figure: found})
    assert target.outcome == outcome


def test_a_target_that_is_none_is_not_asked():
    assert judge_targets(TargetsSection(**dict.fromkeys(vars(TargetsSection()))), {}) == []


def test_the_change_of_perplexity_is_relative_to_the_reference():
    """From 2.0 by 0.1 ± 0.02 is 5 ± 1 %."""
    change = Estimate(0.1, 0.02, 50, 0.06, 0.14)
    row = Row(group="cost", measure="perplexity of chosen", values={"sft": Estimate(2.0)}, change={"dpo": change})
    found = targets_figures(replace(FULL, table=[row]), "dpo")["perplexity"]
    assert (found.mean, found.stderr, found.low) == pytest.approx((0.05, 0.01, 0.03))
