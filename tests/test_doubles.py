"""What is doubled or contradicts itself in preference data, counted by hand and against plain loops."""

import gzip
import json
import re
from functools import partial
from itertools import product
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.format import Dialogue, Format
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.prompts import as_transcript
from alignlab.data.splits import SPLITS
from alignlab.data.transcript import Turn
from alignlab.doctor.doubles import QUOTED, double_findings, human_turns, letters, quote
from alignlab.recipe.load import DataSection
from alignlab.text.safe import UNSAFE

HOSTILE = ("\x00\x1b[31m\r\n", "\u202eevil\u200f", "你好，世界。" * 20, "a" * 10**6, "🙂", "e\u0301", "")


def asking(*turns):
    """The transcript of a dialogue, Human first."""
    roles = ("Human", "Assistant")
    return "".join(f"\n\n{roles[i % 2]}: {turn}" for i, turn in enumerate(turns)) + "\n\nAssistant:"


def prepared_of(rows):
    """Prepared pairs of (prompt, chosen, rejected) or (prompt, chosen, rejected, split), as they stand."""
    full = [row if len(row) == 4 else (*row, "train") for row in rows]
    tables = {}
    for split in SPLITS:
        columns = [[row[i] for row in full if row[3] == split] for i in range(3)]
        tables[split] = datasets.Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))
    none = {"rows": len(full), "dropped": {}, "repaired": {}, "parts": [], "files": [], "dialogues": {}}
    kept = {split: len(table) for split, table in tables.items()}
    return Prepared(**tables, **none, not_read={}, kept=kept, dropped_rows=Path(), fingerprint="", folder=Path())


def found_in(rows, transcript=str):
    return {finding.name: finding for finding in double_findings(prepared_of(rows), transcript)}


def counts(rows):
    return {name: finding.count for name, finding in found_in(rows).items() if finding.count}


P = asking("How are you?")


# Texts


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("You're welcome.", "youre  WELCOME"),
        ("“Straße”", "STRASSE!"),
        ("\u202eabc\u200f\x00", "a b\tc"),
        ("é", "e\u0301"),
        ("你好，世界。", "你好 世界"),
    ],
)
def test_case_spaces_and_punctuation_do_not_count(text, same):
    assert letters(text) == letters(same) != ""


@pytest.mark.parametrize(("one", "other"), [("कि", "की"), ("👍", "👎"), ("...", "!"), ("1+1", "11"), ("x²", "x2")])
def test_what_is_said_counts(one, other):
    assert letters(one) != letters(other)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300))
def test_a_quoted_text_is_one_short_line_of_what_can_be_printed(text):
    quoted = quote(text)
    assert not UNSAFE.search(quoted) and "\n" not in quoted and len(quoted) <= 10 * QUOTED + 2
    assert quote("a" * 200) == '"' + "a" * 99 + '…"' and quote("a\n\u202eb") == '"a ⟨U+202E⟩b"'


def test_what_is_no_transcript_is_one_turn():
    assert human_turns("Summarize this") == ["Summarize this"]
    assert human_turns(asking("Hi", "Hello", "And?")) == [" Hi", " And?"]


# Pairs


def test_all_that_is_looked_for_is_said_where_nothing_is_found():
    findings = double_findings(prepared_of([(P, " Fine", " Bad"), (asking("What?"), " Fine", " Bad")]))
    assert [finding.count for finding in findings] == [0] * 7
    assert all(finding.says.endswith(".") and finding.advice and not finding.shown for finding in findings)


def test_no_pairs_at_all_are_no_findings():
    assert counts([]) == {}


def test_a_repeated_pair_counts_each_time_after_the_first():
    found = found_in([(P, " a", " b"), (P, " a", " b"), (asking("how are YOU"), " A.", " b"), (P, " a", " c")])
    assert found["repeated-pairs"].count == 2 and "1 of them letter for letter" in found["repeated-pairs"].says
    assert [one[:2] for one in found["repeated-pairs"].shown] == [("train", 1), ("train", 2)]
    assert "repeats train pair 0" in found["repeated-pairs"].shown[1].what


def test_replies_that_differ_in_punctuation_only_are_like_and_nothing_else():
    assert counts([(P, " You're welcome!", " You’re welcome.")]) == {"like-replies": 1}


def test_a_pair_in_both_orders_counts_twice_and_contradicts_itself():
    found = found_in([(P, " a", " b"), (P, " b", " a"), (asking("x"), " b", " a")])
    assert {name: one.count for name, one in found.items() if one.count} == {"both-orders": 2, "contradictions": 2}
    assert [one[:2] for one in found["both-orders"].shown] == [("train", 1)]


def test_a_circle_of_three_is_a_contradiction_and_a_ranking_is_none():
    """A > B, B > C, C > A cannot all hold; A > B, B > C, A > C can, and B is both chosen and rejected."""
    assert counts([(P, " a", " b"), (P, " b", " c"), (P, " a", " c")]) == {"chosen-and-rejected": 1}
    found = found_in([(P, " a", " b"), (P, " b", " c"), (P, " c", " a"), (P, " a", " d")])
    assert {name: one.count for name, one in found.items() if one.count} == {
        "contradictions": 3,
        "chosen-and-rejected": 1,
    }
    assert found["contradictions"].shown[0].what == (
        'train pair 1, train pair 2 lead from what is rejected here back to what is chosen: "a"'
    )


def test_a_pair_that_stands_often_still_contradicts_itself():
    assert counts([(P, " a", " b")] * 256 + [(P, " b", " a")] * 256)["contradictions"] == 512


def test_one_of_each_circle_is_shown():
    rows = [(asking(str(n)), *pair) for n in range(5) for pair in ((" a", " b"), (" b", " c"), (" c", " a"))]
    found = found_in(rows)["contradictions"]
    assert found.count == 15 and [one.number for one in found.shown] == [0, 3, 6]
    assert "at 5 prompts" in found.says


REPLIES = st.sampled_from([" a", " A!", " b", " c", " d"])
PAIRS = st.lists(st.tuples(st.sampled_from([asking("x"), asking("X?"), asking("y")]), REPLIES, REPLIES), max_size=12)


@given(PAIRS)
@settings(deadline=None)
def test_counts_are_those_of_plain_loops(rows):
    plain = [tuple(letters(text) for text in row) for row in rows]
    edges = {row for row in plain if row[1] != row[2]}
    reach = {(prompt, a, b) for prompt, a, b in edges}
    while more := {(p, a, d) for (p, a, b), (q, c, d) in product(reach, reach) if p == q and b == c} - reach:
        reach |= more
    circles = [row for row in plain if row in edges and (row[0], row[2], row[1]) in reach]
    rejected = {(p, b) for p, a, b in edges}
    chosen = [row for row in plain if row in edges and row[:2] in rejected and row not in circles]
    found = found_in(rows)
    assert found["repeated-pairs"].count == len(plain) - len(set(plain))
    assert f", {len(rows) - len(set(rows))} of them letter for letter" in found["repeated-pairs"].says
    assert found["like-replies"].count == sum(row[1] == row[2] for row in plain)
    assert found["both-orders"].count == sum((p, b, a) in edges for p, a, b in plain)
    assert found["contradictions"].count == len(circles)
    assert found["chosen-and-rejected"].count == len(chosen)


# Splits


def test_a_held_out_prompt_that_training_has_is_an_overlap():
    rows = [(P, " a", " b"), (asking("how are you"), " c", " d", "test"), (asking("Why?"), " c", " d", "validation")]
    found = found_in(rows)
    assert {name: one.count for name, one in found.items() if one.count} == {"overlap": 1}
    assert found["overlap"].of == 2 and found["overlap"].level == "wrong"
    assert found["overlap"].shown[0] == ("test", 0, 'beside train pair 0: "Human: how are you Assistant:"')


def test_a_dialogue_at_another_depth_is_an_overlap_of_dialogues():
    deeper = asking("How are you?", "Fine", "Why?")
    assert counts([(P, " a", " b"), (deeper, " a", " b", "test")]) == {"dialogue-overlap": 1}
    assert counts([(P, " a", " b"), (deeper, " a", " b")]) == {}


def test_validation_and_test_may_share_a_prompt():
    assert counts([(P, " a", " b", "validation"), (P, " c", " d", "test")]) == {}


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat"])
def test_the_turns_of_other_formats_are_read(name, tokenizer):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    form = Format(name, tokenizer, template if name == "chat" else None)
    short, long = [Turn("Human", " Hi")], [Turn("Human", " Hi"), Turn("Assistant", " Yes?"), Turn("Human", " Why?")]
    prompts = [form.prompt(Dialogue(turns)) for turns in ([short, long] if name != "plain" else [short, short])]
    found = found_in([(prompts[0], "a", "b"), (prompts[1], "a", "b", "test")], partial(as_transcript, form))
    assert found["overlap" if name == "plain" else "dialogue-overlap"].count == 1


def test_hostile_text_is_shown_on_one_line():
    rows = [(asking(text), f" {text}a", f" {text} A") for text in HOSTILE] * 2
    for finding in found_in([*rows, *((*row, "test") for row in rows)]).values():
        assert all(one.what.isprintable() and len(one.what) < 600 for one in finding.shown)
    assert found_in(rows)["repeated-pairs"].count == len(HOSTILE)


# Real data


@pytest.mark.parametrize("subset", ["harmless-base", "helpful-base"])
def test_what_real_rows_hold_is_what_a_loop_over_the_file_finds(subset, shared, tokenizer):
    file = shared / "data" / "hh-rlhf" / f"{subset}.test.jsonl.gz"
    section = DataSection(path=str(file), max_prompt_tokens=10**6, max_reply_tokens=10**6)
    prepared = prepare(section, tokenizer)
    found = {finding.name: finding for finding in double_findings(prepared)}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [(row["chosen"], row["rejected"]) for row in map(json.loads, lines)]
    plain = [tuple(re.sub(r"[^a-z0-9]", "", text.lower()) for text in row) for row in rows]
    alike = sum(row[0] == row[1] and "\n\nAssistant:" in rows[n][0] for n, row in enumerate(plain))
    dropped = sum(one == other for one, other in rows)
    assert found["like-replies"].count == alike - dropped > 0
    assert found["repeated-pairs"].count == len(plain) - len(set(plain)) == 0
    assert found["both-orders"].count == found["contradictions"].count == 0
