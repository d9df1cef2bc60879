"""Chat templates: those that TRL ships, and those that think, take settings, write the date or drop text."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

import chat_models as made
import pytest
import trl

from alignlab.data.format import FIXED_DAY, Dialogue, Format, training_template, with_settings
from alignlab.data.prepare import prepare
from alignlab.data.prompts import as_transcript
from alignlab.data.transcript import Turn
from alignlab.errors import DataError, ModelError
from alignlab.exports.chat import chat_template, reads_as_in_training
from alignlab.models import load as models
from alignlab.models.load import load_tokenizer
from alignlab.recipe.load import DataSection, load_recipe
from alignlab.recipe.show import without_effect
from alignlab.train.stages import prepare_data

SHIPPED = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
OWN = {file.stem: file.read_text() for file in SHIPPED if not file.stem.endswith("_training")}
FOR_IMAGES = {"idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm"}
TEXT = {name: template for name, template in OWN.items() if name not in FOR_IMAGES}
END = {  # where a template writes its model's EOS by name
    **dict.fromkeys(("cohere", "cohere2"), "<|END_OF_TURN_TOKEN|>"),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), "<｜end▁of▁sentence｜>"),
}
ASKED = Dialogue([Turn("Human", " Why?")])


def form_for(template: str, eos: str = "<eos>") -> Format:
    tokenizer = made.chat_tokenizer(template, eos=eos)
    return Format("chat", tokenizer, training_template(tokenizer, template))


def rows(path: Path, count: int = 12) -> Path:
    """Pairs of one and of two turns."""
    said = lambda who, what: {"role": who, "content": what}
    more = [said("assistant", "So."), said("user", "And?")]
    lines = []
    for n in range(count):
        prompt = [said("user", f"Why {n}?"), *(more if n % 2 else [])]
        lines.append({"prompt": prompt, "chosen": [said("assistant", "Yes.")], "rejected": [said("assistant", "No.")]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def usable(template: str, eos: str, file: Path) -> tuple[int, str]:
    """How many of a file's rows a template can write, and why it cannot write others."""
    tokenizer = made.chat_tokenizer(template, eos=eos)
    tokenizer.chat_template = training_template(tokenizer, template)
    section = DataSection(path=str(file), format="chat", max_prompt_tokens=8000, validation_share=0.3, test_share=0.3)
    try:
        found = prepare(section, tokenizer)
    except DataError as error:
        return 0, str(error)
    return sum(found.kept.values()), ", ".join(found.dropped)


def test_the_text_templates_that_trl_ships_can_be_trained_on(tmp_path):
    """All 35 of them: a row of one turn and of two, its end learned; of the six for images three take text as well."""
    file = rows(tmp_path / "rows.jsonl")
    found = {name: usable(template, END.get(name, "<eos>"), file) for name, template in OWN.items()}
    assert len(TEXT) >= 34 and {name for name in TEXT if found[name][0] < 12} == set()
    told = {name: why for name, (kept, why) in found.items() if not kept}
    assert set(told) == {"idefics3", "llava_next", "smolvlm"}
    for why in told.values():
        assert "the chat template drops what the user says; set model.chat_template" in why and "\n" not in why
    assert not [name for name in TEXT if not form_for(TEXT[name], END.get(name, "<eos>")).learns_end]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "nemotron_3_nano", "glm4moe"])
def test_a_template_that_cannot_be_trained_on_gives_way_to_trls_own(name, tmp_path, caplog):
    """R1's and Nemotron's open a thought in the prompt alone, GLM's ends no turn; Llama's, which TRL knows, stays."""
    folder = made.save_parrot(tmp_path, made.chat_tokenizer(OWN[name], eos=END.get(name, "<eos>")), "a", "b")
    section = dataclasses.replace(load_recipe("tiny").model, name=str(folder))
    with caplog.at_level(logging.INFO, "alignlab"):
        tokenizer = load_tokenizer(section)
        load_tokenizer(section)
    assert tokenizer.chat_template == (Path(trl.__file__).parent / f"chat_templates/{name}_training.jinja").read_text()
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: its chat template cannot be trained on; TRL's training template takes its place"
    ]
    assert training_template(tokenizer, OWN["llama3"]) == OWN["llama3"]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "nemotron_3_nano", "nemotron_3_ultra", "of nobody"])
def test_a_reply_closes_the_thought_that_its_prompt_opens(name):
    """Empty where the row has none, with the row's reasoning where it has, in a field or in the text."""
    form = form_for(OWN.get(name, made.OPENED), END.get(name, "<eos>"))
    prompt = form.prompt(ASKED)
    assert prompt.endswith("<think>\n") and form.writes_reasoning
    assert form.reply(ASKED, prompt, " Yes.") == "\n</think>\n\nYes."
    assert form.bare(form.reply(ASKED, prompt, " Yes.")) == "Yes."
    for reply in (
        form.reply(ASKED, prompt, " Yes.", "They ask."),
        form.reply(ASKED, prompt, " <think>\nThey ask.\n</think>\n\nYes."),
    ):
        assert reply.startswith("They ask.") and reply.endswith("Yes.") and reply.count("</think>") == 1
        assert "<think>" not in reply


def test_reasoning_is_handed_to_a_template_that_writes_it():
    form = form_for(made.THINK)
    prompt = form.prompt(ASKED)
    assert form.writes_reasoning and not form_for(made.CHATML).writes_reasoning
    assert form.reply(ASKED, prompt, " Yes.", "They ask.") == "<think>\nThey ask.\n</think>\n\nYes."
    assert form.reply(ASKED, prompt, " Yes.") == "<think>\n\n</think>\n\nYes."
    assert form.stops().opening == "<think>\n\n</think>\n\n"
    plain = form_for(made.CHATML)
    assert plain.reply(ASKED, plain.prompt(ASKED), " Yes.", "They ask.") == "Yes."
    earlier = Dialogue([*ASKED.turns, Turn("Assistant", " So.", "Hm."), Turn("Human", " And?")])
    assert "Hm." not in form.prompt(earlier) and "So." in form.prompt(earlier)


def test_tools_are_handed_to_a_template_that_writes_them():
    form, other = form_for(made.TOOLS), form_for(made.CHATML)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    asked = dataclasses.replace(ASKED, tools=[tool])
    assert '"name": "weather"' in form.prompt(asked)
    assert other.prompt(asked) == other.prompt(ASKED)


@pytest.mark.parametrize("mark", ["#", "</think>"])
def test_a_template_that_drops_a_part_of_a_reply_is_told_by_it(mark):
    form = form_for(made.CHATML.replace("m['content']", f"m['content'].split('{mark}')[-1]"))
    prompt = form.prompt(ASKED)
    assert form.reply(ASKED, prompt, " Yes") == "Yes"
    with pytest.raises(DataError, match=r"drops a part of the reply; set model\.chat_template"):
        form.reply(ASKED, prompt, f" I think.{mark}Yes")


# Settings


def test_a_templates_settings_hold_in_training_and_wherever_its_tokenizer_goes(tmp_path):
    folder = made.save_parrot(tmp_path / "model", made.chat_tokenizer(made.THINK), "a", "b")
    written = {"enable_thinking": False}
    (tmp_path / "r.yaml").write_text(
        f"data: {{path: {rows(tmp_path / 'rows.jsonl')}, format: chat}}\nmodel: {{name: {folder}}}\n"
    )
    recipes = [
        load_recipe(str(tmp_path / "r.yaml"), [override])
        for override in (
            "model.chat_template_kwargs={enable_thinking: false}",
            "model.chat_template_kwargs.enable_thinking=false",
        )
    ]
    assert [recipe.model.chat_template_kwargs for recipe in recipes] == [written, written]
    tokenizer, pairs = prepare_data(recipes[0])
    assert pairs.train[0]["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert pairs.train[0]["chosen"] == "Yes."
    asked = [{"role": "user", "content": "Why?"}]
    render = lambda **given: tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **given)
    assert render() == Format("chat", tokenizer).prompt(ASKED) and render().endswith("</think>\n\n")
    assert not render(enable_thinking=True).endswith("</think>\n\n")  # whoever asks gets what was asked for
    assert load_tokenizer(recipes[0].model).chat_template == tokenizer.chat_template
    other = load_recipe(str(tmp_path / "r.yaml"), ["model.chat_template_kwargs.a=1", "data.format=hh"])
    assert without_effect(other) == {"model.chat_template_kwargs": "only data.format: chat uses it"}


@pytest.mark.parametrize("value", [False, None, 3, 'it\'s "so"\n', ["a", {"b": True}]])
def test_a_setting_of_any_kind_reaches_the_template(value):
    template = with_settings("\n{{ level == given }}{{ level | tojson }}", {"level": value})
    tokenizer = made.chat_tokenizer(made.CHATML)
    asked = [{"role": "user", "content": "Why?"}]
    said = tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False, given=value)
    assert said == f"\nTrue{json.dumps(value)}"
    assert with_settings(template, {"level": value}) == template


def test_a_setting_that_the_template_never_reads_is_refused():
    with pytest.raises(ModelError, match=r"chat_template_kwargs\.enable_thinkng is .* did you mean 'enable_thinking'"):
        with_settings(made.THINK, {"enable_thinkng": False})


# Dates


def test_a_template_that_writes_the_date_writes_the_same_one_always(tmp_path):
    """Prompts of two moments are equal, down to the microsecond, and read back as the turns they are."""
    form = form_for(made.DATED)
    first = form.prompt(ASKED)
    time.sleep(0.001)
    again = Format("chat", form.tokenizer)
    assert form.writes_date and again.prompt(ASKED) == first and f"{FIXED_DAY:%d %b %Y %H:%M:%S %f}" in first
    assert as_transcript(again, first) == "\n\nHuman: Why?\n\nAssistant:"
    assert usable(made.DATED, "<eos>", rows(tmp_path / "rows.jsonl"))[0] == 12
    assert "strftime_now" in chat_template(form) and reads_as_in_training(form, chat_template(form))
    assert [name for name in TEXT if form_for(TEXT[name]).writes_date] == ["gptoss", "llama3_2", "muse_glimmer"]


def test_a_date_that_a_setting_replaces_is_not_written():
    template = "{% if day is not defined %}{% set day = strftime_now('%d %b') %}{% endif %}{{ day }}" + made.CHATML
    assert form_for(template).writes_date
    assert not form_for(with_settings(template, {"day": "1 Jan"})).writes_date


# What is said


@pytest.mark.parametrize(
    ("template", "form", "line"),
    [
        (made.GEMMA, "hh", "brings a chat template, and data.format=hh writes dialogues in another way; an instruct"),
        (made.DATED, "chat", "the chat template writes the day's date: here it is always 26 Jul 2024"),
        (
            made.BEFORE_NEXT,
            "chat",
            "the chat template writes nothing behind a reply: what is learned as its end is <eos>",
        ),
        (made.GEMMA, "chat", None),
        (None, "hh", None),
    ],
)
def test_what_a_reader_would_not_expect_is_said_in_a_line(template, form, line, tmp_path, caplog):
    models.say_once.cache_clear()
    folder = made.save_parrot(tmp_path / "model", made.chat_tokenizer(template), "a", "b")
    file = rows(tmp_path / "rows.jsonl")
    (tmp_path / "r.yaml").write_text(f"data: {{path: {file}, format: {form}}}\nmodel: {{name: {folder}}}\n")
    with caplog.at_level(logging.INFO, "alignlab"):
        prepare_data(load_recipe(str(tmp_path / "r.yaml")))
        prepare_data(load_recipe(str(tmp_path / "r.yaml")))
    said = [r.getMessage() for r in caplog.records if r.name == "alignlab.models.load"]
    assert [line in each for each in said] == ([True] if line else [])


def test_replies_that_are_cut_are_said_to_have_no_end(tmp_path, caplog):
    models.say_once.cache_clear()
    folder = made.save_parrot(tmp_path / "model", made.chat_tokenizer(made.GEMMA), "a", "b")
    data = f"{{path: {rows(tmp_path / 'rows.jsonl')}, format: chat, max_reply_tokens: 2, long_replies: cut}}"
    (tmp_path / "r.yaml").write_text(f"data: {data}\nmodel: {{name: {folder}}}\n")
    with caplog.at_level(logging.INFO, "alignlab"):
        prepare_data(load_recipe(str(tmp_path / "r.yaml")))
    assert "24 replies are cut at data.max_reply_tokens, so that their end is not learned" in caplog.text
