"""Sharing prefixes computes what stock TRL computes, on real preference pairs and the models' own code."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

from alignlab.errors import ModelError
from alignlab.models import layout as layouts
from alignlab.models import packing
from alignlab.models.layout import NOTHING, SegmentMask, lay_out, place_segments, visible
from alignlab.models.packing import decide, share_prefixes, unsupported

SHARED = Path(__file__).parents[2] / "shared"
VOCABULARY, MAX_TOKENS, WINDOW = 512, 160, 24
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "llama": {**SIZES, **GROUPED},
    "mistral": {**SIZES, **GROUPED, "sliding_window": WINDOW},
    "gemma3_text": {  # mixed layers: one mask for each kind
        **SIZES,
        **GROUPED,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {**SIZES, **GROUPED, "num_local_experts": 4, "router_aux_loss_coef": 0.0},
}
NO_ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}  # for trainers that get their batches by hand
LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()


# Real pairs, tiny models ------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    folder = SHARED / "models" / "stories260K"
    if not folder.exists():
        pytest.skip("needs the real material beside the project")
    return PreTrainedTokenizerFast.from_pretrained(folder, pad_token="</s>")


@pytest.fixture(scope="session")
def texts() -> list[dict[str, str]]:
    """Short rows of HH-RLHF."""
    file = SHARED / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz"
    if not file.exists():
        pytest.skip("needs the real material beside the project")
    kept = []
    with gzip.open(file, "rt") as lines:
        for row in map(json.loads, lines):
            chosen, rejected = (row[name].rpartition("\n\nAssistant:") for name in ("chosen", "rejected"))
            if chosen[0] == rejected[0] and max(len(row["chosen"]), len(row["rejected"])) < 230:
                kept.append({"prompt": "".join(chosen[:2]), "chosen": chosen[2], "rejected": rejected[2]})
    return kept[:64]


@pytest.fixture(scope="session")
def pairs(texts, tokenizer) -> list[dict[str, list[int]]]:
    """The same rows as ids of a vocabulary of 512, as TRL prepares them; most are shorter than 160."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = {"prompt": [], "chosen": [2], "rejected": [2]}
    return [{f"{name}_ids": ids(row[name]) + end for name, end in ends.items()} for row in texts]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models(family)` is a folder with a tiny random model, and one for another seed is another model."""

    def saved(family: str, seed: int = 0) -> Path:
        folder = root / f"{family}-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            config = AutoConfig.for_model(family, vocab_size=VOCABULARY, initializer_range=0.08, **FAMILIES[family])
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    root = tmp_path_factory.mktemp("models")
    return saved


def collate(pairs: list[dict], **options) -> dict[str, Tensor]:
    options = {"max_length": MAX_TOKENS, **options}
    return DataCollatorForPreference(pad_token_id=2, **options)(pairs)


@pytest.fixture
def build(models, tokenizer, tmp_path):
    """`build(family)` is a stock DPOTrainer whose reference is another model than its policy."""

    def trainer(family: str, model=None, attention: str = "sdpa", peft_config=None, rows=None, **options) -> DPOTrainer:
        options = {
            "per_device_train_batch_size": 6,
            "gradient_checkpointing": False,
            "max_length": MAX_TOKENS,
        } | options
        args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, **options)
        load = lambda seed: AutoModelForCausalLM.from_pretrained(models(family, seed), attn_implementation=attention)
        full = model is None and peft_config is None
        return DPOTrainer(
            model or load(0),
            ref_model=load(1) if full else None,
            args=args,
            train_dataset=Dataset.from_list(rows or [NO_ROW]),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return trainer


def lora(**options):
    from peft import LoraConfig

    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


# Two ways to compute ----------------------------------------------------------


@torch.no_grad()
def log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, labels=labels, fused_lm_head=True).log_probs.float()


def compute(trainer: DPOTrainer, batch: dict[str, Tensor]) -> dict:
    """Everything a training step gives: per-token log-probs, the loss, its gradients and the logged metrics."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"] = defaultdict(list)
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    return {
        "log_probs": log_probs(trainer.model, batch),
        "loss": loss.detach(),
        "grads": {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None},
        "metrics": {k: v[0] for k, v in trainer._metrics["train"].items() if k != "num_tokens"},
    }


def both_ways(trainer: DPOTrainer, batch: dict[str, Tensor]) -> tuple[dict, dict]:
    """What stock TRL computes, then what shared prefixes compute; no batch may have gone the standard way."""
    standard = compute(trainer, batch)
    handles = [share_prefixes(model) for model in (trainer.model, trainer.ref_model) if model is not None]
    shared = compute(trainer, batch)
    for handle in handles:
        assert not handle.fallbacks
        handle.undo()
    assert handles[0].computed_positions < handles[0].standard_positions
    return standard, shared


def assert_same(standard: dict, shared: dict) -> None:
    """Float32: log-probs within 1e-5, loss within 1e-5, each gradient within 1e-4 of its norm."""
    torch.testing.assert_close(shared["log_probs"], standard["log_probs"], atol=1e-5, rtol=0)
    torch.testing.assert_close(shared["loss"], standard["loss"], atol=1e-5, rtol=1e-5)
    assert shared["metrics"] == pytest.approx(standard["metrics"], abs=1e-4, rel=1e-4)
    assert shared["grads"].keys() == standard["grads"].keys()
    floor = 1e-3 * torch.stack([g.norm() for g in standard["grads"].values()]).max()
    for name, expected in standard["grads"].items():  # some are zero but for rounding, such as that of a key's bias
        assert (shared["grads"][name] - expected).norm() <= 1e-4 * torch.maximum(expected.norm(), floor), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_give_the_same_loss_and_gradients(build, pairs, family, attention):
    assert_same(*both_ways(build(family, attention=attention), collate(pairs[:6])))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_the_same(trainer_of_llama, pairs, loss):
    trainer_of_llama.loss_types = [loss]
    assert_same(*both_ways(trainer_of_llama, collate(pairs[:5])))


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"use_weighting": True}, {"loss_type": ["sigmoid", "sft"]}])
def test_options_of_the_loss_are_the_same(build, pairs, options):
    assert_same(*both_ways(build("llama", **options), collate(pairs[6:11])))


@pytest.fixture
def trainer_of_llama(build):
    return build("llama", label_smoothing=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_gradient_checkpointing_of_both_kinds_is_the_same(build, pairs, family, reentrant):
    kind = {"use_reentrant": reentrant}
    trainer = build(family, peft_config=lora(), gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    trainer.model.gradient_checkpointing_enable(kind)
    trainer.model.enable_input_require_grads()
    assert_same(*both_ways(trainer, collate(pairs[:4])))


def test_lora_with_a_ref_adapter_is_the_same(build, models, pairs, tmp_path):
    from peft import PeftModel, get_peft_model

    load = lambda: AutoModelForCausalLM.from_pretrained(models("mistral"))
    get_peft_model(load(), lora()).save_pretrained(tmp_path / "adapter")
    trainer = build("mistral", PeftModel.from_pretrained(load(), tmp_path / "adapter", is_trainable=True))
    assert "ref" in trainer.model.peft_config
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.mul_(1.5)
    standard, shared = both_ways(trainer, collate(pairs[:6]))
    assert_same(standard, shared)
    assert abs(standard["metrics"]["rewards/chosen"]) > 0.01, "policy and reference must differ"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_4_bit_is_the_same(build, models, pairs, monkeypatch, family):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(models(family), quantization_config=quantized)
    trainer = build(family, model, peft_config=lora())
    for parameter in trainer.model.parameters():  # TRL casts adapters to bfloat16
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    assert_same(*both_ways(trainer, collate(pairs[:4])))


def test_stored_reference_is_the_same(build, pairs):
    trainer = build("llama")
    batch = collate(pairs[:6])
    online = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    handle = share_prefixes(trainer.ref_model)
    shared = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    assert handle.computed_positions
    torch.testing.assert_close(shared, online, atol=1e-4, rtol=1e-6)  # a sum over a reply
    trainer.precompute_ref_logps = True
    assert_same(*both_ways(trainer, batch | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), online, strict=True))))


def test_fifty_steps_have_the_same_loss_curve(build, texts):
    curves = []
    for sharing in (False, True):
        trainer = build(
            "mistral", rows=texts, max_steps=50, logging_steps=1, save_strategy="no", learning_rate=1e-3,
            per_device_train_batch_size=3, max_length=96,
        )  # fmt: skip
        handles = [share_prefixes(model) for model in (trainer.model, trainer.ref_model)] if sharing else []
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert all(handle.computed_positions and not handle.fallbacks for handle in handles)
    standard, shared = curves
    assert len(standard) == 50 and standard[0] - min(standard) > 0.2
    assert shared == pytest.approx(standard, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bfloat16_is_no_farther_from_float32_than_the_standard_forward(build, pairs, family):
    model = build(family).model
    batches = [collate(pairs[i : i + 8]) for i in range(0, 64, 8)]
    logs = lambda: torch.cat([log_probs(model, batch).flatten() for batch in batches])
    exact = logs()
    model.bfloat16()
    standard = logs()
    share_prefixes(model)
    shared = logs()
    scored = exact != 0
    distance = lambda x: (x - exact).abs()[scored].mean().item()
    assert distance(shared) <= 1.02 * distance(standard)
    assert 0 < distance(shared) < packing.MEAN_DIFFERENCE


# Wrong mathematics must not pass ----------------------------------------------


def rejected_sees_chosen(layout, window=None):
    same_pair = layout.pair_RW[:, None, :, None] == layout.pair_RW[:, None, None, :]
    return same_pair & (layout.position_RW[:, None, :, None] >= layout.position_RW[:, None, None, :])


def pairs_see_each_other(layout, window=None):
    R, W = layout.pair_RW.shape
    return torch.ones(W, W, dtype=torch.bool).tril().expand(R, 1, W, W)


def window_ignored(layout, window=None):
    return visible(layout)


def test_a_reference_whose_autocast_begins_with_its_forward_is_not_compared_as_float32(build, pairs):
    """As accelerate prepares a separate reference: asked outside its forward, no autocast is on (limit 1e-3 nats)."""
    batch = build("llama").data_collator([*pairs])
    model = build("llama").model.eval()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    handle = share_prefixes(model, "raise")
    log_probs(model, batch)
    assert not handle.fallbacks and handle.enabled
    assert 0 < handle.differences["the first batch"] < packing.MEAN_DIFFERENCE


@pytest.mark.parametrize("wrong", [rejected_sees_chosen, pairs_see_each_other, window_ignored])
def test_a_wrong_mask_fails_the_same_check_and_the_first_batch(build, pairs, monkeypatch, wrong):
    monkeypatch.setattr(layouts, "visible", wrong)
    monkeypatch.setattr(layouts, "attends_by_segment", lambda model: False)
    trainer, batch = build("mistral"), collate(pairs[:6])
    with pytest.raises(ModelError, match="changes the log-probabilities of MistralForCausalLM"):
        both_ways(trainer, batch)
    share_prefixes(trainer.model).undo()
    monkeypatch.setattr(packing, "MAX_DIFFERENCE", 1e9)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_same(*both_ways(trainer, batch))


def test_told_to_stop_a_difference_goes_on_the_standard_way(build, pairs, monkeypatch, caplog):
    monkeypatch.setattr(layouts, "visible", window_ignored)
    trainer, batch = build("mistral"), collate(pairs[:6])
    standard = compute(trainer, batch)
    handle = share_prefixes(trainer.model, on_difference="stop")
    assert_same(standard, compute(trainer, batch))
    assert not handle.enabled and "off from here" in caplog.text


def test_a_batch_beyond_the_window_is_checked_too(build, pairs):
    trainer = build("mistral")
    handle = share_prefixes(trainer.model)
    short = {name: [5, 6, 7] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    compute(trainer, collate([short] * 2))
    assert list(handle.differences) == ["the first batch"]
    compute(trainer, collate(pairs[:2]))
    assert list(handle.differences) == ["the first batch", "the first batch beyond the window"]


# TRL's LM head ---------------------------------------------------------------


def test_the_lm_head_reads_its_tile_where_lm_head_tiles_sets_it(build, pairs, monkeypatch):
    """Of 512 words, tiles of 200 are products of 200, 200 and 112 columns; TRL's own is one of 512."""
    batch, model = collate(pairs[:2]), build("llama").model
    monkeypatch.setattr(packing, "CPU_TILE", 200)
    standard = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    whole, columns = log_probs(model, batch), Columns()
    with packing.lm_head_tiles(torch.device("cpu")), columns:
        tiled = log_probs(model, batch)
    assert columns.seen == {200, 112}
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    assert standard == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with packing.lm_head_tiles(torch.device("cuda")):
        assert standard == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE


class Columns(TorchDispatchMode):
    """The widths of all tiles that matrix products were written into."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.out:  # as the fused LM head writes its tiles
            self.seen.add(result.shape[-1])
        return result


# Odd batches ------------------------------------------------------------------

EDGES = {
    "identical branches": [([5, 6, 7], [8, 9], [8, 9]), ([5, 6], [8], [9])],
    "one reply begins the other": [([5, 6, 7], [8, 9, 10, 11], [8, 9]), ([5, 6], [7], [7, 8, 9])],
    "one pair": [([5, 6, 7], [8, 9], [9])],
    "prompt of one token": [([5], [8, 9], [9]), ([6], [7], [8])],
    "a reply cut away": [([5] * 12, [8, 9], [9, 9]), ([5] * 9, [8, 9], [9, 9])],
    "one pair far longer": [([5, 6] * 5, [8], [9])] + [([5], [8], [9])] * 3,
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases_are_the_same(build, name):
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in EDGES[name]]
    ways = both_ways(build("llama"), collate(rows, max_length=12))
    for way in ways if name == "identical branches" else ():
        del way["metrics"]["rewards/accuracies"]  # which of two equal rewards is the greater is up to rounding
    assert_same(*ways)


def test_without_a_common_prefix_pairs_are_only_packed(build, pairs):
    """`keep_end` cuts prompts of a pair in different places, so that nothing is common; padding still goes."""
    standard, shared = both_ways(build("llama"), collate(pairs[:6], max_length=40, truncation_mode="keep_end"))
    assert_same(standard, shared)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: {k: v.flip(1) for k, v in b.items()}, "its padding is not on the right"),
        (lambda b: {k: v[:-1] for k, v in b.items()}, "its 7 rows are not pairs"),
        (lambda b: {k: v for k, v in b.items() if k != "attention_mask"}, "it lacks"),
        (lambda b: b | {"position_ids": torch.arange(b["input_ids"].shape[1])[None]}, "it comes with position_ids"),
        (lambda b: b | {"labels": b["input_ids"]}, "it scores padding"),
    ],
)
def test_a_batch_that_cannot_be_packed_goes_the_standard_way_and_says_so(build, pairs, caplog, spoil, reason):
    model = build("llama").model
    batch = collate(pairs[:4])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    batch = spoil(batch | {"labels": labels})
    expected = model(**batch, fused_lm_head=True)
    handle = share_prefixes(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model(**batch, fused_lm_head=True).log_probs, expected.log_probs)
    assert caplog.text.count(reason) == 1 and sum(handle.fallbacks.values()) == 2


def test_generation_and_plain_calls_are_untouched(build, pairs):
    model = build("llama").model.eval()
    prompt = {"input_ids": torch.tensor([pairs[0]["prompt_ids"]] * 2)}
    before = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=2)
    logits = model(**prompt, logits_to_keep=3).logits
    handle = share_prefixes(model)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=2), before)
    assert torch.equal(model(**prompt, logits_to_keep=3).logits, logits)
    assert logits.shape[1] == 3 and handle.standard_positions == 0


def test_pausing_and_undoing_give_the_standard_forward_back(build, pairs):
    trainer, batch = build("llama"), collate(pairs[:4])
    before = trainer.model.forward
    handle = share_prefixes(trainer.model)
    assert share_prefixes(trainer.model) is handle
    with handle.paused():
        compute(trainer, batch)
    assert handle.standard_positions == 0
    compute(trainer, batch)
    assert handle.standard_positions > handle.computed_positions > 0
    handle.undo()
    assert trainer.model.forward == before


# The layout -------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_each_token_sees_its_own_sequence_and_nothing_else(data):
    """From any token of any layout, the visible keys are its own sequence up to itself, within the window."""
    sequence = st.lists(st.integers(0, 2), min_size=1, max_size=9)
    sequences = data.draw(st.integers(1, 5).flatmap(lambda n: st.lists(sequence, min_size=2 * n, max_size=2 * n)))
    window, reach = data.draw(st.sampled_from([None, 1, 4])), data.draw(st.sampled_from([1.0, 1e9]))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    layout = lay_out(padded, torch.tensor([len(s) for s in sequences]), reach)
    mask = visible(layout, window)
    assert (layout.pair_RW != NOTHING).sum() <= sum(map(len, sequences))
    for s, ids in enumerate(sequences):
        for t in range(len(ids)):
            row, column = divmod(layout.place_ST[s, t].item(), layout.ids_RW.shape[1])
            seen = mask[row, 0, column]
            first = max(0, t + 1 - window) if window else 0
            order = layout.position_RW[row][seen].argsort()
            assert layout.position_RW[row][seen][order].tolist() == list(range(first, t + 1))
            assert layout.ids_RW[row][seen][order].tolist() == ids[first : t + 1]


def test_attention_by_segment_is_attention_under_the_whole_mask():
    ids = torch.randint(0, 2, (8, 30))
    layout = lay_out(ids, torch.tensor([30, 9, 14, 20, 12, 30, 7, 1]), reach=1.0)
    mask = visible(layout)
    query, key, value = torch.randn(3, len(mask), 2, mask.shape[-1], 8).unbind()
    attend = torch.nn.functional.scaled_dot_product_attention
    by_segment = attend(query, key, value, attn_mask=SegmentMask.of(mask, layout.sizes), scale=0.3)
    torch.testing.assert_close(by_segment, attend(query, key, value, attn_mask=mask, scale=0.3))


def test_rows_are_as_narrow_as_attention_makes_worth_it():
    """Of 6 + 5 + 4 + 4 = 19 tokens, one row has no gap; rows of 6 + 4 and 5 + 4 have one, but see half as far."""
    sizes = torch.tensor([6, 5, 4, 4])
    assert place_segments(sizes, reach=1e9)[1] == (1, 19)
    assert place_segments(sizes, reach=40.0)[1] == (2, 10)
    starts, (rows, width) = place_segments(sizes, reach=1.0)
    assert width == 6 and sorted((starts // width).tolist()) == [0, 1, 2, 3][:rows]


# What is refused --------------------------------------------------------------

REFUSED = {
    "bloom": ({"hidden_size": 8, "n_layer": 1, "n_head": 2}, "ALiBi"),
    "falcon": ({"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True}, "ALiBi"),
    "mpt": ({"d_model": 8, "n_layers": 1, "n_heads": 2}, "positions"),
    "gpt_neo": (
        {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "place in the row",
    ),
    "mamba": ({"hidden_size": 8, "num_hidden_layers": 1}, "mamba|attn_implementation|positions"),
    "lfm2": ({**SIZES, "layer_types": ["conv", "full_attention"]}, "conv"),
    "mixtral": ({**SIZES, "output_router_logits": True}, "router loss"),
    "llama": ({**SIZES, "attn_implementation": "flash_attention_2"}, "takes no 4-D mask"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_would_come_out_wrong_are_refused_by_name(kind):
    options, reason = REFUSED[kind]
    implementation = options.get("attn_implementation")
    config = AutoConfig.for_model(kind, **{k: v for k, v in options.items() if k != "attn_implementation"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if implementation:
        model.config._attn_implementation = implementation
    with pytest.raises(ModelError, match=reason):
        decide(True, model, "cpu")
    on, why = decide("auto", model, "cpu")
    assert not on and why.count("\n") == 0


def test_prompt_learning_is_refused(models):
    from peft import PromptTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "before the prompt" in unsupported(tuned)


@pytest.mark.parametrize(("coefficient", "loss"), [(None, True), (0.0, False), (0.5, True)])
def test_a_router_loss_keeps_auto_off_and_true_is_an_error(build, models, monkeypatch, coefficient, loss):
    """Mixtral's own coefficient is 0.001; TRL adds the loss unless `router_aux_loss_coef` says 0."""
    monkeypatch.setitem(FAMILIES, "mixtral", {**FAMILIES["mixtral"], "router_aux_loss_coef": 0.001})
    model = AutoModelForCausalLM.from_pretrained(models("mixtral", 9))
    trainer = build("mixtral", model, router_aux_loss_coef=coefficient)
    assert trainer.aux_loss_enabled is loss
    on, why = decide("auto", trainer.model, "cpu", trainer.aux_loss_enabled)
    assert on is not loss and ("router loss of MixtralForCausalLM" in why) is loss
    if loss:
        assert decide("auto", trainer.model, "cpu") == (on, why)
        with pytest.raises(ModelError, match=r"dpo\.router_aux_loss_coef: 0"):
            decide(True, trainer.model, "cpu", trainer.aux_loss_enabled)


def test_a_wrong_model_that_slips_through_is_caught_by_its_first_batch(build, pairs, models, monkeypatch):
    """GPT-Neo's local layers cut their window by place in the row, which packing changes."""
    local = {"attention_types": [[["local"], 2]], "window_size": 8, "max_position_embeddings": 256}
    monkeypatch.setitem(FAMILIES, "gpt_neo", {"hidden_size": 64, "num_layers": 2, "num_heads": 4, **local})
    trainer = build("gpt_neo", attention="eager")
    monkeypatch.setattr(packing, "unsupported", lambda model: None)
    share_prefixes(trainer.model)
    with pytest.raises(ModelError, match="changes the log-probabilities of GPTNeo"):
        compute(trainer, collate(pairs[:6]))


def test_dropout_is_refused(models):
    model = AutoModelForCausalLM.from_pretrained(models("gpt2"))
    model.transformer.h[0].mlp.dropout.p = 0.1
    with pytest.raises(ModelError, match="dropout"):
        share_prefixes(model)


def test_auto_is_on_where_a_win_is_recorded(models):
    model = AutoModelForCausalLM.from_pretrained(models("mistral"))
    assert unsupported(model) is None
    assert decide("auto", model, "cpu")[0]
    assert decide("auto", model, "cuda") == (False, decide("auto", model, "cuda")[1])
    assert "no win is recorded on cuda" in decide("auto", model, "cuda")[1]
    assert decide(True, model, "cuda")[0]
    assert not decide(False, model, "cpu")[0]


# Two ranks --------------------------------------------------------------------


def _train_on_rank(rank: int, port: int, folder: str, rows: list[dict], tokenizer, output: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    results = []
    for sharing in (False, True):
        options = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
        args = DPOConfig(
            output, bf16=False, use_cpu=True, ddp_backend="gloo", report_to=[], disable_tqdm=True, save_strategy="no",
            gradient_checkpointing=False, **options,
        )  # fmt: skip
        policy = AutoModelForCausalLM.from_pretrained(folder)
        trainer = DPOTrainer(policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        assert trainer.accelerator.num_processes == 2
        handles = [share_prefixes(m) for m in (trainer.model, trainer.accelerator.unwrap_model(trainer.ref_model))]
        for handle in handles:
            handle.enabled = sharing
        trainer.train()
        assert all(bool(handle.computed_positions) is sharing for handle in handles)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, torch.nn.utils.parameters_to_vector(policy.parameters()).detach()))
    torch.save(results, f"{output}/{rank}.pt")


def test_two_ranks_are_the_same(models, texts, tokenizer, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(models("llama")), texts[:12], tokenizer, str(tmp_path))
    torch.multiprocessing.spawn(_train_on_rank, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    (losses, weights), (shared_losses, shared_weights) = first
    assert len(losses) == 3 and shared_losses == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(shared_weights, weights, atol=1e-4, rtol=0)
    assert torch.equal(shared_weights, second[1][1])
