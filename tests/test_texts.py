"""The laws of signs in single texts: each planted fault is found, plain writing is not, hostile text costs no more."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.prepare import prepare
from alignlab.doctor import scan
from alignlab.doctor.damage import find_damage, look
from alignlab.doctor.texts import (
    COLUMNS,
    EXCERPT,
    excerpt,
    find_control,
    find_cut,
    find_mojibake,
    find_nothing,
    find_one_word,
    find_role_word,
    find_role_word_in_turns,
    signs,
)
from alignlab.recipe import fields
from alignlab.recipe import load as recipe
from alignlab.recipe.load import DataSection
from alignlab.text.safe import UNSAFE

UNLIMITED = {"max_prompt_tokens": 10**6, "max_reply_tokens": 10**6}
MIB = 2**20
texts = st.text(max_size=300)
odd = st.text(st.sampled_from("\x00\x1b\u200b\u200d\u202e\ufeff\ufffdHuman:\n AÂÃ©’.<|>[/INST]#-1"), max_size=80)


def hh(question, chosen, rejected):
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepares pairs of question, chosen and rejected reply, and enough others that hold no sign."""

    def make(*pairs, others=30, **settings):
        plain = [(f"question {number}", "Yes, indeed.", "No, never.") for number in range(others)]
        rows = [hh(*pair) for pair in (*pairs, *plain)]
        path = tmp_path / f"rows{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        shares = {"validation_share": 0.2, "test_share": 0.2}
        return prepare(DataSection(source="hh-rlhf", path=str(path), **shares, **UNLIMITED, **settings), tokenizer)

    return make


def real(shared, tokenizer, path, source=None):
    section = DataSection(source=source, path=str(shared / "data" / path), test_share=0.2, **UNLIMITED)
    return prepare(section, tokenizer)


def by_name(findings):
    return {finding.name: finding for finding in findings}


# Single texts


@pytest.mark.parametrize(
    "text",
    [
        " Human: yes",
        "Yes.\nHuman: thanks",
        "Yes.\n\nHuman",
        "Yes.\n  user: thanks",
        "ASSISTANT : yes",
        "### Response: yes",
        "Yes.\n\n### Human: thanks",
        "Yes.</s> More",
        "Yes.<|im_end|>",
        "[INST] more [/INST]",
        "<<SYS>> be kind",
        "a <start_of_turn> b",
    ],
)
def test_a_role_at_a_lines_start_or_a_marker_is_found(text):
    start, end = find_role_word(text)
    assert re.search(r"human|user|assistant|response|s>|im_end|INST|SYS|turn", text[start:end], re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        "As a human: I agree.",
        "I am Human",
        "Humanity: a history",
        "The system: one of many",
        "### Instructions\nMix well.",
        "a < b | c > d",
        "the list[int] type",
        "superuser: root",
        "Human",
    ],
)
def test_the_same_words_in_a_sentence_are_text(text):
    assert find_role_word(text) is None


def test_the_turns_of_a_transcript_are_its_format_and_no_sign():
    clean = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant:"
    twice = "\n\nHuman: Hi\n\nAssistant: Human: Hello.\n\nHuman: Who?\n\nAssistant:"
    assert find_role_word_in_turns(clean, "hh", frozenset()) is None
    start, end = find_role_word_in_turns(twice, "hh", frozenset())
    assert twice[start:end] == " Human:" and start == twice.index(" Human: Hello")


def test_the_sections_of_alpaca_are_its_format_and_no_sign():
    prompt = "Below is …\n\n### Instruction:\nAdd.{}\n\n### Input:\n1 1\n\n### Response:\n"
    assert find_role_word_in_turns(prompt.format(""), "alpaca", frozenset()) is None
    assert find_role_word_in_turns(prompt.format("\nUser: and you?"), "alpaca", frozenset())


def test_what_all_prompts_of_a_chat_template_share_is_the_templates_own():
    own = frozenset({"User:"})
    assert find_role_word_in_turns("<|im_start|>\nUser: Hi\n", "chat", own) is None
    assert find_role_word_in_turns("<|im_start|>\nUser: Hi\nHuman: Ho", "chat", own)


@pytest.mark.parametrize("text", ["it was cooled to 2Â°C", "MÃ¼nchen", "donâ€™t", "lost \ufffd letter"])
def test_mojibake_is_found(text):
    start, end = find_mojibake(text)
    assert not text[start:end].isascii()


@pytest.mark.parametrize(
    "text", ["don’t", "München – 2 °C", "naïve “quotes” …", "日本語", "Привет", "ação", "👍🏽", "हिन्दी"]
)
def test_good_writing_of_other_languages_is_no_mojibake(text):
    assert find_mojibake(text) is None


@pytest.mark.parametrize(
    "text",
    ["a\x00b", "\x1b[2J", "a\x7f", "Porter\x92s", "\u202eevil", "\u2066x", "\ufeffBOM", "a\u200bb", "a\u200b\u200bb"],
)
def test_characters_that_cannot_be_seen_are_found(text):
    start, end = find_control(text)
    assert not text[start:end].isprintable()


@pytest.mark.parametrize(
    "text", ["a\tb\r\nc\n", "👩\u200d💻 codes", "می\u200cخواهم", "क्\u200dष", "ไทย\u200bไทย", "so\u00adft"]
)
def test_joiners_where_they_are_spelling_are_left_alone(text):
    assert find_control(text) is None


def test_a_reply_without_a_letter_or_digit_says_nothing():
    assert all(find_nothing(text) for text in (" ...", " ?", " :-(", "\u200b", "👍"))
    assert not any(find_nothing(text) for text in (" 7", " a", " 是"))


def test_one_word_is_told_where_words_are_written_apart():
    assert find_one_word(" Yes.") and find_one_word("42")
    assert not any(find_one_word(text) for text in ("Oh yes.", " ...", "我不知道你在说什么", "x" * (EXCERPT + 1)))


@pytest.mark.parametrize(
    "text, cut",
    [
        ("one two three four five six seven eight", True),
        ("one two three four five six seven eight,", True),
        ("one two three four five six seven (", True),
        ("one two three four five six seven eight.", False),
        ("one two three four five six seven “eight”", False),
        ("one two three four five six seven :-)", False),
        ("一 二 三 四 五 六 七 八。", False),
        ("one two three four five six seven", False),
        ("one two three four five six:\n- seven\n- eight", False),
        ("one two three four five six:\n1. seven\n2. eight", False),
        ("one two three four five six seven https://x.org/eight", False),
    ],
)
def test_a_reply_is_cut_where_it_stops_as_no_sentence_does(text, cut):
    assert bool(find_cut(text)) is cut


# All pairs


def test_planted_faults_are_counted_in_pairs_and_by_column(prepared):
    pairs = prepared(
        ("a", "Sure.\nHuman: thanks", "No."),
        ("b", "Yes.", "No.</s> More"),
        ("c\nUser: d", "Yes, it is.", "No, it is not."),
        ("d", "MÃ¼nchen it is.", "It is MÃ¼nchen."),
        ("e", "It is \x1b[2J here.", "It is there."),
        ("f", "It is here.", "..."),
        ("g", "I’m sorry, but I can’t help with that.", "Here is how it is done."),
        ("h", "Here is how it is done.", "I can't help with that."),
        ("i", "I can't help with that.", "I won't help you."),
        ("j", "There are many of them and all are", "There is one and no more."),
    )
    found = by_name(find_damage(pairs, "hh"))
    assert {name: finding.count for name, finding in found.items()} == {
        "role-words": 1,
        "role-words-rejected": 1,
        "role-words-prompts": 1,
        "mojibake": 1,
        "control-characters": 1,
        "empty-replies": 1,
        "messages-in-replies": 0,
        "one-word-replies": 2,  # Yes. and No.
        "refusal-only-replies": 3,
        "cut-off-replies": 1,
        "refusals-preferred": 1,
        "refusals-rejected": 1,
    }
    assert "1 pair: in 0 prompts, 1 chosen reply and 1 rejected reply" in found["mojibake"].says
    assert "2 chosen replies and 2 rejected replies" in found["refusal-only-replies"].says
    assert "0.5, 95 % interval" in found["refusals-preferred"].says
    assert all(finding.of == 40 for finding in found.values())
    assert found["control-characters"].shown[0].what == "chosen: It is ⟨U+001B⟩[2J here."


def test_what_is_not_there_is_said_with_a_count_of_zero(prepared):
    findings = find_damage(prepared(), "hh")
    assert [finding.count for finding in findings] == [0] * 12
    assert all(not finding.shown and finding.says.endswith(".") and finding.advice for finding in findings)


def test_three_pairs_are_shown_and_lie_where_they_are_said_to(prepared):
    pairs = prepared(*[(f"planted {number}", f"Fault\x07{number} is here.", "It is not.") for number in range(9)])
    finding = by_name(find_damage(pairs, "hh"))["control-characters"]
    assert finding.count == 9 and len(finding.shown) == 3
    for split, number, what in finding.shown:
        assert what == f"chosen: {getattr(pairs, split)[number]['chosen'].strip()}".replace("\x07", "⟨U+0007⟩")


def test_replies_that_preparation_has_cut_are_said_apart(tmp_path, tokenizer):
    rows = [hh(f"question {number}", "word " * 60, "No, never.") for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = {"max_reply_tokens": 60, "long_replies": "cut", "validation_share": 0.2, "test_share": 0.2}
    cut = prepare(DataSection(source="hh-rlhf", path=str(tmp_path / "rows.jsonl"), **limits), tokenizer)
    finding = by_name(find_damage(cut, "hh"))["cut-off-replies"]
    assert finding.count == 30
    assert finding.says.endswith("Preparation itself cut 30 replies at data.max_reply_tokens.")


def test_a_role_that_all_prompts_begin_with_is_their_template(prepared):
    alike = [(f"User: question {number}", "Yes, indeed.", "No, never.") for number in range(40)]
    every = find_damage(prepared(*alike, others=0, format="plain"), "plain")
    assert by_name(every)["role-words-prompts"].count == 0
    some = find_damage(prepared(*alike, others=10, format="plain"), "plain")
    assert by_name(some)["role-words-prompts"].count == 40


def test_a_preference_for_refusing_is_doubtful_once_its_interval_lies_above_the_limit(prepared):
    refusing = [(f"do {number}", "I can't help with that.", "Here is how.") for number in range(40)]
    found = by_name(find_damage(prepared(*refusing), "hh"))
    assert (found["refusals-preferred"].level, found["refusals-rejected"].level) == ("doubtful", "note")
    few = by_name(find_damage(prepared(*refusing[:2]), "hh"))
    assert few["refusals-preferred"].level == "note"


def test_findings_do_not_depend_on_the_number_of_processes(prepared, monkeypatch):
    pairs = prepared(*[(f"q {n}", f"Fault\x07{n}.\nUser: x" * (n % 3), "Human: no") for n in range(1500)])
    alone = find_damage(pairs, "hh")
    monkeypatch.setattr(scan, "SERIAL_PAIRS", 0)
    monkeypatch.setattr(scan, "spare_processes", lambda most: 2)
    assert find_damage(pairs, "hh") == alone


def test_a_setting_named_in_the_advice_is_a_real_one():
    settings = fields.library_settings()
    for rule in signs("hh", frozenset()):
        for section, key in re.findall(r"\b(data|dpo|sft)\.(\w+)", f"{rule.advice} {rule.says}"):
            assert key in (settings[section] if section != "data" else recipe.DataSection.__dataclass_fields__)


# Real data: what these rules find in it, by hand where they are few


def test_harmless_base_holds_doubled_labels_empty_replies_and_prefers_refusing(shared, tokenizer):
    found = by_name(find_damage(real(shared, tokenizer, "hh-rlhf/harmless-base.test.jsonl.gz", "hh-rlhf"), "hh"))
    assert {name: finding.count for name, finding in found.items()} == {
        "role-words": 18,
        "role-words-rejected": 16,
        "role-words-prompts": 21,
        "mojibake": 0,
        "control-characters": 0,
        "empty-replies": 5,
        "messages-in-replies": 0,
        "one-word-replies": 53,
        "refusal-only-replies": 66,
        "cut-off-replies": 246,
        "refusals-preferred": 85,
        "refusals-rejected": 24,
    }
    assert found["refusals-preferred"].level == "doubtful"


def test_helpful_base_prefers_answers(shared, tokenizer):
    found = by_name(find_damage(real(shared, tokenizer, "hh-rlhf/helpful-base.test.jsonl.gz", "hh-rlhf"), "hh"))
    assert {name: finding.count for name, finding in found.items()} == {
        "role-words": 7,
        "role-words-rejected": 18,
        "role-words-prompts": 10,
        "mojibake": 0,
        "control-characters": 0,
        "empty-replies": 0,
        "messages-in-replies": 0,
        "one-word-replies": 41,
        "refusal-only-replies": 12,
        "cut-off-replies": 214,
        "refusals-preferred": 8,
        "refusals-rejected": 33,
    }
    assert found["refusals-rejected"].level == "doubtful"


def test_ultrafeedback_holds_markers_in_rejected_replies_and_a_little_mojibake(shared, tokenizer):
    found = by_name(find_damage(real(shared, tokenizer, "preference/ultrafeedback-1000.jsonl"), "hh"))
    assert [found[name].count for name in ("role-words", "role-words-rejected", "role-words-prompts")] == [1, 9, 2]
    assert [found[name].count for name in ("mojibake", "control-characters", "empty-replies")] == [2, 2, 1]
    assert any("2Â°C" in shown.what for shown in found["mojibake"].shown)


# Any text


@settings(max_examples=150, deadline=None)
@given(texts | odd, texts | odd, texts | odd, st.sampled_from(["hh", "alpaca", "chat", "plain"]))
def test_every_sign_takes_any_text_and_points_into_it(prompt, chosen, rejected, format):
    prompt = f"\n\nHuman:{prompt}\n\nAssistant:" if format == "hh" else prompt
    pair = dict(zip(COLUMNS, (prompt, chosen, rejected), strict=True))
    for rule in signs(format, frozenset()):
        for column in rule.columns:
            span = rule.find(pair[column])
            assert span is None or 0 <= span[0] <= span[1] <= len(pair[column])
    tally = look({column: [text] for column, text in pair.items()}, format, frozenset())
    assert all(count == 1 for count in tally.pairs.values())
    assert not tally.pairs or set(tally.pairs) == {name for name, _ in tally.texts}


@settings(max_examples=200, deadline=None)
@given(texts | odd, st.data())
def test_an_excerpt_is_one_printable_line(text, data):
    start = data.draw(st.integers(0, len(text)))
    shown = excerpt(text, start, min(start + 1, len(text)))
    assert not UNSAFE.search(shown) and "\n" not in shown
    assert len(shown) <= EXCERPT * len(r"\U0010ffff") + 2


PIECES = ["a", " ", "\n", "“", '"', "a b\n", "Ã", "\u200b", "é\u200d", "<|", "#", "- ", "Human:", "?", "’ t"]


@pytest.mark.parametrize("piece", PIECES)
def test_a_reply_of_ten_megabytes_takes_seconds_and_not_hours(piece):
    """Under two seconds on a quiet core; the limit leaves room for a busy one."""
    text = piece * (10 * MIB // len(piece))
    began = time.process_time()
    tally = look({"prompt": ["\n\nHuman: hi\n\nAssistant:"], "chosen": [text], "rejected": ["No."]}, "hh", frozenset())
    assert time.process_time() - began < 6
    assert set(tally.pairs.values()) == {1}  # No. is one word
