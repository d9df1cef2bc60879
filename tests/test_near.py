"""Near-duplicates: every one that is reported is near, and next to none that is near is missed."""

import gzip
import json
import os
import random
import subprocess
import sys
from functools import partial
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_doubles import HOSTILE, asking, prepared_of

from alignlab.data.format import Dialogue, Format
from alignlab.data.prompts import as_transcript
from alignlab.data.transcript import Turn, split_pair
from alignlab.doctor import near
from alignlab.doctor.doubles import letters
from alignlab.doctor.near import BANDS, GRAM, NEAR, ROWS, jaccard, near_earlier, near_findings, shingles
from alignlab.errors import DataError

LONG = (
    "Please tell me in your own words how a sourdough loaf is made, from the flour to the oven, and what may go wrong"
)


def found_in(rows, asked=None, transcript=str):
    return {finding.name: finding for finding in near_findings(prepared_of(rows), asked, transcript)}


def counts(rows, asked=None):
    return {name: finding.count for name, finding in found_in(rows, asked).items() if finding.count}


def pairs_of(*prompts, split="train"):
    return [(prompt, " a", " b", split) for prompt in prompts]


def similarity(one, other):
    return jaccard(shingles(one), shingles(other))


# Similarity


def test_jaccard_is_the_share_of_runs_that_both_have():
    """abcde and bcdef against abcde and bcdeg: one of three."""
    assert similarity("abcdef", "abcdeg") == 1 / 3
    assert similarity("abcdef", "abcdef") == 1 and similarity("abcd", "abcd") == 0


def test_one_changed_letter_is_near_from_49_letters_on():
    """It changes five of 45 runs: 40 in both, 50 in either, 0.8; of 44 runs 39 in 49, 0.796."""
    text = "".join(chr(ord("a") + i) for i in range(49))
    changed = text[:24] + "!" + text[25:]
    assert near_earlier([text, changed], 1) == {1: (0, 0.8)}
    assert near_earlier([text[:-1], changed[:-1]], 1) == {}


def test_a_pair_at_the_threshold_is_missed_once_in_ten_thousand_at_most():
    assert (1 - NEAR**ROWS) ** BANDS < 1e-4


def word(rng):
    return "".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9)))


def edited(text, rng, wanted):
    """The text with letters changed one by one until it is like itself in `wanted` or less."""
    whole, letters_of = shingles(text), list(text)
    while jaccard(whole, shingles("".join(letters_of))) > wanted:
        letters_of[rng.randrange(len(letters_of))] = rng.choice("etaoinshrdlu")
    return "".join(letters_of)


def test_planted_edits_just_above_the_threshold_are_found_and_none_below_it():
    rng = random.Random(0)
    texts = ["".join(word(rng) for _ in range(rng.randint(15, 120))) for _ in range(600)]
    copies = [edited(text, rng, rng.uniform(0.78, 0.86)) for text in texts]
    near_ones = {n for n, (text, copy) in enumerate(zip(texts, copies, strict=True)) if similarity(text, copy) >= NEAR}
    assert len(near_ones) > 300 and len(texts) - len(near_ones) > 50
    found = near_earlier([*texts, *copies], len(texts))
    assert set(found) == {n + len(texts) for n in near_ones}
    assert all(match.other == n - len(texts) and match.jaccard >= NEAR for n, match in found.items())


def test_copies_of_one_text_are_found_without_comparing_all_with_all(monkeypatch):
    compared = []
    monkeypatch.setattr(near, "jaccard", lambda *sets: compared.append(1) or jaccard(*sets))
    texts = [f"{letters(LONG)}{letters(LONG)[::-1]}{n}" for n in range(3000)]
    found = near_earlier(texts, len(texts))
    assert set(found) == set(range(1, 3000)) and len(compared) < 4000


def test_many_texts_that_are_alike_but_not_near_take_a_bounded_number_of_comparisons(monkeypatch):
    compared = []
    monkeypatch.setattr(near, "jaccard", lambda *sets: compared.append(1) or jaccard(*sets))
    rng = random.Random(0)
    shared = "".join(word(rng) for _ in range(80))
    texts = [shared + "".join(word(rng) for _ in range(12)) for _ in range(500)]
    assert 0.7 < similarity(texts[0], texts[1]) < NEAR
    near_earlier(texts, len(texts))
    assert 1000 < len(compared) <= near.CHECKED * len(texts)


SHORT = st.text(alphabet="ab", min_size=0, max_size=30)


@given(st.lists(SHORT, unique=True, max_size=12), st.integers(0, 12), st.integers(0, 12))
@settings(deadline=None)
def test_what_is_found_is_near_earlier_and_among_those_indexed(texts, indexed, asking):
    indexed = min(indexed, len(texts))
    found = near_earlier(texts, indexed, asking=asking)
    assert found == near_earlier(texts, indexed, asking=asking)
    for number, (other, value) in found.items():
        assert number >= asking and other < min(number, indexed)
        assert value == similarity(texts[number], texts[other]) >= NEAR


@pytest.mark.parametrize("subset", ["harmless-base", "helpful-base"])
def test_in_real_prompts_it_finds_what_comparing_all_with_all_finds(subset, shared):
    texts = list(dict.fromkeys(letters(prompt) for prompt in real_prompts(shared, subset)))[:700]
    sets = [shingles(text) for text in texts]
    every = {b for a, b in combinations(range(len(texts)), 2) if jaccard(sets[a], sets[b]) >= NEAR}
    assert set(near_earlier(texts, len(texts))) == every and every


def real_prompts(shared, subset):
    with gzip.open(shared / "data" / "hh-rlhf" / f"{subset}.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            try:
                yield split_pair(row["chosen"], row["rejected"])[0]
            except DataError:
                continue


# Findings


def test_all_that_is_looked_for_is_said_where_nothing_is_found():
    found = found_in(pairs_of(asking("Hi"), asking("Why?")), {"mine": ["Where?"]})
    assert list(found) == ["near-duplicates", "near-overlap", "prompt-overlap:mine"]
    assert all(not one.count and one.says.endswith(".") and one.advice and not one.shown for one in found.values())
    assert found_in([])["near-overlap"].of == 0


def test_every_pair_of_a_prompt_near_an_earlier_one_counts():
    first, second = asking(LONG), asking(f"{LONG} today?")
    found = found_in(pairs_of(first, first, second, second))["near-duplicates"]
    assert (found.count, found.of) == (2, 4) and len(found.shown) == 1
    value = similarity(letters(LONG), letters(f"{LONG} today?"))
    assert f'is like train pair 0 (Jaccard {value:.2f}): "…' in found.shown[0].what
    assert "today?" in found.shown[0].what


def test_the_same_prompt_in_other_spelling_is_no_near_duplicate():
    assert counts(pairs_of(asking(LONG), asking(LONG.upper()))) == {}


def test_a_dialogue_that_goes_on_is_near_across_splits_only():
    deeper = asking(LONG, "Gladly.", "Go on")
    assert counts(pairs_of(asking(LONG), deeper)) == {}
    found = found_in([*pairs_of(asking(LONG)), *pairs_of(deeper, split="test")])
    assert found["near-overlap"].count == 1 and found["near-overlap"].level == "doubtful"


def test_held_out_prompts_are_compared_with_training_only():
    held_out = pairs_of(asking(f"{LONG} today?"), asking(f"{LONG} today!!, please"), split="validation")
    assert counts(held_out) == {}
    assert counts([*pairs_of(asking(LONG)), *held_out]) == {"near-overlap": 2}
    assert counts([*pairs_of(asking(LONG)), *pairs_of(asking(LONG), split="test")]) == {}


def test_prompts_of_few_letters_are_compared_exactly_only():
    assert counts(pairs_of(asking("Hi"), asking("Hi a"), asking("Ho"))) == {}


def test_chinese_is_compared_without_words():
    text = "请用你自己的话告诉我天然酵母面包是怎样做成的从面粉一直讲到烤箱"
    text += "并且说明哪里可能出错以及怎样才能避免这些错误谢谢你的帮助"
    assert counts(pairs_of(asking(text), asking(text[:-1] + "力"))) == {"near-duplicates": 1}


def test_role_words_make_no_prompts_alike():
    """Seven turns of one letter: all but the role words differ."""
    assert counts(pairs_of(asking(*"abcdefg"), asking(*"hijklmn"))) == {}


def test_prompts_of_a_file_are_looked_for_in_every_human_turn_of_training():
    rows = [
        *pairs_of(asking("Hello", "Hi!", LONG), asking("What is money laundering"), asking("Other", LONG[::-1], "?")),
        *pairs_of(asking("Held out?"), split="test"),
    ]
    asked = {"a.csv": ["What is money laundering?", f"{LONG} today?", LONG[::-1], "Held out?"], "b": ["Hello", LONG]}
    found = found_in(rows, asked)
    assert (found["prompt-overlap:a.csv"].count, found["prompt-overlap:a.csv"].of) == (2, 4)
    assert [one[:2] for one in found["prompt-overlap:a.csv"].shown] == [("train", 1), ("train", 0)]
    assert "asks 1 of the 4 prompts" in found["prompt-overlap:a.csv"].says
    assert found["prompt-overlap:b"].count == 2 and found["prompt-overlap:b"].level == "wrong"
    assert found_in(rows, {"c": [f"{LONG} today?"]})["prompt-overlap:c"].level == "doubtful"
    assert found_in(rows, {"d": [asking(LONG)]})["prompt-overlap:d"].count == 1


def test_a_template_of_another_format_makes_no_prompts_alike(tokenizer):
    form = Format("alpaca", tokenizer)
    rows = pairs_of(
        *(form.prompt(Dialogue([Turn("Human", f" {text}")])) for text in ("Why do cats purr?", "Why do dogs purr?"))
    )
    assert found_in(rows)["near-duplicates"].count == 1
    found = found_in(rows, {"x": ["why do dogs purr"]}, partial(as_transcript, form))
    assert (found["near-duplicates"].count, found["prompt-overlap:x"].count) == (0, 1)


def test_hostile_text_is_shown_on_one_line():
    rows = pairs_of(*(asking(text + end) for text in HOSTILE for end in ("", "abcdefghijklmnop", "abcdefghijklmnopq")))
    held_out = [(*row[:3], "test") for row in rows]
    found = found_in([*rows, *held_out], {"x": [*HOSTILE, "\ud800 and a surrogate"]})
    assert found["near-duplicates"].count
    for finding in found.values():
        assert all(one.what.isprintable() and len(one.what) < 1000 for one in finding.shown)


def test_a_long_text_is_compared_whole():
    rng = random.Random(0)
    text = "".join(word(rng) for _ in range(5000))
    assert set(near_earlier([text[: len(text) // 2], text, text[: -GRAM * 9]], 2)) == {2}


def test_a_crowd_of_like_texts_keeps_no_more_than_its_first_ones():
    """Each text has CROWD letters of 800 changed at a place of its own: near all others, and none is asked twice."""
    rng = random.Random(0)
    whole = "".join(word(rng) for _ in range(160))[:800]
    texts = [whole[:place] + "!" + whole[place + 1 :] for place in range(800)]
    found = near_earlier(texts, len(texts))
    assert set(found) == set(range(1, 800)) and max(match.other for match in found.values()) < 2 * near.CROWD


PROGRAM = """
from test_near import LONG, asking, near_findings, pairs_of, prepared_of
rows = pairs_of(*(asking(f"{LONG} {end}") for end in ("a", "b c", "now", "or then")), split="train")
print(near_findings(prepared_of(rows), {"x": [LONG], "y": [LONG + "?!"]}))
"""


def test_the_findings_do_not_depend_on_how_strings_hash():
    said = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1 and "Jaccard" in said.pop()
