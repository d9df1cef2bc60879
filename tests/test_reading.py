"""Findings of reading: replies that hold their prompt, dialogues that part, what is not read, how much there is."""

import json

import pytest

from alignlab.data.prepare import prepare
from alignlab.doctor.damage import find_damage
from alignlab.doctor.reading import FEW_PAIRS, find_echoes, reading_findings
from alignlab.recipe.load import DataSection

SHARES = {"validation_share": 0.2, "test_share": 0.2}


@pytest.fixture
def found(tmp_path, tokenizer):
    """A function: files of rows → the findings, by name."""

    def find(*files):
        paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
        for path, rows in zip(paths, files, strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepared = prepare(DataSection(path=[str(path) for path in paths], **SHARES), tokenizer)
        return {one.name: one for one in (*reading_findings(prepared, str), *find_damage(prepared, "hh"))}

    return find


def pairs(count, word="question", chosen="Well.", rejected="Bad."):
    return [{"prompt": f"What of {word} {n} here?", "chosen": chosen, "rejected": rejected} for n in range(count)]


def test_clean_rows_are_told_only_that_they_are_few(found):
    named = {name for name, one in found(pairs(60)).items() if one.count}
    assert named <= {"few-pairs", "one-word-replies"}


def test_a_question_before_the_answer_is_wrong_where_it_is_the_rule(found):
    rows = pairs(60)
    for row in rows[:2]:
        row["chosen"] = f"{row['prompt']} {row['chosen']}"
    few = found(rows)["prompt-in-reply"]
    assert (few.count, few.level) == (2, "note")
    for row in rows[:40]:
        row["chosen"] = f"{row['prompt']}\n{row['chosen']}"
    many = found(rows)["prompt-in-reply"]
    assert (many.count, many.level, len(many.shown)) == (40, "wrong", 3)


def test_a_short_question_may_open_its_answer():
    batch = {"prompt": ["\n\nHuman: Hello!\n\nAssistant:"], "chosen": [" Hello! How are you?"], "rejected": [" Hello!"]}
    assert find_echoes(str, batch) == []


def test_dialogues_that_part_before_the_last_turn_are_counted(found):
    def said(middle):
        turns = (("user", "q"), ("assistant", middle), ("user", "and?"), ("assistant", f"end {middle}"))
        return [{"role": role, "content": text} for role, text in turns]

    rows = [{"chosen": said("x"), "rejected": said("y")} for _ in range(6)] + pairs(60)
    one = found(rows)["different-prompts"]
    assert (one.count, one.of, one.level) == (6, 66, "doubtful")


def test_what_is_not_read_is_a_finding(found):
    one = found([{**row, "sys": "Be kind."} for row in pairs(60)])["not-read"]
    assert one.count == 60 and "sys (60)" in one.says


def test_messages_that_are_no_whole_json_are_a_finding(found):
    cut = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "We'
    one = found(pairs(60, chosen=cut))["messages-in-replies"]
    assert (one.count, one.level) == (60, "wrong")


def test_the_advice_on_how_many_pairs_and_from_where_names_its_source(found):
    findings = found(pairs(100), pairs(9, "rice"))
    assert findings["few-pairs"].count == 109 < FEW_PAIRS and "the course on DPO" in findings["few-pairs"].says
    assert findings["unbalanced-sources"].count == 100 and "0.jsonl" in findings["unbalanced-sources"].says
    assert found(pairs(60), pairs(60, "rice"))["unbalanced-sources"].count == 0
