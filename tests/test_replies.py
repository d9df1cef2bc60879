"""Replies side by side: chosen by a rule, shortened, and harmless whatever is in them."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab import toy
from alignlab.disk import append_line
from alignlab.report import replies
from alignlab.report.replies import (
    PROMPT_CHARACTERS,
    REPLY_CHARACTERS,
    SHOWN,
    harmless,
    last_samples,
    shortened,
    side_by_side,
    turns,
)

GOOD = " Happy to help. To grow roses, keep the soil loose and pull the weeds. Shall I go on?"
BAD = " Look it up. Go away now."
RUN = {"name": "dpo", "stage": "dpo", "data_from": {"source": "toy"}, "samples_split": "test", "reference_name": "SFT"}


def row(prompt: str, reply: str, reference: str | None = BAD, kl: float = 0.5, **facts) -> dict:
    its = {"step": 10, "split": "test", "prompt": f"\n\nHuman: {prompt}\n\nAssistant:", "reply": reply, "tokens": 5}
    return {**its, "ended": True, "kl": kl, **({} if reference is None else {"reference_reply": reference}), **facts}


@given(st.text())
def test_harmless_text_holds_nothing_that_acts(text):
    shown = harmless(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\ufeff")
    assert shown.encode("utf-8").decode("utf-8") == shown == harmless(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\x00\x1b[31m", "⟨U+0000⟩⟨U+001B⟩[31m"),
        ("\ud800", "⟨U+D800⟩"),
        ("one\r\ntwo\tthree", "one\ntwo\tthree"),
        ("שלום 👩‍🚀", "שלום 👩‍🚀"),
    ],
)
def test_what_acts_is_written_out_and_what_shows_is_left(text, shown):
    assert harmless(text) == shown


def test_a_long_reply_is_shortened_and_says_by_how_much():
    assert shortened("x" * 1_000_900, 900) == "x" * 900 + " … [1,000,000 more characters in samples.jsonl]"


def test_of_a_long_prompt_the_end_is_shown():
    (_, said), *_ = turns("y" * 10_000 + "the question")
    assert said.endswith("the question") and said.startswith("[") and len(said) < PROMPT_CHARACTERS + 60


def test_a_transcript_is_shown_turn_by_turn():
    found = turns("\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: How?\n\nAssistant:")
    assert found == [("Human", "Hello"), ("Assistant", "Hi."), ("Human", "How?")]


def test_a_prompt_that_is_no_transcript_is_one_turn():
    assert turns("<|user|>\nWhy?\n<|assistant|>\n") == [("", "<|user|>\nWhy?\n<|assistant|>")]


def test_wins_and_losses_are_those_of_the_toys_rule():
    rows = [row("How do I grow roses?", GOOD), row("And roses?", BAD, GOOD), row("Roses again?", GOOD, GOOD)]
    shown = side_by_side([RUN], [rows])
    wins, losses, draw = shown["groups"]
    assert toy.score(rows[0]["prompt"], GOOD) > toy.score(rows[0]["prompt"], BAD)
    assert [case["turns"][-1][1] for case in wins["cases"]] == ["How do I grow roses?"]
    assert [case["turns"][-1][1] for case in losses["cases"]] == ["And roses?"]
    assert len(draw["cases"]) == 3
    assert "toy's rule" in shown["rule"] and "fixed seed" in shown["rule"]


def test_where_there_is_no_loss_it_says_so():
    _, losses, _ = side_by_side([RUN], [[row("How do I grow roses?", GOOD)]])["groups"]
    assert losses["cases"] == [] and losses["none"] == "no reply is worse than the reference's"


def test_without_a_judge_nothing_is_called_a_win():
    rows = [row(f"Question {i}?", "x", kl=float(i)) for i in range(10)]
    shown = side_by_side([{**RUN, "data_from": {"source": "hh-rlhf"}}], [rows])
    far, near, draw = shown["groups"]
    assert [case["turns"][-1][1] for case in far["cases"]] == ["Question 9?", "Question 8?", "Question 7?"]
    assert [case["turns"][-1][1] for case in near["cases"]] == ["Question 0?", "Question 1?", "Question 2?"]
    assert len(draw["cases"]) == SHOWN and "nobody judged" in shown["rule"]


def test_the_draw_is_random_and_always_the_same():
    rows = [row(f"Question {i}?", GOOD) for i in range(50)]
    draws = [side_by_side([RUN], [rows])["groups"][2]["cases"] for _ in range(2)]
    drawn = [case["turns"][0][1] for case in draws[0]]
    assert draws[0] == draws[1] and drawn != [f"Question {i}?" for i in range(SHOWN)]


def test_several_runs_answer_the_same_prompts():
    shared, own = row("Both?", GOOD), row("Only one?", GOOD)
    shown = side_by_side([RUN, {**RUN, "name": "other"}], [[shared, own], [row("Both?", BAD)]])
    cases = [case for group in shown["groups"] for case in group["cases"]]
    assert {case["turns"][-1][1] for case in cases} == {"Both?"}
    assert [reply["who"] for reply in cases[0]["replies"]] == ["SFT", "dpo", "other"]


def test_runs_without_a_shared_prompt_show_none():
    assert side_by_side([RUN, RUN], [[row("A?", GOOD)], [row("B?", GOOD)]])["groups"] == []


def test_the_last_sampling_is_found_from_the_end(tmp_path, monkeypatch):
    file = tmp_path / "samples.jsonl"
    for step, split in ((0, "validation"), (10, "validation"), (10, "test")):
        for i in range(3):
            append_line(file, row(f"Question {i}? " + "é" * 50, "x" * 90, step=step, split=split))
    monkeypatch.setattr(replies._backwards, "__defaults__", (64,))  # blocks that end inside lines and characters
    rows, split = last_samples(file)
    assert split == "test" and [r["prompt"][9:19] for r in rows] == ["Question 0", "Question 1", "Question 2"]


@pytest.mark.parametrize("tail", [b"", b'{"step": 10, "spl', b"nonsense\n", b'{"step": 1}\n'])
def test_a_damaged_end_of_the_samples_is_skipped(tmp_path, tail):
    file = tmp_path / "samples.jsonl"
    append_line(file, row("Why?", "x"))
    with file.open("ab") as stream:
        stream.write(tail)
    assert len(last_samples(file)[0]) == 1


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=20), st.integers(1, 50))
def test_backwards_is_the_file_reversed(tmp_path_factory, lines, block):
    file = tmp_path_factory.mktemp("lines") / "file"
    file.write_bytes(b"\n".join(lines))
    assert [line for line in replies._backwards(file, block) if line] == [line for line in reversed(lines) if line]


def test_cases_of_alignlab_eval_are_taken_as_they_are():
    case = {
        "kind": "win",
        "prompt": "\n\nHuman: Why?\n\nAssistant:",
        "replies": {"sft": "a", "dpo": "b" * 5000},
        "outcome": "dpo wins",
    }
    shown = replies.judged_cases({"judge": "llm:m", "cases": [case]})
    wins, losses, draw = shown["groups"]
    assert wins["cases"][0]["outcome"] == "dpo wins" and losses["cases"] == draw["cases"] == []
    assert len(wins["cases"][0]["replies"][1]["text"]) < REPLY_CHARACTERS + 60
    assert replies.judged_cases(json.loads('{"judge": null, "cases": []}')) is None
