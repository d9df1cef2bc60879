"""AlignDPOTrainer is TRL's DPOTrainer: equal rows and options give equal logs and weights, prefixes shared or not.

Left out is what alignlab prepares or refuses itself: tokenizing, cutting, images.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from alignlab.errors import ModelError
from alignlab.trainers import AlignDPOTrainer

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
OPTIONS = {
    **{f"loss {loss}": {"loss_type": [loss], "label_smoothing": 0.1} for loss in LOSSES},
    **{f"divergence {name}": {"f_divergence_type": name} for name in DIVERGENCES},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "one weight": {"loss_weights": [0.5]},
    "WPO": {"use_weighting": True},
    "LD-DPO": {"ld_alpha": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "padding free": {"padding_free": True},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "bfloat16": {"bf16": True},
    "no limit": {"max_length": None},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "synchronized reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}
TIMES = ("runtime", "per_second", "total_flos")
WAYS = [None, "auto", True]  # sharing not asked for, left to alignlab, demanded


class Stock(DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Twelve pairs of token ids with prompts and replies of all lengths."""
    ids = lambda start, length: [2 + (start * 7 + 3 * n) % 380 for n in range(length)]
    rows = [
        {"prompt_ids": ids(i, 5 + i), "chosen_ids": ids(i + 50, 2 + i % 5), "rejected_ids": ids(i + 90, 7 - i % 4)}
        for i in range(12)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def train(folders, tokenizer, pairs, tmp_path):
    """A function: a trainer's class, what it is given and how it shares prefixes → its logs and weights."""

    def train(kind: type, way=None, model=None, rows=None, evaluated=True, **options) -> tuple[list, dict]:
        given = {name: options.pop(name) for name in ("ref_model", "peft_config", "callbacks") if name in options}
        given |= {name: options.pop(name) for name in ("compute_metrics", "eval_dataset") if name in options}
        steady = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": []}
        steady |= {"learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1, "disable_tqdm": True}
        steady |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no"}
        args = DPOConfig(str(tmp_path), **{**steady, **options})
        given.setdefault("eval_dataset", pairs)
        trainer = kind(
            model or plain(folders), args=args, train_dataset=rows or pairs, processing_class=tokenizer, **given
        )
        if way is not None:
            trainer.share_prefixes(way)
        trainer.train()
        if evaluated:
            trainer.evaluate()
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        return [timeless(row) for row in trainer.state.log_history], weights

    return train


def plain(folders) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="float32")


def adapted(folders) -> torch.nn.Module:
    """A model with an adapter that has been trained, in effect."""
    torch.manual_seed(0)
    model = get_peft_model(plain(folders), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    return model


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if not any(word in name for word in TIMES)}


OWN = ("eval_perplexity", "eval_rewards/accuracies_stderr")  # what alignlab adds


def assert_same(one: tuple[list, dict], other: tuple[list, dict], tolerance: float) -> None:
    for row, expected in zip(one[0], other[0], strict=True):
        row = {name: value for name, value in row.items() if name not in OWN}
        assert row == pytest.approx(expected, abs=tolerance, rel=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], atol=tolerance, rtol=tolerance)


def tolerance(way, options: dict) -> float:
    """Sharing and other sums over batches differ by rounding; in bfloat16 that is more."""
    return (5e-2 if options.get("bf16") else 2e-3) if way else 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_whole_model_trains_as_with_trl(name, way, train, folders):
    options = dict(OPTIONS[name])

    def reference() -> dict:  # a second model, where TRL does not do without one
        return {} if "precompute_ref_log_probs" in options else {"ref_model": plain(folders)}

    expected = train(Stock, **options, **reference())
    assert_same(train(AlignDPOTrainer, way, **options, **reference()), expected, tolerance(way, options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["loss sigmoid", "several losses", "WPO", "precomputed reference", "checkpointing"])
def test_an_adapter_trains_as_with_trl(name, way, train, folders):
    options = OPTIONS[name]
    expected = train(Stock, model=adapted(folders), **options)
    assert_same(train(AlignDPOTrainer, way, model=adapted(folders), **options), expected, tolerance(way, options))


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_adapter_of_trls_own_making_trains_as_with_trl(way, train):
    adapter = lambda: {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])}
    assert_same(train(AlignDPOTrainer, way, **adapter()), train(Stock, **adapter()), tolerance(way, {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [dict, DatasetDict])
def test_several_held_out_datasets_are_each_evaluated(form, way, train, pairs):
    several = form({"one": pairs, "other": pairs.select(range(8))})
    expected = train(Stock, eval_dataset=several)
    found = train(AlignDPOTrainer, way, eval_dataset=several)
    assert_same(found, expected, tolerance(way, {}))
    names = [name for row in found[0] for name in row if name.endswith("_loss") and name.startswith("eval_")]
    assert names == ["eval_one_loss", "eval_other_loss"]


@pytest.mark.parametrize("way", WAYS)
def test_callbacks_metrics_and_rows_that_stream_are_taken(way, train, pairs):
    class Counting(TrainerCallback):
        steps = 0

        def on_step_end(self, *_, **__):
            Counting.steps += 1

    given = lambda: {"callbacks": [Counting()], "compute_metrics": lambda _: {"of_ones_own": 1.0}}
    given_rows = lambda: {"rows": pairs.to_iterable_dataset()}
    found = train(AlignDPOTrainer, way, **given(), **given_rows())
    assert Counting.steps == 2 and found[0][-1]["eval_of_ones_own"] == 1.0
    assert_same(found, train(Stock, **given(), **given_rows()), tolerance(way, {}))


# --- what is refused ---


def test_prompt_tuning_shares_no_prefixes_and_says_so_where_it_must(train):
    given = lambda: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}
    for way in (None, "auto"):
        assert_same(train(AlignDPOTrainer, way, **given()), train(Stock, **given()), 1e-5)
    with pytest.raises(ModelError, match=r"model\.prefix_sharing is true, but adapter 'default' \(PROMPT_TUNING\)"):
        train(AlignDPOTrainer, True, **given())


def test_rows_that_trl_would_cut_are_refused(train):
    """alignlab has shortened prompts before; TRL's cut would take the end of the reply."""
    with pytest.raises(AssertionError, match="TRL would cut train at 8"):
        train(AlignDPOTrainer, max_length=8)


def test_what_trl_itself_refuses_is_refused_in_its_words(train):
    for options in ({"use_weighting": True, "loss_type": ["aot"]}, {"loss_type": ["exo_pair"]}):
        with pytest.raises((ValueError, NotImplementedError)) as stock:
            train(Stock, **options)
        with pytest.raises(type(stock.value)) as found:
            train(AlignDPOTrainer, **options)
        assert str(found.value) == str(stock.value)


def test_the_rows_come_back_as_they_went_in(folders, tokenizer, pairs, tmp_path: Path):
    args = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    trainer = AlignDPOTrainer(plain(folders), plain(folders), args, train_dataset=pairs, processing_class=tokenizer)
    assert trainer.train_dataset.to_list() == pairs.to_list()
