"""The laws of layouts: what each kind of raw row means, which rows are refused and why, how kinds are told apart."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignlab.data import prepare, prepare_replies, sft_rows
from alignlab.data.layouts import LAYOUTS, find_reader
from alignlab.data.splits import SPLITS
from alignlab.errors import DataError
from alignlab.recipe import DataSection, SFTDataSection

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
