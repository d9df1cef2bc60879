"""Replies side by side: all in one table, a few chosen by a rule, shortened, and harmless whatever is in them."""

from __future__ import annotations

import unicodedata

import pytest
from built import evaluation, run_facts, wins
from hypothesis import given
from hypothesis import strategies as st

from alignlab.disk import append_line, write_lines
from alignlab.reports.replies import (
    PROMPT_CHARACTERS,
    REPLY_CHARACTERS,
    SHOWN,
    Case,
    judged_replies,
    sampled_replies,
    shortened,
)
from alignlab.runs.evaluation import REPLIES
from alignlab.runs.logs import last_samples
from alignlab.text.safe import harmless

GOOD, BAD = " Happy to help. Keep the soil loose.", " Look it up. Go away now."


def row(prompt: str, reply: str, reference: str | None = BAD, kl: float = 0.5, **facts) -> dict:
    its = {"step": 10, "split": "test", "prompt": f"\n\nHuman: {prompt}\n\nAssistant:", "reply": reply, "tokens": 5}
    return {**its, "ended": True, "kl": kl, **({} if reference is None else {"reference_reply": reference}), **facts}


def questions(case: Case) -> str:
    return case.turns[-1][1]


@given(st.text())
def test_harmless_text_holds_nothing_that_acts(text):
    shown = harmless(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u2028\u2029\ufeff")
    assert shown.encode() is not None


@pytest.mark.parametrize("text", ["👩‍👩‍👧 family", "नमस्ते क्‍ष", "שלום", "a\tb\nc", "ﬁ ½ ①"])
def test_scripts_and_emoji_stay_as_they_are(text):
    assert harmless(text) == text


@given(st.text(), st.integers(1, 50), st.booleans())
def test_shortened_text_says_how_much_is_missing(text, most, keep_end):
    shown = shortened(text, most, keep_end)
    assert (shown == harmless(text)) == (len(text) <= most) or "more characters" in text
    if len(text) > most:
        assert f"{len(text) - most:,} more characters" in shown


def test_a_long_prompt_keeps_its_end():
    turns = Case("\n\nHuman: " + "x" * 5000 + " and at last?\n\nAssistant:", []).turns
    assert turns[-1][1].endswith("and at last?") and sum(len(text) for _, text in turns) < PROMPT_CHARACTERS + 60


def test_a_prompt_that_is_no_transcript_is_one_turn():
    assert Case("<|user|>Hi", []).turns == [("", "<|user|>Hi")]


# --- as sampled in training ---


def test_nothing_is_called_a_win_where_nobody_judged():
    samples = [row(f"Question {i}?", "x", kl=float(i)) for i in range(10)]
    found = sampled_replies([run_facts(samples=samples)])
    far, near, draw = found.picked
    assert [questions(case) for case in far.cases] == ["Question 9?", "Question 8?", "Question 7?"]
    assert [questions(case) for case in near.cases] == ["Question 0?", "Question 1?", "Question 2?"]
    assert len(draw.cases) == SHOWN and "nobody judged" in found.rule
    assert len(found.cases) == 10 and {case.outcome for case in found.cases} == {""}


def test_the_draw_is_random_and_always_the_same():
    runs = [run_facts(samples=[row(f"Question {i}?", GOOD) for i in range(50)])]
    draws = [sampled_replies(runs).picked[-1].cases for _ in range(2)]
    assert draws[0] == draws[1] and [questions(case) for case in draws[0]] != [f"Question {i}?" for i in range(SHOWN)]


def test_several_runs_answer_the_same_prompts():
    one = run_facts(name="dpo", samples=[row("Both?", GOOD), row("Only one?", GOOD)])
    found = sampled_replies([one, run_facts(name="other", samples=[row("Both?", BAD)])])
    (case,) = found.cases
    assert questions(case) == "Both?" and [reply.who for reply in case.replies] == ["SFT", "dpo", "other"]


def test_runs_without_a_shared_prompt_show_none():
    runs = [run_facts(samples=[row("A?", GOOD)]), run_facts(samples=[row("B?", GOOD)])]
    assert sampled_replies(runs).cases == ()
    assert sampled_replies([run_facts()]).rule == "No replies were sampled"


# --- as judged ---


def judged_rows(outcomes: list[float]) -> list[dict]:
    """What `alignlab eval` writes: a row a reply, for SFT and DPO."""
    rows = []
    for number, outcome in enumerate(outcomes):
        its = {"prompts": "held-out", "number": number, "prompt": f"\n\nHuman: Q{number}?\n\nAssistant:"}
        for model, other, score in (("sft", "dpo", 2.0), ("dpo", "sft", 2.0 + (outcome - 0.5) * (number + 1))):
            against = {other: outcome if model == "dpo" else 1 - outcome}
            reply = {"model": model, "reply": f"{model} says {number}", "tokens": 3, "ended": number != 1}
            rows.append({**its, **reply, "scores": {"rule": score}, "outcomes": against})
    return rows


def test_every_judged_reply_is_there_and_the_largest_wins_come_first(tmp_path):
    write_lines(tmp_path / REPLIES, judged_rows([1, 0, 0.5, 1, 1, 1, 0]))
    found = judged_replies(tmp_path, evaluation(wins(4, 1, 2)))
    assert (found.count("win"), found.count("tie"), found.count("loss"), len(found.cases)) == (4, 1, 2, 7)
    won, lost, draw = found.picked
    assert [questions(case) for case in won.cases] == ["Q5?", "Q4?", "Q3?"] and won.title == "Largest wins, 3 of 4"
    assert [questions(case) for case in lost.cases] == ["Q6?", "Q1?"] and len(draw.cases) == SHOWN
    assert [reply.who for reply in found.cases[0].replies] == ["sft", "dpo"]
    assert found.cases[1].replies[1].facts == "rule 1, 3 tokens, cut at the limit"


def test_replies_that_nobody_judged_are_shown_without_outcomes(tmp_path):
    rows = [{**its, "scores": None, "outcomes": {}} for its in judged_rows([1, 0])]
    write_lines(tmp_path / REPLIES, rows)
    found = judged_replies(tmp_path, evaluation(wins(1, 0, 1), judge=None))
    assert {case.outcome for case in found.cases} == {""} and "nobody judged" in found.rule


@pytest.mark.parametrize("content", [None, b"", b"nonsense\n", b"[1]\n\xff\n"])
def test_a_broken_file_of_replies_is_as_none(tmp_path, content):
    if content is not None:
        (tmp_path / REPLIES).write_bytes(content)
    assert judged_replies(tmp_path, evaluation(wins(1, 0, 0))) is None


def test_a_long_reply_is_shortened(tmp_path):
    rows = judged_rows([1.0])
    write_lines(tmp_path / REPLIES, [{**its, "reply": "b" * 5000} for its in rows])
    (case,) = judged_replies(tmp_path, evaluation(wins(1, 0, 0))).cases
    assert len(case.replies[1].text) < REPLY_CHARACTERS + 60


# --- the file of samples ---


def test_the_last_sampling_is_found_from_the_end(tmp_path):
    file = tmp_path / "samples.jsonl"
    for step, split in ((0, "validation"), (10, "validation"), (10, "test")):
        for i in range(3):
            append_line(file, row(f"Question {i}? " + "é" * 50, "x" * 90, step=step, split=split))
    rows = last_samples(file)
    assert rows[0]["split"] == "test"
    assert [its["prompt"][9:19] for its in rows] == ["Question 0", "Question 1", "Question 2"]


@pytest.mark.parametrize("tail", [b"", b'{"step": 10, "spl', b"nonsense\n", b'{"step": 1}\n', b"\xff\xfe\n"])
def test_a_damaged_end_of_the_samples_is_skipped(tmp_path, tail):
    file = tmp_path / "samples.jsonl"
    append_line(file, row("Why?", "x"))
    with file.open("ab") as stream:
        stream.write(tail)
    assert len(last_samples(file)) == 1


def test_no_samples_are_no_rows(tmp_path):
    assert last_samples(tmp_path / "samples.jsonl") == []
