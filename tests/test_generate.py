"""Sampling and scoring replies: a batch is one by one, replies end where they should, and a seed fixes them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from alignlab.data.format import Format
from alignlab.measure.generate import pad_left, reply_logits, reply_logps
from alignlab.measure.generate import sample_replies as sample

NEXT_TURN = "\n\nHuman:"
ARCHITECTURES = ["gpt2", "llama", "mistral"]
PROMPTS = [
    "\n\nHuman: Hello!\n\nAssistant:",
    "a",
    "\n\nHuman: How do I grow beans and cook rice?\n\nAssistant:",
    "Sure, ok",
]
BY_HEART = {
    "\n\nHuman: Hi\n\nAssistant:": " Of course!<eos>",
    "\n\nHuman: Who are you and what do you want?\n\nAssistant:": " Nobody.\n\nHuman: And you?\n\nAssistant: Me.<eos>",
    "\n\nHuman: Count.\n\nAssistant:": " one two three four five six seven eight nine ten<eos>",
}


def sample_replies(model, tokenizer, prompts, stops=None, **how):
    """Replies as HH has them end, where nothing else is said."""
    return sample(model, tokenizer, prompts, stops=stops or Format("hh", tokenizer).stops(), **how)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return tokenizer(PROMPTS)["input_ids"]


@pytest.fixture(scope="module")
def parrot(tokenizer) -> LlamaForCausalLM:
    """A model that has learned three dialogues by heart."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape))
    rows = [torch.tensor([tokenizer(prompt + reply)["input_ids"]]) for prompt, reply in BY_HEART.items()]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = sum(model(input_ids=row, labels=row).loss for row in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5 * len(rows)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_is_answered_as_one_by_one(name, load, tokenizer, prompts):
    model = load(name)
    together = sample_replies(model, tokenizer, prompts, max_new_tokens=12, seed=0, greedy=True)
    alone = sample_replies(model, tokenizer, prompts, max_new_tokens=12, seed=0, greedy=True, batch_size=1)
    assert together == alone
    assert len({reply.ids for reply in together}) == len(prompts)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_reply_ends_at_its_eos_at_the_next_human_turn_or_at_the_limit(pad, parrot, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    ids = tokenizer(list(BY_HEART))["input_ids"]
    eos, turn, limit = sample_replies(parrot, tokenizer, ids, max_new_tokens=20, seed=0, greedy=True)
    assert (eos.text, eos.ended, eos.ids[-1]) == (" Of course!", True, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in eos.ids[:-1]
    assert (turn.text, turn.ended) == (" Nobody.", True)
    assert tokenizer.decode(turn.ids) == " Nobody." + NEXT_TURN
    assert limit.text.startswith(" one two three") and not limit.ended and len(limit.ids) == 20
    assert tokenizer.decode(limit.ids) == limit.text


def test_nothing_is_computed_after_the_end_of_a_reply(parrot, tokenizer):
    """One forward a token, the last of the reply included."""
    for prompt in list(BY_HEART)[:2]:
        forwards = []
        counter = parrot.register_forward_hook(lambda *_, count=forwards: count.append(1))
        ids = tokenizer([prompt])["input_ids"]
        (reply,) = sample_replies(parrot, tokenizer, ids, max_new_tokens=60, seed=0, greedy=True)
        counter.remove()
        assert len(forwards) == len(reply.ids) < 60


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_seed_fixes_the_replies_whatever_was_drawn_before(name, load, tokenizer, prompts):
    model = load(name)
    first = sample_replies(model, tokenizer, prompts, max_new_tokens=8, seed=3)
    torch.rand(17)
    assert sample_replies(model, tokenizer, prompts, max_new_tokens=8, seed=3) == first
    assert sample_replies(model, tokenizer, prompts, max_new_tokens=8, seed=4) != first


def test_batches_draw_differently_from_the_same_prompt(load, tokenizer, prompts):
    replies = sample_replies(load("llama"), tokenizer, [prompts[0]] * 4, max_new_tokens=8, seed=0, batch_size=2)
    assert len({reply.ids for reply in replies}) == 4


def test_sampling_leaves_the_callers_random_state_and_mode_alone(load, tokenizer, prompts):
    model = load("llama")
    for training in (True, False):
        model.train(training)
        before = torch.get_rng_state()
        sample_replies(model, tokenizer, prompts, max_new_tokens=4, seed=0)
        reply_logps(model, prompts, prompts, tokenizer.pad_token_id)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training is training


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_models_own_generation_settings_change_nothing(with_adapter, load, tokenizer, prompts):
    model = load("llama")
    if with_adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    expected = sample_replies(model, tokenizer, prompts, max_new_tokens=12, seed=0)
    inner = model.get_base_model() if with_adapter else model
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, suppress_tokens=list(range(100)), min_p=0.9)
    inner.generation_config = own
    assert sample_replies(model, tokenizer, prompts, max_new_tokens=12, seed=0) == expected
    assert inner.generation_config is own


def test_replies_are_drawn_from_the_whole_distribution(load, tokenizer, prompts):
    """First tokens outside the 50 likeliest come up as often as the model says, within four standard errors."""
    model, n = load("gpt2"), 2000
    model.lm_head.weight.data /= 4  # flatter
    logps = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].log_softmax(-1)
    likely = set(logps.topk(50).indices.tolist())
    expected = 1 - logps.exp().topk(50).values.sum().item()
    replies = sample_replies(model, tokenizer, [prompts[0]] * n, max_new_tokens=1, seed=0, batch_size=n)
    share = sum(reply.ids[0] not in likely for reply in replies) / n
    assert 0.05 < expected < 0.95
    assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_are_those_of_a_plain_loop(name, batch_size, load, tokenizer):
    model = load(name)
    prompts = tokenizer([*PROMPTS, "\n\nHuman: x\n\nAssistant:"])["input_ids"]
    replies = tokenizer([" Sure.<eos>", " No", " It depends on many things, as you know.<eos>", "<eos>", " a b c"])[
        "input_ids"
    ]
    expected = []
    for prompt, reply in zip(prompts, replies, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        expected.append(sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(reply)))
    found = reply_logps(model, prompts, replies, tokenizer.pad_token_id, batch_size)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert reply_logps(model, prompts, replies, tokenizer.eos_token_id, batch_size).tolist() == pytest.approx(
        found.tolist()
    )


def test_the_mask_covers_each_replys_tokens_and_nothing_else(load):
    prompts, replies = [[5, 6], [7], [8, 9, 10]], [[11], [12, 13, 14], [0, 0]]
    logits, ids, mask = reply_logits(load("llama"), prompts, replies, pad=0)
    assert logits.shape[:2] == ids.shape == mask.shape == (3, 3)
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
    assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == replies


def test_left_padding_ends_every_row_at_the_right_edge():
    ids, mask = pad_left([[1], [2, 3, 9]], pad=9)
    assert ids.tolist() == [[9, 9, 1], [2, 3, 9]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
