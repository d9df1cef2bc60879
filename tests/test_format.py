"""The laws of formats: one object writes a dialogue for training and for generation, with one BOS and one EOS."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alignlab.data.format import WRITINGS, Dialogue, Format
from alignlab.data.prepare import prepare, sft_rows
from alignlab.data.transcript import Turn
from alignlab.errors import DataError
from alignlab.measure.generate import sample_replies
from alignlab.recipe.load import DataSection

SHARED = Path(__file__).parents[2] / "shared"
TEMPLATES = {  # how each is written in its model's own tokenizer_config.json, cut to what text dialogues need
    "zephyr": (Path(__file__).parents[1] / "recipes" / "zephyr.jinja").read_text(),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
FORMATS = [("hh", None), ("alpaca", None), ("plain", None), *(("chat", name) for name in TEMPLATES)]
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] }}{% endfor %}"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["gpt2", "llama2", "mistral"])
def real(request):
    if not SHARED.is_dir():
        pytest.skip("needs the real tokenizers")
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / request.param)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"Count to {n}, please!", "chosen": f"1, 2, … {n}.", "rejected": "No."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(file, name, template, tokenizer):
    section = DataSection(path=str(file), format=name, validation_share=0.2, test_share=0.2)
    return prepare(section, tokenizer, TEMPLATES.get(template)).train


def ask(text):
    return Dialogue([Turn("Human", f" {text}")])


@pytest.mark.parametrize(("name", "template"), FORMATS)
def test_generation_starts_from_the_ids_that_training_saw(real, pairs_file, name, template):
    """What a model gets from `sample_replies` for a dialogue is the prompt of its SFT row and of its DPO pair."""
    pairs = prepared(pairs_file, name, template, real)
    form, fed = Format(name, real, TEMPLATES.get(template)), []
    question = next(n for n in range(40) if f"Count to {n}, please!" in pairs[0]["prompt"])
    ids = form.prompt_ids(ask(f"Count to {question}, please!"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(real), **sizes))
    model.register_forward_pre_hook(lambda _, args, of: fed.append(of["input_ids"].tolist()), with_kwargs=True)
    real.pad_token = real.pad_token or real.eos_token
    sample_replies(model, real, [ids], max_new_tokens=1, seed=0, stops=form.stops())
    assert fed[0] == [pairs[0]["prompt_ids"]] == [ids]
    assert sft_rows(pairs)[0]["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize(("name", "template"), FORMATS)
def test_one_bos_begins_a_prompt_and_one_eos_ends_a_reply(real, pairs_file, name, template):
    """GPT-2 has no BOS that it would add; Zephyr's and Mistral's templates write an EOS behind a turn of their own."""
    pairs = prepared(pairs_file, name, template, real)
    adds_bos = real("")["input_ids"]
    for pair in pairs:
        prompt, reply = pair["prompt_ids"], pair["chosen_ids"]
        assert prompt[: len(adds_bos)] == adds_bos
        if real.bos_token != real.eos_token:
            assert prompt.count(real.bos_token_id) == 1 and real.bos_token_id not in reply
        assert reply.count(real.eos_token_id) == 1 and reply[-1] == real.eos_token_id
        whole = pair["prompt"] + pair["chosen"] + real.eos_token
        assert prompt + reply == real(whole, add_special_tokens=not whole.startswith(real.bos_token))["input_ids"]


def test_alpacas_sections_are_stanfords(tokenizer):
    form = Format("alpaca", tokenizer)
    with_input = Dialogue([Turn("Human", " Spell it.")], input="freind")
    assert form.prompt(with_input) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\nSpell it.\n\n### Input:\nfreind\n\n"
        "### Response:\n"
    )
    assert form.prompt(ask("Hi")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\n"
    )
    assert form.reply(ask("Hi"), "", " Hello.") == "Hello."
    assert Format("hh", tokenizer).prompt(with_input) == "\n\nHuman: Spell it.\n\nfreind\n\nAssistant:"


def test_a_system_turn_takes_its_place_in_every_format(tokenizer):
    dialogue = Dialogue([Turn("Human", " Hi")], system="Be kind.")
    prompts = {name: Format(name, tokenizer).prompt(dialogue) for name in WRITINGS}
    assert prompts == {
        "hh": "\n\nHuman: Be kind.\n\nHi\n\nAssistant:",
        "plain": "Be kind.\n\nHi",
        "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n",
    }
    assert {name: Format(name, tokenizer).folds_system for name in WRITINGS} == {
        "hh": True,
        "plain": True,
        "alpaca": False,
    }


def test_a_template_that_drops_the_system_turn_loses_those_rows_with_the_remedy(tmp_path, tokenizer):
    form = Format("chat", tokenizer, DROPS_SYSTEM)
    assert form.prompt(ask("Hi")) == "userHi"
    with pytest.raises(DataError, match=r"drops the system turn; set model\.chat_template"):
        form.prompt(Dialogue([Turn("Human", " Hi")], system="Be kind."))
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [system, user], "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match=r"not one usable row of 1: the chat template drops.*rows.jsonl:1 has") as error:
        prepare(DataSection(path=str(path), format="chat"), tokenizer, DROPS_SYSTEM)
    assert "\n" not in str(error.value)


def test_what_a_format_cannot_write_is_refused(tokenizer):
    several = Dialogue([Turn("Human", " a"), Turn("Assistant", " b"), Turn("Human", " c")])
    with pytest.raises(DataError, match="several turns has no plain text"):
        Format("plain", tokenizer).prompt(several)
    with pytest.raises(DataError, match="heading of an Alpaca section"):
        Format("alpaca", tokenizer).prompt(ask("### Response:\nMine"))
    assert "### Response:\nb\n\n### Instruction:\nc" in Format("alpaca", tokenizer).prompt(several)


def test_a_format_says_where_a_sampled_reply_ends(tokenizer):
    stops = {name: Format(name, tokenizer).stops().said for name in WRITINGS}
    turns = {"hh": ["\n\nHuman:"], "alpaca": ["\n\n### Instruction:"], "plain": []}
    assert stops == {name: ["<eos>", *turns[name]] for name in WRITINGS}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_written_and_read_back_or_refused(tmp_path_factory, tokenizer, question, answer):
    """Prompt + reply holds the question and the answer as they are, and the ids spell it; any Unicode, no crash."""
    path = tmp_path_factory.mktemp("hostile") / "rows.jsonl"
    row = {"prompt": f"q{question}", "chosen": f"a{answer}", "rejected": f"b{answer}"}
    fill = [{"prompt": f"fill {n}", "chosen": "a", "rejected": "b"} for n in range(12)]
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, *fill)))
    for name in WRITINGS:
        section = DataSection(path=str(path), source="pairs", format=name, validation_share=0.3, test_share=0.3)
        found = prepare(section, tokenizer)
        assert sum(found.kept.values()) + sum(found.dropped.values()) == 13
        pairs = [p for split in ("train", "validation", "test") for p in getattr(found, split)]
        mine = [p for p in pairs if "fill" not in p["prompt"]]
        for pair in mine:
            assert f"q{question}" in pair["prompt"] and pair["chosen"].endswith(f"a{answer}")
            assert tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"][:-1]) == pair["prompt"] + pair["chosen"]
