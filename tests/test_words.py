r"""The laws of token ids by words: they are the tokenizer's own, for any text, or words are not used."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignlab.data import words
from alignlab.data.words import PATTERNS, Encoder, cuts_at_spaces, encode_whole

SHARED = Path(__file__).parents[2] / "shared"
REAL = ("gpt2", "llama2", "mistral")
LEARNT = ("llama3", "qwen2", "sentencepiece")

pieces = st.sampled_from(
    [
        "\n\nHuman:",
        "\n\nAssistant:",
        " ",
        "  ",
        "   ",
        "\n",
        "\t ",
        "\r\n",
        "a",
        " b",
        "don't",
        "1234",
        "é",
        "😀",
        "▁",
        "Ġ",
    ]
)
hostile = st.lists(pieces | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=10).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    """The real ones that are here, and ones trained on the spot in the manner of others."""
    text = ["\n\nHuman: it's  a   test of 1234 words,\n\nisn't it?\n\nAssistant: yes, it is a test. naïve 😀\n"] * 3
    made = {name: _trained(text, name) for name in LEARNT}
    if SHARED.is_dir():
        made |= {name: AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name) for name in REAL}
    return made


def _trained(text, manner):
    backend = Tokenizer(models.BPE())
    if manner == "sentencepiece":
        backend.pre_tokenizer, alphabet = pre_tokenizers.Metaspace(split=True), ["▁"]
    else:
        pattern = next(p for p in sorted(PATTERNS) if ("{1,3}" in p) is (manner == "llama3"))
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        backend.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    if manner == "sentencepiece":
        backend = _as_llama(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _as_llama(trained):
    """As the first Llama's tokenizers are written: merges over the whole text, and bytes for unknown characters."""
    state = json.loads(trained.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<s>"}
    state |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module")
def encoders(tokenizers):
    return {name: Encoder(tokenizer, bos=True) for name, tokenizer in tokenizers.items()}


def test_these_tokenizers_are_read_by_words(encoders):
    assert {name: encoder.by_words for name, encoder in encoders.items()} == dict.fromkeys(encoders, True)


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=3), hostile)
@example(["a  \n b", "  x", "a   b  c "], " ")
@example(["\n\nHuman: a  b\n\nAssistant:"], "  yes\t no")
@example(["▁ b▁  c", "Ġ Ġ"], "")
def test_ids_by_words_are_the_tokenizers_own(encoders, tokenizers, prompts, reply):
    for name, encoder in encoders.items():
        tokenizer = tokenizers[name]
        ids = encoder.prompts(prompts)
        assert [found.tolist() for found in ids] == encode_whole(tokenizer, prompts, True)
        wholes = encode_whole(tokenizer, [prompt + reply + tokenizer.eos_token for prompt in prompts], True)
        for start, whole, found in zip(ids, wholes, encoder.replies(prompts, ids, [reply] * len(prompts)), strict=True):
            if found is None:
                assert whole[: len(start)] != start.tolist()
            else:
                assert [*start, *found] == whole


@settings(deadline=None)
@given(hostile)
def test_the_quick_cut_is_the_cut(encoders, text):
    for encoder in encoders.values():
        assert encoder._cut(text) == encoder._cut_anywhere(text)
        last, is_all = encoder._last_word(text)
        assert (last, is_all) == (encoder._cut(text)[-1], len(encoder._cut(text)) == 1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the HH-RLHF test files")
@pytest.mark.parametrize("name", REAL)
def test_every_real_transcript_has_the_tokenizers_own_ids(encoders, tokenizers, name):
    with gzip.open(SHARED / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["chosen"] for line in lines]
    found = encoders[name].prompts(texts)
    assert [ids.tolist() for ids in found] == encode_whole(tokenizers[name], texts, True)


def test_words_are_forgotten_before_they_fill_the_memory(encoders, monkeypatch):
    monkeypatch.setattr(words, "HELD_CHARACTERS", 5)
    encoder = encoders["llama3"]
    before = encoder.prompts(["one two three"])[0]
    encoder.prompts(["four"])
    assert len(encoder._words) + len(encoder._firsts) == 1
    assert np.array_equal(encoder.prompts(["one two three"])[0], before)


def altered(tokenizer, **changes):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for name, change in changes.items():
        state[name] = change(state[name])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3", {"pre_tokenizer": lambda state: {"type": "Whitespace"}}),
        ("llama3", {"normalizer": lambda state: {"type": "NFKC"}}),
        ("llama3", {"added_tokens": lambda tokens: [{**token, "rstrip": True} for token in tokens]}),
        ("sentencepiece", {"model": lambda model: {**model, "vocab": {**model["vocab"], "a▁b": len(model["vocab"])}}}),
        ("sentencepiece", {"model": lambda model: {**model, "dropout": 0.1}}),
    ],
)
def test_a_tokenizer_that_may_reach_over_a_space_is_given_whole_texts(tokenizers, name, changes):
    tokenizer = altered(tokenizers[name], **changes)
    assert cuts_at_spaces(tokenizer) is None
    encoder = Encoder(tokenizer, bos=True)
    if "dropout" not in str(changes) and name != "sentencepiece":
        texts = ["Human: a  b", "c"]
        assert [ids.tolist() for ids in encoder.prompts(texts)] == encode_whole(tokenizer, texts, True)
