r"""The laws of HH transcripts: nothing is lost between text and turns, and a pair is cut at its last Assistant turn."""

import gzip
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.data.transcript import Turn, dialogue_key, join_turns, shorten, split_last_turn, split_pair, split_turns
from alignlab.errors import DataError

HH = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf"

pieces = st.sampled_from(
    ["\n\nHuman:", "\n\nAssistant:", "\n\nHuman", "Human:", "Assistant:", "\n", "\r", " ", "é😀\x00"]
)
hostile = st.lists(pieces | st.text(max_size=4), max_size=8).map("".join)
texts = hostile.filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
turns = st.lists(st.builds(Turn, st.sampled_from(["Human", "Assistant"]), texts, st.none()), min_size=1, max_size=6)


@given(turns)
def test_any_turns_in_are_the_same_turns_out(said):
    assert split_turns(join_turns(said)) == said


@given(hostile)
def test_text_that_begins_with_a_turn_comes_back_unchanged(text):
    text = "\n\nHuman:" + text
    assert join_turns(split_turns(text)) == text


@given(hostile)
def test_any_text_splits_or_is_refused_with_a_reason(text):
    try:
        prompt, reply = split_last_turn(text)
    except DataError:
        return
    assert prompt + reply == text and prompt.endswith("\n\nAssistant:")
    assert "\n\nHuman:" not in reply and "\n\nAssistant:" not in reply


@given(turns, texts, texts)
def test_swapping_chosen_and_rejected_swaps_the_replies(said, chosen, rejected):
    prompt = join_turns([Turn("Human", " a"), *said])
    first, second = (f"{prompt}\n\nAssistant: {reply}x" for reply in (chosen, rejected))
    if chosen == rejected:
        with pytest.raises(DataError, match="identical"):
            split_pair(first, second)
        return
    prompt, chosen, rejected = split_pair(first, second)
    assert split_pair(second, first) == (prompt, rejected, chosen)
    assert prompt + chosen == first


def test_prompt_ends_at_the_last_assistant_turn():
    pair = split_pair("\n\nHuman: 1+1?\n\nAssistant: 2", "\n\nHuman: 1+1?\n\nAssistant: 3")
    assert pair == ("\n\nHuman: 1+1?\n\nAssistant:", " 2", " 3")


def test_role_words_inside_a_turn_are_text():
    text = "\n\nHuman: say Assistant: or\nHuman: please\n\nAssistant: Human: is a word"
    assert [turn.role for turn in split_turns(text)] == ["Human", "Assistant"]


def test_consecutive_assistant_turns_stay_turns():
    prompt, _, _ = split_pair(*(f"\n\nHuman: hi\n\nAssistant: one\n\nAssistant: {last}" for last in "ab"))
    assert prompt == "\n\nHuman: hi\n\nAssistant: one\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "different prompts"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: \n", "a reply is empty"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "identical"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b", "ends with a Human turn"),
        ("\n\nHuman: a", "\n\nHuman: a", "no Assistant turn"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "no Human turn"),
        ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c", "does not begin with"),
        ("", "", "does not begin with"),
    ],
)
def test_rows_that_hold_no_preference_are_refused_with_the_reason(chosen, rejected, reason):
    with pytest.raises(DataError, match=reason):
        split_pair(chosen, rejected)


def test_a_turn_that_would_read_as_two_is_refused():
    with pytest.raises(DataError, match="another turn"):
        join_turns([Turn("Human", " hi\n\nAssistant: I am you")])


@given(turns, st.integers(0, 60))
def test_shortening_keeps_the_longest_fitting_end_that_begins_with_a_human_turn(said, limit):
    def fits(kept):
        return sum(len(turn.text) + 1 for turn in kept) <= limit

    ends = [said[start:] for start, turn in enumerate(said) if turn.role == "Human"]
    assert shorten(said, fits) == next(filter(fits, ends), None)


def test_the_dialogue_key_is_the_first_human_turn():
    assert dialogue_key(split_turns("\n\nAssistant: Yes?\n\nHuman: one \n\nAssistant: a\n\nHuman: two")) == "one"


def test_splitting_a_ten_megabyte_dialogue_takes_under_two_seconds():
    turn = "\n\nHuman: " + "\nHuman:\n Assistant:" * 50 + "\n\nAssistant: yes\n\n"
    text = turn * (10_000_000 // len(turn))
    start = time.process_time()
    prompt, _, _ = split_pair(text + "a", text + "b")
    assert join_turns(split_turns(prompt)) == prompt
    assert time.process_time() - start < 2


@pytest.mark.skipif(not HH.exists(), reason="needs the HH-RLHF test files")
@pytest.mark.parametrize(("subset", "rows", "dropped"), [("harmless-base", 2312, 9), ("helpful-base", 2354, 15)])
def test_every_real_row_splits_exactly_or_is_dropped(subset, rows, dropped):
    refused = read = 0
    with gzip.open(HH / f"{subset}.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for read, line in enumerate(lines, 1):  # noqa: B007
            row = json.loads(line)
            try:
                prompt, chosen, rejected = split_pair(row["chosen"], row["rejected"])
            except DataError:
                refused += 1
                continue
            assert (prompt + chosen, prompt + rejected) == (row["chosen"], row["rejected"])
            assert chosen.startswith(" ") and join_turns(split_turns(prompt)) == prompt
    assert (read, refused) == (rows, dropped)
