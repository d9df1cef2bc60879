"""Rounds: each an ordinary run from the one before, measured against SFT, stopped by guards, and never done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from built import evaluation, wins

from alignlab.errors import DataError, RecipeError
from alignlab.evaluation import watch
from alignlab.evaluation.judge import Verdict
from alignlab.measure.generate import Reply
from alignlab.models.load import weights_hash
from alignlab.recipe.load import load_recipe
from alignlab.rounds import rounds
from alignlab.rounds.rounds import Round, Work, render, run_rounds, write_page
from alignlab.rounds.scores import Seat
from alignlab.runs.run import Run
from alignlab.text.estimate import Estimate
from alignlab.train.stages import prepare_data

ROUNDS = "rounds: {count: 2, samples: 3, prompts: 40}\n"


def as_short_as_can_be(contests) -> list[Verdict]:
    """A judge that wants short replies."""
    lengths = [(len(c.reply_a), len(c.reply_b)) for c in contests]
    return [Verdict(0.5 if a == b else float(a < b), "judged") for a, b in lengths]


@pytest.fixture(scope="module")
def place(folders, of_seconds, tmp_path_factory):
    """A folder in which two rounds were trained."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "quick.yaml").write_text(of_seconds(folders["llama"]) + ROUNDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_rounds(load_recipe("quick"), judge=as_short_as_can_be)
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place / "runs" / "quick"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def work(*overrides: str) -> Work:
    recipe = load_recipe("quick", overrides)
    return Work(recipe, Run(Path("runs/quick/sft")), Seat("short", as_short_as_can_be))


# What a round is


def test_each_round_is_a_finished_run_that_starts_at_the_one_before(here):
    first, second = (Run(here / f"rounds-{k}").manifest for k in (1, 2))
    assert first.status == second.status == "finished" and first.stage == second.stage == "dpo"
    assert (first.parent.start, first.parent.weights) == ("runs/quick/sft/model", weights_hash(here / "sft" / "model"))
    before = weights_hash(here / "rounds-1" / "model")
    assert (second.parent.start, second.parent.weights) == ("runs/quick/rounds-1/model", before)
    assert "runs/quick/rounds-1/model" in second.reference


def test_a_rounds_pairs_are_replies_of_the_round_before(here):
    for k, before in ((1, "sft"), (2, "rounds-1")):
        made = [line["meta"] for line in lines(here / "pairs" / f"rounds-{k}.jsonl") if "meta" in line]
        weights = weights_hash(here / before / "model")
        assert made and {meta["weights"] for meta in made} == {weights}
        assert {meta["run"] for meta in made} == {f"runs/quick/{before}"}


def test_no_round_trains_on_what_the_recipe_holds_out(here):
    _, pairs = prepare_data(load_recipe("quick"))
    for k in (1, 2):
        found = lines(here / "pairs" / f"rounds-{k}.jsonl")
        trained = {line["prompt"] for line in found if line["split"] != "test"}
        assert trained <= {*pairs.train["prompt"]}
        assert {line["prompt"] for line in found if line["split"] == "test"} == {*pairs.test["prompt"]}


def test_rounds_json_says_what_came_of_each_round(here):
    found = json.loads((here / "rounds.json").read_text())
    assert [(each["k"], each["run"]) for each in found["rounds"]] == [(1, "rounds-1"), (2, "rounds-2")]
    for each in found["rounds"]:
        for rate in (each["win_rate_vs_sft"], each["win_rate_vs_previous"]):
            assert rate["low"] <= rate["mean"] <= rate["high"]
            assert rate["wins"] + rate["ties"] + rate["losses"] == rate["n"]
        assert each["kl"] > 0 and each["kl_stderr"] > 0 and each["tokens"] > 0
    first = found["rounds"][0]
    assert first["win_rate_vs_sft"] == first["win_rate_vs_previous"]


def test_the_same_call_trains_nothing_again_and_says_the_same(here):
    before = {file: file.stat().st_mtime_ns for file in here.glob("*/model/*.safetensors")}
    told = (here / "rounds.json").read_text()
    run_rounds(load_recipe("quick"), judge=as_short_as_can_be)
    assert {file: file.stat().st_mtime_ns for file in here.glob("*/model/*.safetensors")} == before
    assert (here / "rounds.json").read_text() == told


def test_the_page_stands_beside_rounds_json_and_not_in_its_place(here):
    told = (here / "rounds.json").read_text()
    found = run_rounds(load_recipe("quick"), judge=as_short_as_can_be)
    for _ in range(2):
        page = write_page(found, here, here / "rounds.json")
        assert page == here / "rounds.html" and "rounds-2" in page.read_text()
        assert (here / "rounds.json").read_text() == told


@pytest.mark.slow
def test_rounds_can_be_held_to_the_sft_run(here):
    run_rounds(load_recipe("quick", ["rounds.reference=sft"]), judge=as_short_as_can_be, name="held")
    second = Run(here / "held-2").manifest
    assert second.parent.start == "runs/quick/held-1/model"
    assert second.reference == "the adapter in runs/quick/sft/model; DPO starts from runs/quick/held-1/model"
    assert weights_hash(here / "held-1" / "model") == weights_hash(here / "rounds-1" / "model")  # the first is the same
    first = next(row for row in Run(here / "held-2").metrics() if "eval/kl" in row)
    assert first["step"] == 0 and first["eval/kl"] > 0  # from SFT, which it has left


def test_a_share_of_the_recipes_own_pairs_is_mixed_in(here):
    """Of 30 pairs of the round a share of a quarter is 10 of 40."""
    _, pairs = prepare_data(load_recipe("quick"))
    form = rounds.Format("hh", prepare_data(load_recipe("quick"))[0])
    assert len(rounds._original(pairs, form, 30, 0.25, seed=0)) == 10
    assert rounds._original(pairs, form, 30, 0.0, seed=0) == []


# What stops it, and which is best


def a_round(k: int, rate, *guards: str) -> Round:
    rates = {"win_rate_vs_sft": rate, "win_rate_vs_previous": rate}
    return Round(k=k, run=f"rounds-{k}", **rates, kl=1.0 * k, kl_stderr=0.1, tokens=20, pairs=9, guards=guards)


def test_the_best_round_has_the_highest_win_rate_of_those_without_a_guard(here):
    done = [a_round(1, wins(6, 0, 4)), a_round(2, wins(7, 0, 3)), a_round(3, wins(10, 0, 0), "it only gets longer")]
    found = rounds._told(work(), done)
    assert found.best == "rounds-2" and found.stopped == "round 3 ends the rounds: it only gets longer"
    assert rounds._told(work(), done[2:]).best is None


def test_a_round_that_wins_by_length_alone_is_told(here):
    rate = wins(90, 0, 10)
    found = evaluation(rate, a="rounds-1", b="sft")
    unfair = next(iter(found.win_rates))
    unfair = type(unfair)(**{**vars(unfair), "length_controlled": Estimate(0.5, 0.1, 100, 0.3, 0.7)})
    said = rounds._guards(work(), found, "rounds-1", {"sft": unfair}, Estimate(1.0, 0.1))
    assert said == ["it beats sft by length alone: 90% as judged, and 50% (30% to 70%) at equal length"]


def test_a_round_far_from_sft_is_told(here):
    found = evaluation(wins(90, 0, 10), a="rounds-1", b="sft")
    said = rounds._guards(work("monitor.max_kl=5"), found, "rounds-1", {}, Estimate(6.0, 0.2))
    assert said == ["its KL from SFT is 6 ± 0.2, above monitor.max_kl 5"]


def test_a_round_whose_replies_get_worse_is_told(here):
    looks = {name: watch.look_at([[0]] * 9, said(tokens)) for name, tokens in (("sft", 20), ("rounds-1", 45))}
    found = evaluation(wins(90, 0, 10), a="rounds-1", b="sft", table=watch.watch_rows(looks, "sft"))
    told = rounds._guards(work(), found, "rounds-1", {}, Estimate(1.0, 0.2))
    assert told == ["replies got worse than SFT's: length 22 → 47 tokens"]


def said(tokens: int) -> list[Reply]:
    """Nine replies of two more tokens each on average, no 4-gram in them twice."""
    return [Reply(tuple(range(100 * i, 100 * i + tokens + i % 5)), "x", True) for i in range(9)]


def test_the_table_fits_a_terminal(here):
    found = rounds._told(work(), [a_round(k, wins(60, 10, 47), *["it only gets longer"] * (k == 3)) for k in (1, 2, 3)])
    assert all(len(line) <= 80 for line in render(found, Path("runs/quick/rounds.json")).splitlines())


# What cannot be


@pytest.mark.parametrize("words", ["model.start=a/b", "model.reference=base", "model.reference_folder=a/b"])
def test_rounds_begin_at_the_recipes_own_sft_run(here, words):
    with pytest.raises(RecipeError, match="rounds begin at the recipe's SFT run"):
        run_rounds(load_recipe("quick", [words]))


def test_a_round_is_not_trained_on_what_the_budget_left_half_judged(here):
    half = lambda contests: [Verdict(None, "not asked") for _ in contests[1:]] + [Verdict(1.0, "judged")]
    with pytest.raises(DataError, match=r"budget|not asked"):
        run_rounds(load_recipe("quick"), judge=half, name="poor")
    assert not Run(here / "poor-1").has_started


@pytest.mark.parametrize(
    "key", ["rounds.count=0", "rounds.samples=1", "rounds.mix_original=1", "rounds.reference=base"]
)
def test_a_setting_that_cannot_be_is_refused(here, key):
    with pytest.raises(RecipeError, match=key.partition("=")[0]):
        load_recipe("quick", [key])
