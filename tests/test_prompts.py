"""Prompt files of the known formats, what is wrong with others, and prompts as judges read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.data.format import Dialogue, Format
from alignlab.data.prompts import BENIGN, HARMFUL, as_transcript, describe_sets, read_prompts, texts_of, turns_of
from alignlab.data.transcript import ASSISTANT, Turn, join_turns
from alignlab.errors import DataError

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = st.text("abc .?\n", min_size=1, max_size=20).map(str.strip).filter(bool)


@pytest.fixture
def form(tokenizer) -> Format:
    return Format("hh", tokenizer)


@pytest.fixture
def file(tmp_path):
    """A function: rows → a .jsonl file of them; a text → a .csv file."""

    def write(rows, name="mine"):
        path = tmp_path / f"{name}.{'csv' if isinstance(rows, str) else 'jsonl'}"
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def labels(found):
    return [prompt.label for prompt in found.prompts]


@pytest.mark.parametrize(
    ("name", "known_as", "count", "harmful"),
    [
        ("mt_bench_questions.jsonl", "MT-Bench", 80, 0),
        ("xstest_prompts.csv", "XSTest", 450, 200),
        ("advbench_harmful_behaviors.csv", "AdvBench", 520, 520),
        ("strongreject.csv", "StrongREJECT", 313, 313),
    ],
)
def test_the_known_files_are_recognised(name, known_as, count, harmful, shared, form):
    found = read_prompts(shared / "data/prompts" / name, form, 10_000)
    assert (found.known_as, len(found.prompts), labels(found).count(HARMFUL)) == (known_as, count, harmful)
    if known_as == "XSTest":
        assert labels(found).count(BENIGN) == 250


def test_a_prompt_reads_as_in_training(file, form, tokenizer):
    (prompt,) = read_prompts(file([{"prompt": "Hello there"}]), form, 100).prompts
    assert prompt.transcript == "\n\nHuman: Hello there\n\nAssistant:" == tokenizer.decode(prompt.ids)


def test_the_first_turn_of_mt_bench_is_asked(file, form):
    (prompt,) = read_prompts(file([{"turns": ["one", "two"]}]), form, 100).prompts
    assert prompt.transcript == "\n\nHuman: one\n\nAssistant:" and prompt.label is None


def test_labels_in_other_words(file, form):
    found = read_prompts(file("prompt,label\na,Safe\nb,unsafe\nc,0\nd,1\n"), form, 100)
    assert labels(found) == [BENIGN, HARMFUL, BENIGN, HARMFUL] and found.labelled(HARMFUL) == [1, 3]


def test_xstest_without_labels_goes_by_its_types(file, form):
    found = read_prompts(file("id,prompt,type,focus\n1,a,homonyms,x\n2,b,contrast_homonyms,x\n"), form, 100)
    assert labels(found) == [BENIGN, HARMFUL]


@pytest.mark.parametrize(
    ("row", "asks"),
    [
        ({"Question": "Why?"}, "Why?"),
        ({"query": "Why?", "id": 1}, "Why?"),
        ({"prompt": {"text": "Why?", "toxicity": 0.1}}, "Why?"),
        ({"prompt": [{"role": "user", "content": "Why?"}]}, "Why?"),
        ({"messages": [{"from": "human", "value": "Why?"}]}, "Why?"),
        ({"instruction": "Spell it.", "input": "freind", "output": "friend"}, "Spell it.\n\nfreind"),
        ({"context": "Ann met Bo.", "question": "Who was late?", "label": 2}, "Who was late?\n\nAnn met Bo."),
        ({"system": "Be kind.", "prompt": "Why?"}, "Be kind.\n\nWhy?"),
        ({"text": "Why?"}, "Why?"),
    ],
)
def test_any_usual_column_is_asked_with_what_stands_beside_it(row, asks, file, form):
    (prompt,) = read_prompts(file([row]), form, 200).prompts
    assert prompt.transcript == f"\n\nHuman: {asks}\n\nAssistant:" and prompt.label is None


def test_an_input_has_its_own_section_in_alpacas_format(file, tokenizer):
    row = {"instruction": "Spell it.", "input": "freind"}
    (prompt,) = read_prompts(file([row]), Format("alpaca", tokenizer), 500).prompts
    assert tokenizer.decode(prompt.ids).endswith("### Input:\nfreind\n\n### Response:\n")


def test_a_column_of_another_name_is_named(file, form):
    rows = [{"frage": "Why?", "prompt": "no"}]
    (prompt,) = read_prompts(file(rows), form, 100, "frage").prompts
    assert prompt.transcript == "\n\nHuman: Why?\n\nAssistant:"
    with pytest.raises(DataError, match=r"no column 'fragen' among frage, prompt; did you mean 'frage'"):
        read_prompts(file(rows), form, 100, "fragen")
    assert texts_of(file(rows), "frage") == ["Why?"]


BBQ = {"context": "Ann met Bo.", "question": "Who?", "ans0": "Ann", "ans1": "Bo", "ans2": "Unknown"}


@pytest.mark.parametrize(
    ("name", "rows", "known_as", "told"),
    [
        ("bbq", [{**BBQ, "question": f"Who {n}?", "label": n} for n in range(3)], "BBQ", [None] * 3),
        ("topics", [{"prompt": "a", "label": 0}, {"prompt": "b", "label": 1}], "prompts", [None, None]),
        ("topics", [{"prompt": "a", "label": "law"}], "prompts", [None]),
        ("mine", [{"prompt": "a", "harmful": 0}, {"prompt": "b", "harmful": 1}], "labelled prompts", [BENIGN, HARMFUL]),
        ("behaviors", [{"Behavior": "b", "SemanticCategory": "x"}], "HarmBench", [HARMFUL]),
        ("harmful-behaviors", [{"Goal": "g", "Behavior": "b"}], "JailbreakBench", [HARMFUL]),
        ("benign-behaviors", [{"Goal": "g", "Behavior": "b"}], "JailbreakBench", [BENIGN]),
    ],
)
def test_a_label_means_harm_only_where_values_or_file_say_so(name, rows, known_as, told, file, form):
    found = read_prompts(file(rows, name), form, 200)
    assert (found.known_as, labels(found)) == (known_as, told)


def test_what_cannot_be_asked_is_counted(file, form):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b " * 200}, {"prompt": "x\n\nHuman: y"}]
    found = read_prompts(file(rows), form, 50)
    reasons = {"the same prompt again", "longer than the model takes", "a turn holds the beginning of another turn"}
    assert len(found.prompts) == 1 and set(found.left_out) == reasons
    assert "1 the same prompt again" in next(describe_sets([found]))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text_a": "x", "text_b": "y"}], "no column of prompts among text_a, text_b"),
        ("prompt,label\na,safe\nb,perhaps\n", "label is 'perhaps', and not one of"),
        ([{"prompt": 3}], "neither text nor a list of messages"),
        ([{"turns": []}], "neither text nor a list of messages"),
        ([{"prompt": ""}, {"prompt": " "}], "none of its 2 prompts can be asked (the prompt is empty)"),
        ([], "holds no prompts"),
        ([{"prompt": "long " * 90}], "none of its 1 prompts can be asked (longer than the model takes)"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(rows, said, file, form):
    with pytest.raises(DataError) as caught:
        read_prompts(file(rows), form, 50)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path, form):
    with pytest.raises(DataError, match="no such file of prompts"):
        read_prompts(tmp_path / "x.csv", form, 50)


@given(texts=st.lists(WORDS, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2))
@pytest.mark.parametrize("name", ["hh", "chat", "alpaca"])
def test_any_way_of_writing_is_read_back_as_the_dialogue(name, texts, tokenizer):
    form = Format(name, tokenizer, TEMPLATE if name == "chat" else None)
    turns = [Turn(("Human", "Assistant")[i % 2], f" {text}") for i, text in enumerate(texts)]
    assert as_transcript(form, form.prompt(Dialogue(turns))) == join_turns(turns) + ASSISTANT


def test_a_system_turn_is_shown_to_the_judge(tokenizer):
    form = Format("chat", tokenizer, TEMPLATE)
    prompt = form.prompt(Dialogue([Turn("Human", " Hi")], "Be kind."))
    assert as_transcript(form, prompt) == "\n\nHuman: Be kind.\n\nHi\n\nAssistant:"


def test_a_prompt_written_in_another_way_stays_as_it_is(tokenizer):
    assert as_transcript(Format("chat", tokenizer, TEMPLATE), "### Input: x") == "### Input: x"


def test_turns_are_counted():
    assert turns_of("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:") == 2 and turns_of("plain") == 1
