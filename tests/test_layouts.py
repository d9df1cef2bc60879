"""The laws of layouts: what each kind of raw row means, which rows are refused and why, how kinds are told apart."""

import gzip
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignlab.data.layouts import LAYOUTS, find_reader
from alignlab.data.prepare import prepare, prepare_replies, sft_rows
from alignlab.data.splits import SPLITS
from alignlab.errors import DataError
from alignlab.recipe.load import DataSection, SFTDataSection, Source

SHARED = Path(__file__).parents[2] / "shared"
PREFERENCE = SHARED / "data" / "preference"
UNLIMITED = {"max_prompt_tokens": 10**6, "max_reply_tokens": 10**6}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
SHP = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 6, "score_B": 3}
ULTRA = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 4.0}
SUMMARY = {
    "info": {"post": "long story", "title": "t", "subreddit": "r"},
    "summaries": [{"text": " one"}, {"text": " two"}],
    "choice": 1,
    "extra": {"confidence": 8},
}
RANKED = {"prompt": "q", "answers": ["best", "good", "bad"]}  # in this order where the recipe says so
ALPACA = {"instruction": "do", "input": "", "output": "done"}
ROWS = {
    "hh-rlhf": HH,
    "shp": SHP,
    "ultrafeedback": ULTRA,
    "summarize-from-feedback": SUMMARY,
    "ranked": RANKED,
    "alpaca": ALPACA,
    "pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
}

pytestmark = pytest.mark.filterwarnings("ignore")


def recognise(*rows):
    reader = find_reader(rows, None, {})
    return reader and reader.source


def read(source, row, **settings):
    """What a row holds, by its columns or by `source`."""
    return list(find_reader([row], source, {}).read(row, DataSection(source=source, **settings)))


def replies(source, row, **settings):
    return [(example.chosen.text, example.rejected.text) for example in read(source, row, **settings)]


def asked(example):
    return [turn.text for turn in example.dialogue.turns]


def message(role, content):
    return {"role": role, "content": content}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def prepared(tokenizer, path, **settings):
    settings = {"validation_share": 0.2, "test_share": 0.2, **settings}
    path = [str(one) for one in path] if isinstance(path, list) else str(path)
    return prepare(DataSection(path=path, **settings), tokenizer)


# Which source


@pytest.mark.parametrize("source", ROWS)
def test_a_row_is_recognised_by_its_columns(source):
    assert recognise(ROWS[source]) == source


def test_columns_as_real_files_have_them_are_recognised():
    chat = [message("user", "q"), message("assistant", "a")]
    binarized = {"prompt": "q", "prompt_id": "1", "chosen": chat, "rejected": chat, "messages": chat}
    assert recognise({**binarized, "score_chosen": 8.0, "score_rejected": 7.0}) == "ultrafeedback"
    flat = {"prompt": "q", "chosen": "a", "rejected": "b", "metadata": {"score_chosen": 9.0, "score_rejected": 8.0}}
    assert recognise(flat) == "ultrafeedback"
    assert recognise({"chosen": chat, "rejected": chat}) == "pairs"
    assert recognise({"instruction": "i", "input": "", "output": "o", "chosen": "o", "rejected": "p"}) == "pairs"
    scored = [{"response": "a", "overall_score": 7.0}, {"response": "b", "overall_score": 3.0}]
    assert recognise({"instruction": "q", "completions": scored}) == "ranked"
    assert recognise({"text": "a"}) is None


def test_a_source_that_is_recognised_is_said_and_one_that_is_not_lists_the_columns(tmp_path, tokenizer, caplog):
    with caplog.at_level("INFO"):
        prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", [{**HH, **hh(n)} for n in range(40)]))
    assert f"{tmp_path / 'rows.jsonl'}: data.source=hh-rlhf, by its columns" in caplog.text
    odd = write_lines(tmp_path / "odd.jsonl", [{"question": "a", "good": "b", "bad": "c"}])
    with pytest.raises(DataError, match=r"odd.jsonl: .*question, good, bad .*data\.columns: \{prompt: COLUMN, chosen"):
        prepared(tokenizer, odd)
    with pytest.raises(DataError, match=r"alpaca.jsonl: .*no pairs; write data.sft: \{path"):
        prepared(tokenizer, write_lines(tmp_path / "alpaca.jsonl", [ALPACA]))


def hh(number):
    prompt = f"\n\nHuman: question {number}\n\nAssistant:"
    return {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}


def test_every_layout_has_a_line_in_the_docs_and_a_setting():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for line in lines for name in re.findall(r"`(.+?)`", line)} == set(LAYOUTS)
    assert set(get_args(Source)) == {*LAYOUTS, "toy"}


# HH-RLHF


def test_red_team_transcripts_are_refused_alone_and_left_out_beside_pairs(tmp_path, tokenizer, caplog):
    red = [{"transcript": "\n\nHuman: h\n\nAssistant: a", "rating": 4.0, "task_description": "t"}]
    alone = write_lines(tmp_path / "red-team-attempts" / "train.jsonl.gz", red)
    for settings in ({}, {"source": "hh-rlhf"}):
        with pytest.raises(DataError, match=r"red-team transcripts hold no pairs; set data.subset to harmless-base"):
            prepared(tokenizer, alone, **settings)
    write_lines(tmp_path / "helpful-base" / "train.jsonl.gz", [hh(n) for n in range(40)])
    with caplog.at_level("INFO"):
        found = prepared(tokenizer, tmp_path)
    assert found.rows == 40 and "red-team transcripts hold no pairs" in caplog.text


def test_a_dialogue_that_ends_with_a_human_turn_is_refused_and_consecutive_turns_stay():
    prompt = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:"
    (example,) = read("hh-rlhf", {"chosen": f"{prompt} d", "rejected": f"{prompt} e"})
    assert [turn.role for turn in example.dialogue.turns] == ["Human", "Human", "Assistant"]
    with pytest.raises(DataError, match="ends with a Human turn"):
        read("hh-rlhf", {name: f"{text}\n\nHuman: thanks" for name, text in HH.items()})


# Summaries


def test_a_comparison_of_summaries_keeps_the_workers_confidence():
    (example,) = read("summarize-from-feedback", SUMMARY)
    assert asked(example) == [" SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: long story\n\nTL;DR:"]
    assert (example.chosen.text, example.rejected.text, example.confidence) == (" two", " one", 8.0)
    without = {**SUMMARY, "extra": {}, "choice": 0, "info": {"article": "news", "title": "t"}}
    (example,) = read("summarize-from-feedback", without)
    assert (asked(example), example.chosen.text, example.confidence) == ([" Article:\n\nnews\n\nTL;DR:"], " one", None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the raw rows")
def test_the_real_rows_of_summaries_and_comments_are_read(tokenizer):
    lines = (PREFERENCE / "summarize-from-feedback-raw-rows.jsonl").read_text().splitlines()
    pair, marks = map(json.loads, lines)
    (example,) = read("summarize-from-feedback", pair)
    assert example.confidence == 8.0 and example.chosen.text.startswith(" we suspect other party")
    assert asked(example)[0].startswith(" SUBREDDIT: r/legaladvice\n\nTITLE: Anybody with knowledge")
    with pytest.raises(DataError, match="one summary, which is no comparison"):
        read("summarize-from-feedback", marks)
    assert recognise(pair) == recognise(marks) == "summarize-from-feedback"
    (row,) = map(json.loads, (PREFERENCE / "shp-raw-row.jsonl").read_text().splitlines())
    with pytest.raises(DataError, match="ratio is below"):  # 54 against 52
        read("shp", row)
    (example,) = read("shp", row, min_score_ratio=1.0)
    assert example.chosen.text.startswith(" It's ironic") and example.rejected.text.startswith(" Currently wrapping")


def test_confidence_is_a_column_of_the_prepared_pairs(tmp_path, tokenizer):
    rows = [{**SUMMARY, "info": {**SUMMARY["info"], "post": f"story {n}"}, "split": s} for n, s in enumerate(OPENAI)]
    found = prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", rows), format="plain", max_prompt_tokens=999)
    assert found.kept == {"train": 2, "validation": 1, "test": 1}
    assert found.train["confidence"] == [8.0, 8.0]
    assert found.train["prompt"][0] == "SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: story 0\n\nTL;DR:"


OPENAI = ("train", "valid1", "valid2", "train")  # how the comparisons name their splits


# SHP


def test_comments_are_paired_by_label_from_a_ratio_of_scores_on():
    assert replies("shp", SHP) == [(" a", " b")]  # 6 / 3 = 2
    assert replies("shp", {**SHP, "labels": 0, "score_A": 1, "score_B": 9}) == [(" b", " a")]
    with pytest.raises(DataError, match=r"below data\.min_score_ratio 2"):
        read("shp", {**SHP, "score_A": 5})
    assert replies("shp", {**SHP, "score_A": 5}, min_score_ratio=1.5) == [(" a", " b")]


@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(1, 5))
def test_swapping_the_comments_changes_nothing(first, second, ratio):
    row = {**SHP, "score_A": first, "score_B": second, "labels": int(first >= second)}
    swapped = {"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 1 - row["labels"]}
    swapped |= {"score_A": second, "score_B": first}

    def found(row):
        try:
            return replies("shp", row, min_score_ratio=ratio)
        except DataError as reason:
            return str(reason)

    assert found(row) == found(swapped)


def test_a_prompt_gives_at_most_so_many_pairs(tmp_path, tokenizer):
    """Shp's own advice is 5; ten comments of one post leave 5, or as many as the recipe says."""
    rows = [{**SHP, "history": "one post", "human_ref_A": f"good {n}"} for n in range(10)]
    rows += [{**SHP, "history": f"post {n}"} for n in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    for settings, most in (({}, 5), ({"max_pairs_per_prompt": 2}, 2)):
        found = prepared(tokenizer, path, **settings)
        assert sum(found.kept.values()) == 40 + most
        assert found.dropped == {f"its prompt has {most} pairs already": 10 - most}


# UltraFeedback, pairs


def test_equal_and_inverted_scores_hold_no_preference():
    assert replies("ultrafeedback", ULTRA) == [(" a", " b")]
    chat = {name: [message("user", "q"), message("assistant", ULTRA[name])] for name in ("chosen", "rejected")}
    assert replies("ultrafeedback", {**ULTRA, **chat}) == [(" a", " b")]
    with pytest.raises(DataError, match="the same score"):
        read("ultrafeedback", {**ULTRA, "score_rejected": 8.5})
    with pytest.raises(DataError, match="the rejected reply has the higher score"):
        read("ultrafeedback", {**ULTRA, "score_rejected": 9})


def test_instruction_and_input_stand_for_a_prompt():
    row = {"instruction": "Spell it.", "input": "freind", "output": "x", "chosen": "friend", "rejected": "no"}
    (example,) = read("pairs", row)
    assert (asked(example), example.dialogue.input) == ([" Spell it."], "freind")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files")
@pytest.mark.parametrize(
    ("name", "source", "rows", "dropped"),
    [
        (
            "ultrafeedback-1000.jsonl",
            "ultrafeedback",
            1000,
            {
                "the two replies have the same score": 111,
                "the text spells the special token </s>": 4,
                "the two replies are identical": 3,
                "a reply is empty": 2,
                "a turn holds the beginning of another turn": 1,
            },
        ),
        ("ultrafeedback-eval-200.jsonl", "ultrafeedback", 200, {"the two replies have the same score": 25}),
        ("instruction-preference-1100.json", "pairs", 1100, {"the two replies are identical": 6}),
    ],
)
def test_every_real_file_is_recognised_and_its_rows_are_counted(name, source, rows, dropped):
    found = prepared(AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "mistral"), PREFERENCE / name, **UNLIMITED)
    assert (found.rows, found.dropped) == (rows, dropped)
    assert sum(found.kept.values()) == rows - sum(dropped.values())
    assert [part["source"] for part in found.parts] == [source]


# Ranked


def test_ranked_answers_become_pairs_by_rule():
    """Of three: every two are 3 pairs, neighbours 2, the best against the rest 2."""
    best, good, bad = " best", " good", " bad"
    assert replies("ranked", RANKED, ranked_pairs="all") == [(best, good), (best, bad), (good, bad)]
    assert replies("ranked", RANKED, ranked_pairs="adjacent") == [(best, good), (good, bad)]
    assert replies("ranked", RANKED) == [(best, good), (best, bad)]
    scored = {"prompt": "q", "answers": ["good", "bad", "best"], "scores": [5, 1, 9]}
    assert replies("ranked", scored) == [(best, good), (best, bad)]
    objects = [{"response": "bad", "overall_score": 1.0}, {"response": "best", "overall_score": 7.5}]
    assert replies("ranked", {"instruction": "q", "completions": objects}) == [(best, bad)]


def test_answers_of_equal_score_make_no_pair():
    tied = {"prompt": "q", "answers": ["a", "b", "c"], "scores": [2, 2, 1]}
    assert replies("ranked", tied, ranked_pairs="all") == [(" a", " c"), (" b", " c")]
    with pytest.raises(DataError, match="all answers have the same score"):
        read("ranked", {**tied, "scores": [1, 1, 1]})


@given(st.lists(st.integers(0, 5), min_size=2, max_size=7))
def test_a_higher_score_is_always_the_chosen_one(scores):
    answers = [f"{place}" for place in range(len(scores))]
    for rule in ("all", "adjacent", "best"):
        try:
            pairs = replies("ranked", {"prompt": "q", "answers": answers, "scores": scores}, ranked_pairs=rule)
        except DataError:
            assert len(set(scores)) == 1
            continue
        assert all(scores[int(chosen)] > scores[int(rejected)] for chosen, rejected in pairs)


def test_every_pair_of_a_ranked_row_is_accounted_for(tmp_path, tokenizer):
    """40 rows of three answers make 120 pairs by `all`; the cap of 2 leaves 80."""
    rows = [{**RANKED, "prompt": f"question {n}"} for n in range(40)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found = prepared(tokenizer, path, source="ranked", ranked_pairs="all", max_pairs_per_prompt=2)
    assert (found.rows, sum(found.kept.values()), sum(found.dropped.values())) == (40, 80, 40)


# Any usual spelling of the same preference

ASKED = [message("user", "q")]
SAID = {"chosen": message("assistant", "a"), "rejected": message("assistant", "b")}
SHAREGPT = [{"from": "human", "value": "q"}]
TEXT = {"chosen": "a", "rejected": "b"}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("pairs", {"Prompt": "q", "Chosen": "a", "Rejected": "b"}),
        ("pairs", {"system": None, "question": "q", **TEXT}),
        ("pairs", {"prompt": "q", "chosen_response": "a", "rejected_response": "b"}),
        ("pairs", {"query": "q", "responseChosen": "a", "responseRejected": "b"}),
        ("pairs", {"question": "q", "response_j": "a", "response_k": "b"}),
        ("pairs", {"prompt": "q", "accepted": "a", "dispreferred": "b"}),
        ("pairs", {"input": "q", "preferred_output": "a", "non_preferred_output": "b"}),
        (
            "pairs",
            {
                "input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True},
                "preferred_output": [SAID["chosen"]],
                "non_preferred_output": [SAID["rejected"]],
            },
        ),
        ("pairs", {"conversations": SHAREGPT, "chosen": gpt("a"), "rejected": gpt("b")}),
        ("pairs", {"prompt": ASKED[0], **SAID}),
        ("pairs", {"prompt": {"text": "q"}, "chosen": {"text": "a"}, "rejected": {"text": "b"}}),
        ("pairs", {"prompt": json.dumps(ASKED), **{side: str([said]) for side, said in SAID.items()}}),
        ("pairs", {"chosen": json.dumps([*ASKED, SAID["chosen"]]), "rejected": json.dumps([*ASKED, SAID["rejected"]])}),
        ("pairs", {"prompt": "Human: q\n\nAssistant:", **TEXT}),
        ("pairs", {"prompt": "\n\nHuman: q\n\nAssistant:", **HH, "chosen": HH["chosen"]}),
        ("pairs", {"messages": ASKED, **TEXT}),
        (
            "pairs",
            {
                "chosen": [{"role": "Human", "content": "q"}, {"role": "Assistant", "content": "a"}],
                "rejected": [{"speaker": "USER", "text": "q"}, {"speaker": "bot", "text": "b"}],
            },
        ),
        (
            "pairs",
            {
                "prompt": [message("user", [{"type": "text", "text": "q", "image_url": None}])],
                "chosen": [message("assistant", [{"type": "text", "text": "a"}])],
                "rejected": [message("assistant", "b")],
            },
        ),
        ("hh-rlhf", {"chosen": "Human: q\nAssistant: a", "rejected": "Human: q\nAssistant: b"}),
        ("hh-rlhf", {"chosen": "Human: q\n\nAssistant: a", "rejected": "\nHuman: q\n\nAssistant: b"}),
        ("ultrafeedback", {"prompt": "q", **TEXT, "chosen-rating": 5, "rejected-rating": 1}),
        ("ultrafeedback", {"prompt": "q", **TEXT, "chosen_avg_rating": "5", "rejected_avg_rating": "1"}),
        ("ultrafeedback", {"prompt": "q", **TEXT, "rank_chosen": 1, "rank_rejected": 2}),
        ("two-responses", {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1}),
        ("two-responses", {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2}),
        ("two-responses", {"context": ASKED, "response1": "b", "response2": "a", "overall_preference": 3}),
        ("two-responses", {"instruction": "q", "input": "", "output_1": "b", "output_2": "a", "preference": 2}),
        ("two-responses", {"prompt": "q", "response_a": "a", "response_b": "b", "label": "0"}),
        ("two-responses", {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "A"}),
        ("two-responses", {"prompt": "q", "response_0": "b", "response_1": "a", "winner": "response_1"}),
        ("two-responses", {"prompt": "q", "response_1": "a", "response_2": "b", "winner": "response_1"}),
        ("two-responses", {"prompt": "q", "answer_0": "b", "answer_1": "a", "score_0": -1.0, "score_1": 1.0}),
        ("two-responses", {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "rank_0": 1, "rank_1": 2}),
        (
            "two-responses",
            {
                "model_a": "x",
                "model_b": "y",
                "winner": "model_b",
                "conversation_a": [*ASKED, SAID["rejected"]],
                "conversation_b": [*ASKED, SAID["chosen"]],
            },
        ),
        (
            "two-responses",
            {
                "prompt": '["q"]',
                "response_a": '["a"]',
                "response_b": '["b"]',
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            },
        ),
        ("ranked", {"prompt": "q", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}]}),
        ("ranked", {"prompt": "q", "responses": ["b", "a"], "ratings": [1, 5]}),
        ("ranked", {"prompt": "q", "responses": ["b", "a"], "rank": ["2", "1"]}),
        ("ranked", {"prompt": "q", "responses": ["b", "a"], "rewards": ["0.1", "0.7"]}),
        ("ranked", {"prompt": "q", "responses": ["b", "a"], "rm_scores": [-3.5, -1]}),
        ("ranked", {"prompt": "q", "replies": [{"text": "a", "votes": 9}, {"text": "b", "votes": 0}]}),
        ("ranked", {"prompt": "q", "answers": {"text": ["b", "a"], "score": [1, 2]}}),
    ],
)  # fmt: skip
def test_any_usual_spelling_is_the_same_preference(source, row):
    assert recognise(row) == source
    (example,) = find_reader([row], None, {}).read(row, DataSection())
    assert asked(example) == [" q"] and (example.chosen.text, example.rejected.text) == (" a", " b")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "conversation_a": "a", "conversation_b": "b", "winner": "tie (bothbad)"},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        {"prompt": "q", "response_0": "a", "response_1": "b", "label": 2},
        {"prompt": "q", "response_1": "a", "response_2": "b", "winner": "Tie"},
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner_model_a": 0, "winner_model_b": 0},
    ],
)  # fmt: skip
def test_a_tie_holds_no_preference(row):
    with pytest.raises(DataError, match="a tie"):
        read(None, row)


def test_numbers_that_could_mean_either_reply_are_not_guessed():
    """0 of response_1 and response_2 may be the first one, or a tie."""
    rows = [{"prompt": "q", "response_1": "a", "response_2": "b", "label": label} for label in (0, 1, 2)]
    assert recognise(*rows) is None
    for name, better in (("index", "b"), ("number", "a")):
        reader = find_reader(rows, None, {name: "label"})
        (example,) = reader.read(rows[1], DataSection())
        assert example.chosen.text == f" {better}"


def test_a_label_of_two_replies_may_be_a_tie():
    rows = [{"prompt": "q", "response_a": "a", "response_b": "b", "label": label} for label in (0, 1, 2)]
    reader = find_reader(rows, None, {})
    better = [[example.chosen.text for example in reader.read(row, DataSection())] for row in rows[:2]]
    assert better == [[" a"], [" b"]]
    with pytest.raises(DataError, match="a tie"):
        list(reader.read(rows[2], DataSection()))


def test_three_replies_are_not_two():
    assert recognise({"prompt": "q", "response_0": "a", "response_1": "b", "response_2": "c", "label": 1}) is None


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("messages", {"messages": [*ASKED, SAID["chosen"]]}),
        ("messages", {"conversations": [*SHAREGPT, gpt("a")]}),
        ("messages", {"messages": json.dumps([*ASKED, SAID["chosen"]])}),
        ("messages", {"text": "Human: q\nAssistant: a"}),
        ("prompt-completion", {"prompt": "q", "completion": "a"}),
        ("prompt-completion", {"prompt": ASKED, "completion": [SAID["chosen"]]}),
        ("prompt-completion", {"question": "q", "answer": "a"}),
        ("prompt-completion", {"input": "q", "output": "a"}),
        ("alpaca", {"instruction": "q", "response": "a"}),
        ("alpaca", {"instruction": "q", "context": "", "response": "a", "category": "qa"}),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
        ("kto", {"prompt": "q", "completion": "a", "label": True}),
        ("kto", {"messages": [*ASKED, SAID["chosen"]], "label": 1}),
        ("kto", {"instruction": "q", "output": "a", "kto_tag": "true"}),
        ("kto", {"prompt": "q", "response": "a", "thumbs": "👍"}),
        ("kto", {"prompt": "q", "response": "a", "feedback": "thumbs up"}),
    ],
)
def test_replies_to_learn_in_any_usual_spelling(source, row):
    assert recognise(row) == source
    (example,) = find_reader([row], None, {}).read(row, DataSection())
    assert (asked(example), example.chosen.text, example.rejected) == ([" q"], " a", None)
    assert example.label is (True if source == "kto" else None)


def test_a_label_that_is_no_judgement_is_not_one():
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in ("science", "law", "good")]
    assert recognise(*rows) == "prompt-completion"


def test_unpaired_labels_are_refused_with_what_they_are_for(tmp_path, tokenizer):
    path = write_lines(tmp_path / "kto.jsonl", [{"prompt": "q", "completion": "a", "label": n < 9} for n in range(20)])
    with pytest.raises(
        DataError, match=r"kto\.jsonl: unpaired labels .* are what KTO learns from .*DPO and ORPO need two"
    ) as error:
        prepared(tokenizer, path)
    assert "\n" not in str(error.value)


def test_a_layout_is_told_by_some_hundred_rows(tmp_path, tokenizer):
    odd = [{"prompt": None, **TEXT}, {"messages": ASKED, "label": 1}, {"prompt": "x"}, {"prompt": "y", "chosen": "a"}]
    rows = [*odd, *({"prompt": f"question {n}", **TEXT, "system": None} for n in range(60))]
    found = prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", rows))
    assert [part["source"] for part in found.parts] == ["pairs"]
    assert (found.rows, sum(found.kept.values()), sum(found.dropped.values())) == (64, 60, 4)


def test_half_of_the_rows_may_lack_a_score(tmp_path, tokenizer):
    scored = [
        {"prompt": f"q {n}", **TEXT, "score_chosen": 5, "score_rejected": 1 if n % 2 else None} for n in range(80)
    ]
    found = prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", scored))
    assert found.dropped == {"no field 'score_rejected'": 40}


# Columns of other names


def test_columns_of_any_names_are_said(tmp_path, tokenizer):
    rows = [{"frage": f"question {n}", "gut": "yes", "schlecht": "no", "sys": "Be kind."} for n in range(60)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    found = prepared(tokenizer, path, columns=columns)
    assert sum(found.kept.values()) == 60 and found.not_read == {"sys": 60}
    told = prepared(tokenizer, path, columns={**columns, "system": "sys"})
    assert told.train["prompt"][0].startswith("\n\nHuman: Be kind.\n\nquestion") and not told.not_read
    with pytest.raises(
        DataError, match=r"data\.columns gives chosen to 'gutt', which is no column of .*did you mean 'gut'"
    ):
        prepared(tokenizer, path, columns={**columns, "chosen": "gutt"})
    with pytest.raises(DataError, match=r"data\.columns names a column 'promt'.*did you mean 'prompt'"):
        prepared(tokenizer, path, columns={"promt": "frage", "chosen": "gut", "rejected": "schlecht"})


def test_a_name_given_to_a_column_wins_over_one_that_is_there():
    row = {"prompt": "raw", "asked": "q", **TEXT}
    reader = find_reader([row], None, {"prompt": "asked"})
    (example,) = reader.read(row, DataSection())
    assert asked(example) == [" q"] and reader.unread(row) == {"prompt"}


# Nothing vanishes


def test_system_history_and_tools_are_read(tmp_path, words):
    row = {"instruction": "And now?", "input": "in", "system": "Be kind.", **TEXT}
    row |= {
        "history": [["Hi", "Hello"], ["How?", "So."]],
        "tools": [{"type": "function", "function": {"name": "find"}}],
    }
    (example,) = read("pairs", row)
    assert asked(example) == [" Hi", " Hello", " How?", " So.", " And now?"]
    dialogue = example.dialogue
    assert (dialogue.system, dialogue.input, dialogue.tools) == ("Be kind.", "in", row["tools"])
    (example,) = read("pairs", {**row, "history": [message("user", "Hi"), message("assistant", "Hello")]})
    assert asked(example) == [" Hi", " Hello", " And now?"]
    (example,) = read("pairs", {**row, "tools": json.dumps(row["tools"]), "history": []})
    assert example.dialogue.tools == row["tools"] and len(example.dialogue.turns) == 1


def test_a_shared_greeting_in_a_history_makes_no_single_dialogue(tmp_path, tokenizer):
    rows = [{"instruction": f"question {n}", "history": [["Hi", "Hello"]], **TEXT} for n in range(60)]
    assert all(prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", rows)).kept.values())


def test_what_is_not_read_is_counted_by_column_and_key(tmp_path, tokenizer, caplog):
    said = [{"role": "assistant", "content": "a", "weight": 1}]
    rows = [
        {"prompt": f"q {n}", "chosen": said, "rejected": "b", "id": n, "sys": "s" if n < 9 else ""} for n in range(60)
    ]
    with caplog.at_level("INFO"):
        found = prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", rows))
    assert found.not_read == {"id": 60, "sys": 9, "weight": 60}
    (line,) = (record.getMessage() for record in caplog.records if "not read" in record.getMessage())
    assert "sys (9 rows)" in line


THINKS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['reasoning_content'] %}[{{ m['reasoning_content'] }}]{% endif %}"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_reasoning_is_handed_to_the_template_or_named(tmp_path, words):
    thinks = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    rows = [
        {"prompt": [message("user", f"q {n}")], "chosen": [thinks], "rejected": [{**thinks, "content": "b"}]}
        for n in range(60)
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    section = DataSection(path=str(path), validation_share=0.2, test_share=0.2, format="chat")
    found = prepare(section, words, THINKS)
    assert found.train["chosen"][0] == "[hm]a" and not found.not_read
    without = prepare(section, words, THINKS.replace("[{{ m['reasoning_content'] }}]", ""))
    assert without.train["chosen"][0] == "a" and without.not_read == {"reasoning_content": 60}
    assert prepared(words, path).not_read == {"reasoning_content": 60}


def test_an_empty_prompt_is_dropped(tmp_path, tokenizer):
    rows = [{"prompt": prompt, **TEXT} for prompt in ("", " \n ")] + [{"prompt": f"q {n}", **TEXT} for n in range(60)]
    assert prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", rows)).dropped == {"the prompt is empty": 2}


# What is never guessed


@pytest.mark.parametrize(
    "more",
    [{}, {"quality": [2, 5]}, {"rankings": [2, 1]}, {"scores": None}, {"order": [1, 0]}],
)
def test_answers_without_a_known_order_are_refused(tmp_path, tokenizer, more):
    rows = [{"prompt": f"q {n}", "responses": ["bad", "good"], **more} for n in range(60)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"no order that is known \(60\).*data\.columns: \{scores: COLUMN\}"):
        prepared(tokenizer, path)
    if "quality" in more:
        with pytest.raises(DataError, match="no order that is known"):
            prepared(tokenizer, path, source="ranked")
        chosen = prepared(tokenizer, path, columns={"scores": "quality"}).train["chosen"]
        assert set(chosen) == {" good"}


@pytest.mark.parametrize("missing", [None, float("nan"), "", "n/a"])
def test_a_row_with_a_missing_score_is_dropped(tmp_path, tokenizer, missing):
    rows = [{"prompt": f"q {n}", "answers": ["b", "a"], "scores": [1, 2 if n else missing]} for n in range(60)]
    assert prepared(tokenizer, write_lines(tmp_path / "rows.jsonl", rows)).dropped == {"an answer has no score": 1}
    inside = [
        {"prompt": f"q {n}", "answers": [{"text": "b", "rank": 2}, {"text": "a"} | ({"rank": 1} if n else {})]}
        for n in range(60)
    ]
    assert prepared(tokenizer, write_lines(tmp_path / "inside.jsonl", inside)).dropped == {"an answer has no score": 1}


def test_pairs_that_part_before_the_last_turn_are_none():
    one, other = (
        [*ASKED, message("assistant", text), *ASKED, SAID[side]] for text, side in (("x", "chosen"), ("y", "rejected"))
    )
    for row in (
        {"chosen": one, "rejected": other},
        {"conversation_a": one, "conversation_b": other, "winner": "model_a"},
    ):
        with pytest.raises(DataError, match="answer different prompts"):
            read(None, row)


# What is wrong with a row


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        ("shp", {**SHP, "labels": 2}, "'labels' is neither 0 nor 1"),
        ("shp", {**SHP, "labels": "one"}, "'labels' is neither 0 nor 1"),
        ("shp", {**SHP, "labels": True}, "'labels' is neither 0 nor 1"),
        ("shp", {**SHP, "score_A": "many"}, "'score_A' is not a number"),
        ("shp", {**SHP, "score_A": float("nan")}, "'score_A' is not a number"),
        ("shp", {**SHP, "labels": 0}, "prefers the reply with the lower score"),
        ("shp", {**SHP, "human_ref_A": 3}, "'human_ref_A' is not text"),
        ("ultrafeedback", {**ULTRA, "score_chosen": "nine"}, "'score_chosen' is not a number"),
        ("summarize-from-feedback", {**SUMMARY, "choice": 2}, "'choice' is neither 0 nor 1"),
        ("summarize-from-feedback", {**SUMMARY, "summaries": [{"text": "a"}]}, "does not hold two summaries"),
        ("summarize-from-feedback", {**SUMMARY, "info": "post"}, "'info' is not a mapping"),
        ("ranked", {**RANKED, "answers": ["one"]}, "does not list two or more answers"),
        ("ranked", {**RANKED, "answers": ["one", 2]}, "an answer in 'answers' is not text"),
        ("ranked", {**RANKED, "scores": [1]}, "does not hold a number for each"),
        ("ranked", {**RANKED, "scores": [1, 2, "three"]}, "an answer has no score"),
        ("ranked", {**RANKED, "scores": [1, 2, None]}, "an answer has no score"),
        ("ranked", {**RANKED, "scores": [1, 2, float("nan")]}, "an answer has no score"),
        ("alpaca", {"instruction": "do"}, "no field 'completion'"),
    ],
)
def test_a_row_that_is_malformed_is_refused_with_the_reason(source, row, reason):
    with pytest.raises(DataError, match=reason):
        read(source, row)


@pytest.mark.parametrize("source", [name for name in ROWS if name != "alpaca"])
def test_one_bad_row_is_dropped_with_its_line_and_all_bad_rows_are_an_error(tmp_path, tokenizer, source, caplog):
    bad = {name: [] for name in ROWS[source]}
    path = write_lines(tmp_path / "rows.jsonl", [bad])
    with pytest.raises(DataError, match=r"not one usable row of 1: .*rows.jsonl:1 has ") as error:
        prepared(tokenizer, path, source=source)
    assert "\n" not in str(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.data())
def test_no_row_of_any_types_crashes_a_source(data):
    """A hostile value in place of any field is a preference or a reason, never another exception."""
    source = data.draw(st.sampled_from(sorted(ROWS)))
    row = {**ROWS[source], data.draw(st.sampled_from(sorted(ROWS[source]))): data.draw(values)}
    try:
        examples = read(source, row)
    except DataError:
        return
    assert all(isinstance(example.chosen.text, str) for example in examples)


# Several paths, and other data for SFT


def test_several_paths_are_one_dataset_reported_by_part(tmp_path, tokenizer):
    first = write_lines(tmp_path / "a.jsonl", [hh(n) for n in range(40)])
    second = write_lines(
        tmp_path / "b.jsonl", [{**SHP, "history": f"post {n}"} for n in range(30)] + [{**SHP, "labels": 7}]
    )
    found = prepared(tokenizer, [first, second])
    assert [dict(part) for part in found.parts] == [
        {"path": str(first), "source": "hh-rlhf", "rows": 40, "kept": 40, "dropped": 0},
        {"path": str(second), "source": "shp", "rows": 31, "kept": 30, "dropped": 1},
    ]
    (entry,) = map(json.loads, found.dropped_rows.read_text().splitlines())
    assert (entry["file"], entry["line"]) == (str(second), 31)


def test_a_path_without_a_test_split_gives_its_share_though_another_brings_one(tmp_path, tokenizer):
    for split, numbers in (("train", range(40)), ("test", range(40, 43))):
        write_lines(tmp_path / "hh" / f"{split}.jsonl", [hh(n) for n in numbers])
    other = write_lines(tmp_path / "other.jsonl", [hh(n) for n in range(100, 200)])
    found = prepared(tokenizer, [tmp_path / "hh", other])
    questions = {int(prompt.split()[2]) for prompt in found.test["prompt"]}
    assert {40, 41, 42} < questions and questions - {40, 41, 42} <= set(range(100, 200))


def test_sft_learns_other_data_but_no_dialogue_that_the_pairs_hold_out(tmp_path, tokenizer):
    path = write_lines(tmp_path / "pairs.jsonl", [hh(n) for n in range(60)])
    tasks = [{"instruction": f"question {n}", "input": "", "output": f"answer {n}"} for n in range(100)]
    other = write_lines(tmp_path / "alpaca.jsonl", tasks)
    section = DataSection(
        path=str(path), validation_share=0.2, test_share=0.2, sft=SFTDataSection(path=str(other), source="alpaca")
    )
    pairs = prepare(section, tokenizer)
    found = prepare_replies(section, tokenizer, pairs)
    held_out = {prompt for split in ("validation", "test") for prompt in getattr(pairs, split)["prompt"]}
    assert not held_out & set(found.train["prompt"]) and set(pairs.validation["prompt"]) < set(
        found.validation["prompt"]
    )
    assert sum(found.kept.values()) == 100 - pairs.kept["test"] == 100 - sum(found.dropped.values())
    assert set(found.kept) == {"train", "validation"}
    row = sft_rows(found.train)[0]
    assert tokenizer.decode([label for label in row["labels"] if label != -100]).startswith(" answer ")
    assert prepare_replies(DataSection(path=str(path)), tokenizer, pairs) is pairs


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files")
def test_real_alpaca_rows_are_replies_to_learn():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "llama2")
    sft = SFTDataSection(path=str(SHARED / "data" / "sft" / "alpaca-2000.json"))
    section = DataSection(
        path=str(PREFERENCE / "instruction-preference-1100.json"), sft=sft, format="alpaca", **UNLIMITED
    )
    found = prepare_replies(section, tokenizer, prepare(section, tokenizer))
    assert (found.rows, sum(found.kept.values()), found.dropped) == (2000, 2000, {})
    for split in SPLITS[:2]:
        assert all(prompt.endswith("\n\n### Response:\n") for prompt in getattr(found, split)["prompt"])
