"""The laws of shortcuts: features that a reader can count, how often each tells, and a model that knows no more."""

import json
import math
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from alignlab.data.prepare import prepare
from alignlab.doctor import scan
from alignlab.doctor.shortcuts import COUNTS, NAMES, accuracy, compare, feature, find_shortcuts, fit, measure, words_of
from alignlab.recipe import fields
from alignlab.recipe import load as recipe
from alignlab.recipe.load import DataSection

UNLIMITED = {"max_prompt_tokens": 10**6, "max_reply_tokens": 10**6}
MIB = 2**20


def hh(question, chosen, rejected):
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepares rows of question, chosen and rejected reply, a third of them held out."""

    def make(pairs):
        path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(hh(*pair)) + "\n" for pair in pairs), encoding="utf-8")
        shares = {"validation_share": 0.15, "test_share": 0.2}
        return prepare(DataSection(source="hh-rlhf", path=str(path), **shares, **UNLIMITED), tokenizer)

    return make


@pytest.fixture(scope="module")
def real(shared, tokenizer):
    def make(path):
        return prepare(DataSection(path=str(shared / "data" / path), test_share=0.2, **UNLIMITED), tokenizer)

    return make


def named(found):
    return {one["name"]: one for one in found.features}


def test_features_are_what_a_reader_counts():
    reply = "I’m sorry, but I can’t help with that! Why?\n- 12 Apples\n- **pears**"
    counted = dict(zip(NAMES, measure(reply, words_of("Any apples?")), strict=True))
    # I m sorry but I can t help with that Why 12 Apples pears: 14 words, 13 different, one of them asked for
    assert counted == {
        "characters": len(reply),
        "words": 14,
        "lines": 3,
        "list items": 2,
        "question marks": 1,
        "exclamation marks": 1,
        "digits": 2,
        "bold, headings and code": 2,
        "apologies": 1,
        "capitals, share of characters": 4 / len(reply),
        "different words, share of words": 13 / 14,
        "words of the prompt, share of different words": 1 / 13,
        "refuses": 1,
        "ends in mid-sentence": 0,
    }


def test_counts_are_compared_by_their_ratio_and_shares_by_their_difference():
    batch = {"prompt": ["p"], "chosen": ["a a a"], "rejected": ["a"]}
    found = dict(zip(NAMES, compare(batch)[0].tolist(), strict=True))
    assert found["characters"] == pytest.approx(math.log(6 / 2))
    assert found["words"] == pytest.approx(math.log(4 / 2))
    assert found["different words, share of words"] == pytest.approx(1 / 3 - 1)
    assert found["lines"] == found["digits"] == 0


def test_the_accuracy_of_a_feature_leaves_ties_out_and_counts_them():
    facts = feature("words", np.array([2.0, 1, 1, -1, 0, 0]))
    assert (facts["accuracy"], facts["n"], facts["ties"]) == (0.75, 4, 2)
    assert 0 <= facts["low"] < 0.75 < facts["high"] <= 1


def test_a_feature_that_no_pair_differs_in_has_no_accuracy():
    facts = {"name": "digits", "n": 0, "ties": 3, "accuracy": None, "low": None, "high": None}
    assert feature("digits", np.zeros(3)) == facts


def test_a_score_of_zero_is_half_right():
    assert accuracy(np.array([1.0, -1, 0, 0])).mean == 0.5


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(float, st.tuples(st.integers(1, 40), st.just(3)), elements=st.integers(-3, 3)))
def test_the_model_is_the_minimum_that_newtons_method_finds(X):
    weights = np.zeros(3)
    for _ in range(100):
        wins = 1 / (1 + np.exp(-X @ weights))
        hessian = np.eye(3) + (X.T * (wins * (1 - wins))) @ X
        weights -= 0.5 * np.linalg.solve(hessian, weights - X.T @ (1 - wins))
    assert fit(X) == pytest.approx(weights, abs=2e-3)


def test_swapping_chosen_and_rejected_turns_every_difference_and_weight():
    batch = {"prompt": ["Why?"] * 3, "chosen": ["a b", "c!", "No. 1"], "rejected": ["a", "why so", "- d\n- e"]}
    turned = compare({**batch, "chosen": batch["rejected"], "rejected": batch["chosen"]})
    assert (turned == -compare(batch)).all()
    assert fit(turned) == pytest.approx(-fit(compare(batch)), abs=1e-4)


def test_a_planted_shortcut_is_found_on_held_out_pairs(prepared):
    pairs = [(f"question {n}", f"It is {'so ' * (n % 5)}fine!", f"It is {'so ' * (n % 7)}fine.") for n in range(300)]
    found = find_shortcuts(prepared(pairs))
    assert max(found.weights, key=lambda name: abs(found.weights[name])) == "exclamation marks"
    assert named(found)["exclamation marks"]["accuracy"] == 1
    assert found.model.mean > 0.95 and found.model.n == pytest.approx(105, abs=40)
    shallow = found.findings[1]
    assert (shallow.name, shallow.level) == ("shallow-features", "doubtful")
    assert "exclamation marks: 1 against 0" in shallow.shown[0].what
    assert {shown.split for shown in shallow.shown} <= {"validation", "test"}


def test_coin_flips_leave_the_model_at_a_half(prepared):
    coin = np.random.default_rng(0)
    words = "oak elm ash yew fig bay".split()
    pairs = [
        (f"question {n}", *(" ".join(coin.choice(words, coin.integers(2, 30))) for _ in range(2))) for n in range(900)
    ]
    found = find_shortcuts(prepared(pairs))
    assert found.model.low < 0.5 < found.model.high
    assert [finding.level for finding in found.findings] == ["note", "note"]


def test_always_the_shorter_is_as_doubtful_as_always_the_longer(prepared):
    short_long = [(f"question {n}", "Yes, it is.", "Yes, it is, and so on and on.") for n in range(100)]
    shorter = find_shortcuts(prepared(short_long)).findings[0]
    longer = find_shortcuts(prepared([(q, b, a) for q, a, b in short_long])).findings[0]
    assert (shorter.count, longer.count) == (0, 100)
    assert shorter.level == longer.level == "doubtful"
    assert re.search(r"chosen \d+ tokens, rejected \d+", longer.shown[0].what)


def test_replies_of_one_length_have_no_length_bias(prepared):
    bias = find_shortcuts(prepared([(f"question {n}", "Yes, 1.", "Yes, 2.") for n in range(60)])).findings[0]
    assert (bias.count, bias.of, bias.says) == (0, 60, "No pair has replies of different length.")


def test_shortcuts_do_not_depend_on_the_number_of_processes(prepared, monkeypatch):
    pairs = prepared([(f"question {n}", f"Yes {n}!" * (n % 4 + 1), f"No. {n}" * (n % 3 + 1)) for n in range(2500)])
    alone = find_shortcuts(pairs)
    monkeypatch.setattr(scan, "SERIAL_PAIRS", 0)
    monkeypatch.setattr(scan, "spare_processes", lambda most: 2)
    assert find_shortcuts(pairs) == alone


def test_a_setting_named_in_the_advice_is_a_real_one(prepared):
    libraries = fields.library_settings()
    found = find_shortcuts(prepared([(f"question {n}", "Yes, it is.", "No.") for n in range(60)]))
    written = [match for one in found.findings for match in re.findall(r"\b(data|dpo)\.(\w+)(?:: (\w+))?", one.advice)]
    assert ("dpo", "loss_type", "sigmoid_norm") in written
    for section, key, value in written:
        assert key in (libraries[section] if section != "data" else recipe.DataSection.__dataclass_fields__)
        assert not value or not libraries[section][key].choices or value in libraries[section][key].choices


# Real data


def test_the_longer_reply_loses_on_harmless_base_and_wins_on_helpful_base(real):
    harmless, helpful = (find_shortcuts(real(f"hh-rlhf/{name}-base.test.jsonl.gz")) for name in ("harmless", "helpful"))
    for found, low, high in ((harmless, 0.41, 0.48), (helpful, 0.56, 0.63)):
        assert low < named(found)["characters"]["accuracy"] < high
        assert low < found.findings[0].share < high
        assert found.model.mean > found.longest.mean
    assert named(harmless)["apologies"]["low"] > 0.6
    assert named(harmless)["refuses"]["low"] > 0.6
    assert named(helpful)["question marks"]["high"] < 0.5


def test_length_bias_is_the_figure_that_a_plain_loop_counts(real):
    pairs = real("preference/ultrafeedback-1000.jsonl")
    longer = differ = 0
    for _, _, batch in pairs.batches(["chosen_ids", "rejected_ids"]):
        for chosen, rejected in zip(*batch.values(), strict=True):
            differ += len(chosen) != len(rejected)
            longer += len(chosen) > len(rejected)
    bias = find_shortcuts(pairs).findings[0]
    assert (bias.count, bias.of) == (longer, differ)


# Any text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_features_of_any_text_are_numbers_and_shares_are_shares(prompt, chosen, rejected):
    for reply in (chosen, rejected):
        counted = measure(reply, words_of(prompt))
        assert all(count >= 0 for count in counted[: len(COUNTS)])
        assert all(0 <= share <= 1 for share in counted[len(COUNTS) :])
    assert np.isfinite(compare({"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]})).all()


@pytest.mark.parametrize("piece", ["a", "a ", "\n", "“", "- ", "1", "*", "é", "?!", "sorry "])
def test_a_reply_of_ten_megabytes_is_measured_in_two_seconds(piece):
    text = piece * (10 * MIB // len(piece))
    began = time.process_time()
    assert measure(text, words_of(text))[0] == len(text)
    assert time.process_time() - began < 2
