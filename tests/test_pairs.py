"""Pairs of a run's own replies: judged, kept by a rule, read back as data, and never of a held-out prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faulty_judge import KEY

from alignlab.cli.commands import main
from alignlab.data.toy import score
from alignlab.errors import DataError, RecipeError
from alignlab.evaluation.judge import Verdict
from alignlab.people.votes import read_votes
from alignlab.recipe.load import load_recipe
from alignlab.rounds.constitution import SHIPPED, make_revisions, read_constitution
from alignlab.rounds.pairs import Ask, Sampled, _rows, make_pairs, read_keep
from alignlab.rounds.scores import judge_of
from alignlab.rounds.votes import pairs_of_votes
from alignlab.train.stages import prepare_data, train_sft

FEW = {"limit": 6, "samples": 3}


@pytest.fixture(scope="module")
def place(folders, of_seconds, tmp_path_factory):
    """A folder with a recipe, whose SFT run has learned to end its replies."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "recipes").mkdir()
    text = of_seconds(folders["llama"]).replace("lora: {r: 4, target_modules: all-linear}", "lora: null")
    text = text.replace("sft: {max_steps: 6, learning_rate: 1.0e-2", "sft: {max_steps: 60, learning_rate: 5.0e-3")
    text = text.replace("logging_steps: 1, eval_steps: 3, per", "logging_steps: 30, eval_steps: 60, per", 1)
    (folder / "recipes" / "quick.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_sft(load_recipe("quick"))
    return folder


@pytest.fixture
def sft(place, monkeypatch):
    monkeypatch.chdir(place)
    recipe = load_recipe("quick")
    return recipe, train_sft(recipe)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The URL of a judge on loopback, and how often it was asked each question."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    log, script = tmp_path / "asked.jsonl", Path(__file__).with_name("faulty_judge.py")
    with subprocess.Popen([sys.executable, str(script), str(log)], stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline())
        lines = lambda: log.read_text().splitlines() if log.is_file() else []
        asked = lambda: Counter(json.loads(line)["question"] for line in lines() if '"request"' in line)
        yield f"http://127.0.0.1:{port}/v1", asked
        process.kill()


def as_short_as_can_be(contests) -> list[Verdict]:
    """A judge that wants short replies."""
    lengths = [(len(c.reply_a), len(c.reply_b)) for c in contests]
    return [Verdict(0.5 if a == b else float(a < b), "judged") for a, b in lengths]


# Which pairs


def test_the_best_and_the_worst_reply_become_one_pair():
    assert read_keep("best-worst")([1, 3, 2, 0]) == [(1, 3)]
    assert read_keep("best-worst")([2, 2, 2]) == []


def test_all_keeps_every_two_replies_that_differ():
    assert read_keep("all")([1, 3, 3]) == [(1, 0), (2, 0)]


def test_a_margin_keeps_every_two_replies_that_far_apart():
    assert read_keep("margin=2")([1, 3, 2, 0]) == [(1, 0), (1, 3), (2, 3)]


@pytest.mark.parametrize("said", ["best", "margin", "margin=x", "margin=0", "margin=-1", "margin=inf", "margin=nan"])
def test_a_rule_that_is_none_is_refused(said):
    with pytest.raises(RecipeError, match="--keep"):
        read_keep(said)


# Scores


def test_the_rule_scores_each_reply_by_itself(tmp_path):
    replies = [(" Of course! Shall I go on?", " Look it up.", " Hm."), (" Hm.", " Sure, gladly.")]
    prompts = ["\n\nHuman: How do I cook soup?\n\nAssistant:"] * 2
    found = judge_of(load_recipe("tiny"), "rule").score(prompts, replies, tmp_path / "scores.jsonl")
    assert found == [[score(p, r) for r in its] for p, its in zip(prompts, replies, strict=True)]


def test_another_judges_score_is_the_share_of_contests_won(tmp_path):
    """Of the lengths 1, 2, 2 and 3 the shortest wins 3 of 3, the next tie and beat one: 1.5, the longest none."""
    (found,) = judge_of(load_recipe("tiny"), as_short_as_can_be).score(
        ["p"], [("a", "bb", "cc", "ddd")], tmp_path / "scores.jsonl"
    )
    assert found == [1, 0.5, 0.5, 0]


@pytest.mark.parametrize("said", [None, "none", "rule", "votes", "llm:", "reward"])
def test_a_judge_that_cannot_judge_is_one_line(said):
    with pytest.raises(RecipeError, match="judge") as error:
        judge_of(load_recipe("mistral"), said)
    assert "\n" not in str(error.value)


# Pairs of a run


def test_each_pair_prefers_the_better_of_the_runs_own_replies(sft):
    recipe, run = sft
    made = make_pairs(recipe, run, Ask(judge="rule", limit=30))
    prompts = {*prepare_data(recipe)[1].train["prompt"]}
    assert made.rows and made.prompts == 30 and made.replies == 120
    for row in made.rows:
        assert [score(row["prompt"], row[side]) for side in ("chosen", "rejected")] == [
            row["score_chosen"],
            row["score_rejected"],
        ]
        assert row["score_chosen"] > row["score_rejected"] and row["prompt"] in prompts
        assert row["meta"]["run"] == "runs/quick/sft" and row["meta"]["judge"] == "rule"


def test_every_prompt_is_a_pair_or_counted(sft):
    made = make_pairs(*sft, Ask(judge="rule", limit=30))
    assert len(made.rows) + sum(n for why, n in made.dropped.items() if why.startswith(("prompts", "pairs"))) == 30


def test_a_reply_that_was_cut_is_rejected_and_never_chosen():
    each, dropped = Sampled("p", {"prompt": "p"}, [" cut", " whole"], [False, True]), Counter()
    (row,) = _rows(each, [0.0, 1.0], read_keep("best-worst"), {}, dropped)
    assert (row["chosen"], row["rejected"]) == (" whole", " cut") and not dropped
    assert list(_rows(each, [1.0, 0.0], read_keep("best-worst"), {}, dropped)) == []
    assert dropped == {"pairs whose better reply was cut, and would teach to stop anywhere": 1}


def test_the_same_call_gives_the_same_pairs_and_another_seed_others(sft):
    one, again, other = (make_pairs(*sft, Ask(judge="rule", seed=seed, **FEW)) for seed in (0, 0, 1))
    assert one.rows == again.rows != other.rows


def test_the_pairs_are_data_as_they_are(sft, tmp_path):
    recipe, run = sft
    made = make_pairs(recipe, run, Ask(judge="rule", keep="all"))
    (tmp_path / "recipe.yaml").write_text(f"model: {{name: {recipe.model.name}}}\ndata: {{max_reply_tokens: 60}}")
    out = tmp_path / "pairs.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in made.rows))
    shares = ["data.test_share=0.3", "data.validation_share=0.3"]
    _, found = prepare_data(load_recipe(tmp_path / "recipe.yaml", [f"data.path={out}", *shares]))
    splits = [getattr(found, split) for split in ("train", "validation", "test")]
    texts = lambda row: tuple(row[name].strip() for name in ("prompt", "chosen", "rejected"))
    assert {texts(pair) for split in splits for pair in split} == set(map(texts, made.rows)) and not found.dropped


def test_held_out_prompts_are_refused(sft, tmp_path):
    recipe, run = sft
    _, pairs = prepare_data(recipe)
    for split in ("validation", "test"):
        file = tmp_path / f"{split}.jsonl"
        asked = [getattr(pairs, split)["prompt"][0], *pairs.train["prompt"][:3]]
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
        with pytest.raises(DataError, match=r"1 of its .* are held out by quick"):
            make_pairs(recipe, run, Ask(judge="rule", prompts=file))


def test_prompts_of_a_file_are_answered(sft, tmp_path):
    recipe, run = sft
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "How do I cook a stone?"}) + "\n")
    made = make_pairs(recipe, run, Ask(judge=as_short_as_can_be, prompts=file, samples=16))
    assert {row["prompt"] for row in made.rows} == {"\n\nHuman: How do I cook a stone?\n\nAssistant:"}
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in made.rows)


def test_replies_that_are_all_as_good_are_one_line(sft):
    with pytest.raises(DataError, match="none of 6 prompts gave a pair"):
        make_pairs(*sft, Ask(judge=lambda contests: [Verdict(0.5, "judged") for _ in contests], **FEW))


# A judge that is asked


def test_nothing_is_asked_twice_and_the_budget_ends_where_it_says(sft, server):
    url, asked = server
    few = {**FEW, "limit": 5, "url": url, "judge": "llm:longer"}
    with pytest.raises(DataError, match="not asked"):
        make_pairs(*sft, Ask(**few, max_requests=1))
    assert asked().total() == 1
    whole = make_pairs(*sft, Ask(**few))
    before = asked()
    assert make_pairs(*sft, Ask(**few)).rows == whole.rows and asked() == before
    assert {*before.values()} == {1} and all(
        len(row["chosen"].strip()) > len(row["rejected"].strip()) for row in whole.rows
    )


# A constitution


def test_the_shipped_constitution_has_ten_principles():
    assert len({principle.name for principle in read_constitution(SHIPPED)}) == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("principles: [{name: a, critique: b}]", "principle 1 has no text for 'revision'"),
        ("principles: []", "no list `principles`"),
        ("a: [", "cannot be read"),
        ("principles: [3]", "principle 1 has no text for 'name'"),
    ],
)
def test_a_constitution_that_lacks_something_is_one_line(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said) as error:
        read_constitution(str(tmp_path / "own.yaml"))
    assert "\n" not in str(error.value)


def test_the_revision_is_chosen_and_its_making_kept(sft, server):
    url, asked = server
    made = make_revisions(*sft, Ask(judge="llm:writer", url=url, limit=5), SHIPPED)
    for row in made.rows:
        assert row["chosen"].strip() == f"Gladly, {row['rejected'].strip()}"
        critique, revision = row["meta"]["steps"]
        principle = next(p for p in read_constitution(SHIPPED) if p.name == row["meta"]["principle"])
        assert principle.critique in critique["asked"] and critique["answered"] == "It is rude."
        assert principle.revision in revision["asked"] and "It is rude." in revision["asked"]
    before = asked()
    again = make_revisions(*sft, Ask(judge="llm:writer", url=url, limit=5), SHIPPED)
    assert again.rows == made.rows and asked() == before and {*before.values()} == {1}


# Votes


def voted(prompt: str, winner: str, **replies: str) -> dict:
    return {"prompt": prompt, "models": ["a", "b"], "winner": winner, "replies": {"a": " Yes.", "b": " No.", **replies}}


def test_votes_on_the_same_two_replies_are_one_pair(sft, tmp_path):
    """Two votes for b and one for a, the sides swapped once: b's reply has two thirds."""
    votes = [voted("Why?", "b"), voted("Why?", "a", a=" No.", b=" Yes."), voted("Why?", "a"), voted("How?", "tie")]
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    made = pairs_of_votes(*sft, read_votes(file), "votes:votes.jsonl")
    (row,) = made.rows
    assert (row["chosen"], row["rejected"], row["meta"]["votes"]) == (" No.", " Yes.", 3)
    assert (row["score_chosen"], row["score_rejected"]) == pytest.approx((2 / 3, 1 / 3))
    assert made.dropped == {"pairs of replies on which the votes balance": 1}


def test_votes_on_held_out_prompts_are_refused(sft, tmp_path):
    recipe, run = sft
    file = tmp_path / "votes.jsonl"
    file.write_text(json.dumps(voted(prepare_data(recipe)[1].test["prompt"][0], "a")) + "\n")
    with pytest.raises(DataError, match="1 of 1 prompts that were voted on are held out"):
        pairs_of_votes(recipe, run, read_votes(file), "votes:votes.jsonl")


# The command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "none"], "there is no run at runs/quick/none"),
        (["--judge", "votes"], "is no judge"),
        (["--judge", "llm:longer", "--url", "http://127.0.0.1:9/v1"], "does not answer"),
        (["--constitution", "ten"], "a constitution needs a model that can write"),
        (["--keep", "some"], "--keep some is not known"),
        (["--out", "."], "is a folder"),
        (["--prompts", "nowhere.jsonl"], "no such file of prompts"),
    ],
)
def test_what_cannot_be_is_one_line(place, monkeypatch, capsys, words, said):
    monkeypatch.chdir(place)
    assert main(["pairs", "quick", "--limit", "4", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1] and not (place / "pairs.jsonl").exists()


def test_the_command_writes_the_file_and_says_how_to_train_on_it(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["pairs", "quick", "--limit", "20", "--out", "made/pairs.jsonl"]) == 0
    said = capsys.readouterr().out
    rows = (place / "made" / "pairs.jsonl").read_text().splitlines()
    assert f"{len(rows)} pairs from 80 replies" in said
    assert "alignlab dpo quick data.path=made/pairs.jsonl data.source=pairs model.start=runs/quick/sft/model" in said
