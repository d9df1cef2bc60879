"""Held-out figures: the DPO paper's own equation in a plain loop, and TRL's, give the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from alignlab.measure.heldout import preference, probe, reply_perplexity, score_pairs

BETA = 0.3
ROWS = [
    ("\n\nHuman: Hello!\n\nAssistant:", " Hello, what can I do for you?", " Why ask me?"),
    ("\n\nHuman: How do I grow beans?\n\nAssistant:", " Water them.", " Nobody knows that. Go away now. That is all."),
    ("\n\nHuman: Are you there?\n\nAssistant: Yes.\n\nHuman: Good.\n\nAssistant:", " Shall I go on?", " I am busy."),
    ("\n\nHuman: Any advice?\n\nAssistant:", " Of course!", " It depends on many things."),
    ("\n\nHuman: Cook rice?\n\nAssistant:", " Keep the heat low.", " Keep the heat high."),
]
TRL_NAMES = ["rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "loss"]


@pytest.fixture(scope="module")
def pairs(tokenizer) -> Dataset:
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
    ends = {"prompt": [], "chosen": [tokenizer.eos_token_id], "rejected": [tokenizer.eos_token_id]}
    ids = [{f"{name}_ids": tokenizer(row[name])["input_ids"] + end for name, end in ends.items()} for row in rows]
    return Dataset.from_list([row | of for row, of in zip(rows, ids, strict=True)])


@pytest.fixture
def policy_and_reference(load):
    """A random model, and the same a little way off."""
    torch.manual_seed(1)
    policy, reference = load("llama"), load("llama")
    for weight in policy.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    return policy, reference


def figures(policy, reference, pairs, pad):
    return preference(score_pairs(policy, pairs, pad), score_pairs(reference, pairs, pad), BETA)


def test_figures_are_those_of_the_papers_equation_in_a_plain_loop(policy_and_reference, pairs, tokenizer):
    """L = −log σ(β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x)), equation 7 of arXiv 2305.18290."""

    def log_p(model, prompt, reply):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(reply))

    policy, reference = policy_and_reference
    chosen, rejected = (
        [
            BETA * (log_p(policy, p, y) - log_p(reference, p, y))
            for p, y in zip(pairs["prompt_ids"], pairs[column], strict=True)
        ]
        for column in ("chosen_ids", "rejected_ids")
    )
    margins = [w - other for w, other in zip(chosen, rejected, strict=True)]
    expected = {
        "rewards/margins": margins,
        "rewards/accuracies": [float(m > 0) for m in margins],
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "loss": [-math.log(1 / (1 + math.exp(-m))) for m in margins],
    }
    found = figures(policy, reference, pairs, tokenizer.pad_token_id)
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    assert {name: each.mean for name, each in found.items()} == pytest.approx(means, abs=1e-4)
    assert {each.n for each in found.values()} == {len(ROWS)}
    assert 0 < means["rewards/accuracies"] < 1


def test_figures_are_trls_own(policy_and_reference, pairs, tokenizer, tmp_path):
    policy, reference = policy_and_reference
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = DPOConfig(str(tmp_path), beta=BETA, per_device_eval_batch_size=len(ROWS), **quiet)
    rows = pairs.select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(policy, reference, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trls = trainer.evaluate()
    found = figures(policy, reference, pairs, tokenizer.pad_token_id)
    assert {name: each.mean for name, each in found.items()} == pytest.approx(
        {name: trls[f"eval_{name}"] for name in TRL_NAMES}, abs=1e-4
    )


def test_swapping_chosen_and_rejected_turns_the_margin_round(policy_and_reference, pairs, tokenizer):
    policy, reference = policy_and_reference
    swap = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    swapped = pairs.select_columns(["prompt_ids", *swap]).rename_columns(swap)
    found, turned = (figures(policy, reference, of, tokenizer.pad_token_id) for of in (pairs, swapped))
    assert turned["rewards/margins"].mean == pytest.approx(-found["rewards/margins"].mean, abs=1e-5)
    assert turned["rewards/accuracies"].mean == pytest.approx(1 - found["rewards/accuracies"].mean)


def test_equal_models_have_no_margin_no_accuracy_and_a_loss_of_ln_2(load, pairs, tokenizer):
    """A tie is not a preference: accuracy counts only strictly larger rewards."""
    found = figures(load("gpt2"), load("gpt2"), pairs, tokenizer.pad_token_id)
    means = {name: each.mean for name, each in found.items()}
    assert means == pytest.approx({name: 0 for name in TRL_NAMES} | {"loss": math.log(2)})


def test_reply_perplexity_is_over_the_chosen_replies_tokens(load, pairs, tokenizer):
    model = load("mistral")
    scores = score_pairs(model, pairs, tokenizer.pad_token_id)
    tokens = sum(map(len, pairs["chosen_ids"]))
    assert scores.chosen_tokens_N.sum().item() == tokens
    assert reply_perplexity(scores) == pytest.approx(math.exp(-scores.chosen_N.sum().item() / tokens), rel=1e-5)


def test_a_probe_is_the_first_chosen_replies_log_probabilities(load, pairs, tokenizer):
    model = load("llama")
    all_of_them = score_pairs(model, pairs, tokenizer.pad_token_id).chosen_N.tolist()
    assert probe(model, pairs, tokenizer.pad_token_id, 2) == pytest.approx(all_of_them[:2], abs=1e-4)
    assert probe(model, pairs, tokenizer.pad_token_id, 100) == pytest.approx(all_of_them, abs=1e-4)
