"""Small inputs that people bring, and what is right for each: one row of the table an input of tests/cases."""

import logging
from pathlib import Path

import pytest

from alignlab.data.files import read_file
from alignlab.data.layouts import find_reader
from alignlab.data.prepare import prepare, prepare_replies
from alignlab.doctor.reading import reading_findings
from alignlab.errors import DataError
from alignlab.recipe.load import DataSection, SFTDataSection

CASES = Path(__file__).parent / "cases"
GARDEN = " How do I grow tomatoes number 0?"
GOOD = " Of course! Find the broken part first, then test it. (tomatoes 0)"
BAD = " I am busy. Go away now. (tomatoes 0)"
BREAD = " How do I bake bread number 0 at home on day 0?"
MIX = " Mix flour, water and yeast, wait 3 hours and bake it hot for 20 minutes."
SHOPS = " I would not know about bread, try 0 shops."
ALPACA = (
    " Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nHow do I grow tomatoes number 0?\n\n### Response:\n"
)

# input → (layout, system text, what is said up to the reply, chosen, rejected) of its first sound row
READ = {
    "02-split-names/names/hh_train.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "02-split-names/uf/train_prefs.jsonl": ("ultrafeedback", None, [GARDEN], GOOD, BAD),
    "03-system-column/pairs.jsonl": (
        "pairs",
        "You are the gardener of house 0. Answer in rhyme.",
        [GARDEN],
        GOOD,
        BAD,
    ),
    "03-system-column/question.jsonl": ("pairs", "You are the gardener of house 0.", [GARDEN], GOOD, BAD),
    "04-history-tools/history.jsonl": (
        "pairs",
        None,
        [GARDEN, GOOD, " And how long does that take for bed 0?"],
        " About 0 days.",
        " No idea 0.",
    ),
    "05-reasoning-field/pairs.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "06-content-parts/pairs.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "07-roles/human-assistant.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "07-roles/sharegpt.jsonl": ("pairs", "Be brief.", [GARDEN], GOOD, BAD),
    "08-json-text/pairs.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "10-bom/pairs.json": ("pairs", None, [GARDEN], GOOD, BAD),
    "10-bom/semicolon.csv": ("pairs", None, [GARDEN], GOOD, BAD),
    "13-end-of-turn/yes.jsonl": ("pairs", None, [GARDEN], " Yes.", " No way."),
    "26-layouts/capital.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "26-layouts/two-responses.jsonl": ("two-responses", None, [GARDEN], GOOD, BAD),
    "26-layouts/kto.jsonl": ("kto", None, [GARDEN], GOOD, None),
    "27-sft-chat/messages.jsonl": ("messages", None, [GARDEN], GOOD, None),
    "27-sft-chat/prompt-completion.jsonl": ("prompt-completion", None, [GARDEN], GOOD, None),
    "44-alpaca-stop/teach.jsonl": ("pairs", None, [ALPACA], " Yes.\n\n### Instruction:\nMore?", " No."),
    "45-empty/empty-prompts.jsonl": ("pairs", None, [GARDEN], GOOD, BAD),
    "50-ranked/responses_ratings.jsonl": ("ranked", None, [BREAD], MIX, SHOPS),
    "52-ranking-columns/lf_alpaca_ranking_history.jsonl": (
        "pairs",
        "Be kind.",
        [" Hi", " Hello", BREAD],
        MIX,
        SHOPS,
    ),
}

# input → rows kept, and rows dropped by reason, of the dozen that stand in tests/cases
COUNTED = {
    "09-first-row/prompt-null.jsonl": (11, {"no field 'prompt'": 1}),
    "45-empty/empty-prompts.jsonl": (4, {"the prompt is empty": 6, "no field 'chosen'": 1, "a reply is empty": 1}),
}


def reader_of(case):
    rows = [row.fields for row in read_file(CASES / case)]
    return rows, find_reader(rows, None, {})


def read(tokenizer, case, template=None, **settings):
    shares = {"validation_share": 0.3, "test_share": 0.3}
    return prepare(DataSection(path=str(CASES / case), **shares | settings), tokenizer, template)


@pytest.mark.parametrize("case", READ)
def test_an_input_is_read_as_what_it_holds(case):
    source, system, asked, chosen, rejected = READ[case]
    rows, reader = reader_of(case)
    (example,) = reader.read(rows[0], DataSection())
    assert reader.source == source
    assert (example.dialogue.system, [turn.text for turn in example.dialogue.turns]) == (system, asked)
    assert example.chosen.text == chosen and (example.rejected and example.rejected.text) == rejected


@pytest.mark.parametrize("case", COUNTED)
def test_an_odd_row_is_dropped_and_counted(case, tokenizer):
    kept, dropped = COUNTED[case]
    found = read(tokenizer, case)
    assert (sum(found.kept.values()), found.dropped) == (kept, dropped)


def test_reasoning_is_read_with_the_reply():
    rows, reader = reader_of("05-reasoning-field/pairs.jsonl")
    (example,) = reader.read(rows[0], DataSection())
    assert example.chosen.reasoning == "They ask about thing 0; be kind."


def test_unpaired_labels_keep_theirs_and_are_named(tokenizer):
    rows, reader = reader_of("26-layouts/kto.jsonl")
    labels = [example.label for row in rows for example in reader.read(row, DataSection())]
    assert labels == [True, False] * 6
    with pytest.raises(DataError, match=r"unpaired labels .* KTO learns from"):
        read(tokenizer, "26-layouts/kto.jsonl")


@pytest.mark.parametrize("case", ["27-sft-chat/messages.jsonl", "27-sft-chat/prompt-completion.jsonl"])
def test_sft_learns_from_messages_and_from_prompt_and_completion(case, tokenizer):
    pairs = DataSection(
        path=str(CASES / "50-ranked" / "responses_ratings.jsonl"),
        validation_share=0.3,
        test_share=0.3,
        sft=SFTDataSection(path=str(CASES / case)),
    )
    found = prepare_replies(pairs, tokenizer, prepare(pairs, tokenizer))
    assert found.rows == sum(found.kept.values()) == 12
    assert "How do I grow tomatoes number 0?" in "".join(found.train["prompt"][:] + found.validation["prompt"][:])
    with pytest.raises(DataError, match=r"replies to learn and no pairs; write data\.sft"):
        read(tokenizer, case)


def test_a_prompt_before_each_reply_is_a_finding(tokenizer):
    found = {one.name: one for one in reading_findings(read(tokenizer, "37-prompt-in-reply/pairs.jsonl"), str)}
    assert (found["prompt-in-reply"].level, found["prompt-in-reply"].count) == ("wrong", 12)
    clean = {one.name: one for one in reading_findings(read(tokenizer, "13-end-of-turn/yes.jsonl"), str)}
    assert clean["prompt-in-reply"].count == clean["not-read"].count == 0


def test_no_worse_answer_is_chosen(tokenizer):
    found = read(tokenizer, "50-ranked/responses_ratings.jsonl")
    assert all(chosen.startswith(" Mix flour") for chosen in found.train["chosen"])


def test_pairs_with_the_lower_rating_chosen_are_dropped(tokenizer):
    with pytest.raises(DataError, match=r"the rejected reply has the higher score \(12\); data\.source=pairs"):
        read(tokenizer, "51-ratings/argilla_inverted.jsonl")


def test_a_column_that_is_not_read_is_named(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        found = read(tokenizer, "26-layouts/two-responses.jsonl")
    assert found.not_read == {"safer_response_id": 12} and "not read: safer_response_id (12 rows)" in caplog.text


def test_every_input_is_held_by_a_test_here_or_among_the_splits():
    named = {*READ, *COUNTED, "37-prompt-in-reply/pairs.jsonl", "51-ratings/argilla_inverted.jsonl"}
    files = {path.relative_to(CASES).as_posix() for path in CASES.glob("*/**/*") if path.is_file()}
    others = {name for name in files - named if not name.startswith(("01-save-to-disk/", "02-split-names/", "runs/"))}
    assert not others
