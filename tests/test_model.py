"""Loading, 4-bit, adapters, and the one rule of what DPO starts from and what its reference is."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import huggingface_hub
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from alignlab.errors import MachineError, ModelError
from alignlab.models import load as models
from alignlab.models.load import (
    Start,
    find_start,
    load_policy,
    load_tokenizer,
    load_weights,
    settle_adapters,
    weights_hash,
)
from alignlab.recipe.load import ModelSection
from alignlab.runs.run import Run

ARCHITECTURES = ["gpt2", "llama", "mistral"]
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
GPT2_LAYERS = {"c_attn", "c_proj", "c_fc"}
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LAYERS = {"gpt2": GPT2_LAYERS, "llama": LLAMA_LAYERS, "mistral": LLAMA_LAYERS}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
ROWS = [{"prompt": "Human: a", "chosen": " yes", "rejected": " no"}] * 2


@pytest.fixture(scope="module")
def section(folders):
    """A section for one of the random models, in float32 with LoRA unless told otherwise."""
    defaults = {"dtype": "float32", "lora": LORA}
    return lambda which="llama", **given: ModelSection(**{"name": str(folders[which]), **defaults, **given})


@pytest.fixture(scope="module")
def adapters(section, tmp_path_factory) -> dict[str, Path]:
    """A folder with an adapter that was trained, in effect, for each of the models: no weight of it is zero."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ARCHITECTURES:
        adapter = models.add_adapter(load_weights(section(name)), section(name))
        torch.manual_seed(2)
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.1)
        adapter.save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


def dpo_trainer(policy, reference, tokenizer, folder: Path) -> DPOTrainer:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    rows = Dataset.from_list(ROWS)
    return DPOTrainer(
        policy, reference, DPOConfig(str(folder), **quiet), train_dataset=rows, processing_class=tokenizer
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted_layers(model: PeftModel) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A." in name}


def adapter_state(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    state = {key: weight for key, weight in model.named_parameters() if f".{name}." in key}
    return {key.replace(f".{name}.", "."): weight.detach().clone() for key, weight in state.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- LoRA and 4-bit ---


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_is_every_layer_of_the_blocks_and_not_the_head(name, in_4bit, section):
    of = section(name, load_in_4bit=in_4bit)
    model = models.add_adapter(load_weights(of), of)
    assert adapted_layers(model) == LAYERS[name]
    assert all(".lora_" in key for key, weight in model.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing(name, section):
    assert torch.equal(
        logits(models.add_adapter(load_weights(section(name)), section(name))), logits(load_weights(section(name)))
    )


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_lora_on_the_head_is_refused_as_trl_does_not_train_it(targets, section):
    of = section(lora={"r": 4, "target_modules": targets})
    assert refusal(models.add_adapter, load_weights(of), of) == (
        "LoRA is on the output layer lm_head, where TRL does not train it; "
        "leave lm_head out of model.lora.target_modules, or write all-linear, which is without it"
    )


@pytest.mark.parametrize("others", [[], ["k_proj"]])
def test_a_target_that_the_model_has_not_is_named_with_the_nearest(others, section):
    of = section(lora={"r": 4, "target_modules": ["q_prj", *others]})
    assert refusal(models.add_adapter, load_weights(of), of) == (
        f"model.lora.target_modules holds q_prj, and {of.name} has no such module; did you mean 'q_proj'?"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_4bit_is_nf4_with_double_quantization_in_every_layer_of_the_blocks(name, section):
    model = load_weights(section(name, load_in_4bit=True, dtype="bfloat16"))
    quantized = {key: m for key, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert {key.rpartition(".")[2] for key in quantized} == LAYERS[name]
    for layer in quantized.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_in_4bit_after_an_evaluation_are_those_without_one(name, section, adapters):
    def gradients(evaluated: bool) -> dict[str, torch.Tensor]:
        of = section(name, load_in_4bit=True, dtype="bfloat16")
        model, _ = load_policy(of, Start(of.name, str(adapters[name]), ""))
        if evaluated:
            logits(model)
        torch.manual_seed(0)  # GPT-2 has dropout
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return {key: weight.grad for key, weight in model.named_parameters() if weight.requires_grad}

    without = gradients(evaluated=False)
    assert equal(gradients(evaluated=True), without)
    assert all(gradient.abs().max() > 0 for gradient in without.values())


def test_bitsandbytes_that_cannot_be_imported_is_named_with_the_remedy(section, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MachineError, match=r"bitsandbytes cannot be used here \(.*\); set model\.load_in_4bit=false"):
        models.quantization(section())


@pytest.mark.parametrize(
    ("lora", "dtype", "kept"),
    [(LORA, "bfloat16", torch.bfloat16), (None, "bfloat16", torch.float32), (LORA, "float32", torch.float32)],
)
def test_frozen_weights_are_kept_in_dtype_and_trained_ones_in_float32(lora, dtype, kept, section):
    model = load_weights(section(lora=lora, dtype=dtype))
    assert {weight.dtype for weight in model.parameters()} == {kept}


# --- policy and reference ---


@pytest.mark.parametrize(("in_4bit", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "bfloat16")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_policy_and_reference_both_start_as_the_sft_adapter_bit_for_bit(
    name, in_4bit, dtype, section, adapters, tokenizer, tmp_path
):
    of = section(name, load_in_4bit=in_4bit, dtype=dtype)
    policy, second = load_policy(of, Start(of.name, str(adapters[name]), ""))
    assert second is None
    trainer = dpo_trainer(policy, None, tokenizer, tmp_path)
    settle_adapters(policy, of, str(adapters[name]))
    saved = load_file(adapters[name] / "adapter_model.safetensors")
    for adapter in ("default", "ref"):
        found = {key.replace(".weight", ""): weight for key, weight in adapter_state(policy, adapter).items()}
        assert equal(found, {key.replace(".weight", ""): weight for key, weight in saved.items()})
    trainable = {key: weight.dtype for key, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trainable and set(trainable.values()) == {torch.float32}
    assert all(".default." in key for key in trainable)


def test_where_the_base_is_the_reference_no_copy_of_the_adapter_is_kept(section, adapters, tokenizer, tmp_path):
    of = section(reference="base")
    policy, second = load_policy(of, Start(of.name, str(adapters["llama"]), ""))
    dpo_trainer(policy, None, tokenizer, tmp_path)
    settle_adapters(policy, of, str(adapters["llama"]))
    assert second is None and list(policy.peft_config) == ["default"]
    with policy.disable_adapter():
        assert torch.equal(logits(policy), logits(load_weights(of)))


def test_a_fresh_adapter_on_a_full_sft_model_starts_as_that_model_which_stays_the_reference(
    section, folders, tokenizer, tmp_path
):
    of, sft = section("llama"), logits(load_weights(section("mistral")))
    policy, second = load_policy(of, Start(str(folders["mistral"]), None, ""))
    assert second is None and torch.equal(logits(policy), sft)
    dpo_trainer(policy, None, tokenizer, tmp_path)
    settle_adapters(policy, of)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += 0.1
    with use_adapter(policy, "ref"):
        assert torch.equal(logits(policy), sft)
    assert not torch.equal(logits(policy), sft)


@pytest.mark.parametrize(("reference", "expected"), [("sft", "mistral"), ("base", "llama")])
def test_without_lora_the_reference_is_a_second_model(reference, expected, section, folders):
    of = section("llama", lora=None, reference=reference)
    policy, second = load_policy(of, Start(str(folders["mistral"]), None, ""))
    assert torch.equal(logits(policy), logits(load_weights(section("mistral"))))
    assert torch.equal(logits(second), logits(load_weights(section(expected))))
    assert all(weight.requires_grad for weight in policy.parameters())


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_checkpoints_adapters_come_back_bit_for_bit(in_4bit, section, adapters, tokenizer, tmp_path):
    of = section("gpt2", load_in_4bit=in_4bit, dtype="bfloat16")

    def fresh() -> DPOTrainer:
        policy, _ = load_policy(of, Start(of.name, str(adapters["gpt2"]), ""))
        trainer = dpo_trainer(policy, None, tokenizer, tmp_path)
        settle_adapters(policy, of, str(adapters["gpt2"]))
        return trainer

    trained = fresh()
    for key, weight in trained.model.named_parameters():
        if ".default." in key:
            weight.data += 1e-6 * torch.randn_like(weight)
    trained.save_model(tmp_path / "checkpoint")
    resumed = fresh()
    assert not equal(adapter_state(resumed.model), adapter_state(trained.model))
    models.load_adapters(resumed.model, tmp_path / "checkpoint")
    assert equal(adapter_state(resumed.model), adapter_state(trained.model))
    assert equal(adapter_state(resumed.model, "ref"), adapter_state(trained.model, "ref"))
    assert not equal(adapter_state(resumed.model, "ref"), adapter_state(resumed.model))
    assert {weight.dtype for weight in adapter_state(resumed.model).values()} == {torch.float32}


KINDS = {
    "rank-stabilized": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "with biases of its own": {"lora_bias": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [6, 8]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_are_the_sft_model_at_the_start_and_after_resuming(kind, section, tokenizer, tmp_path):
    """Of every kind of LoRA that a recipe admits; the reference stays where it is while the policy moves."""
    of = section(lora={**LORA, **KINDS[kind]})
    tuned = models.add_adapter(load_weights(of), of)
    move(tuned, seed=1)
    tuned.save_pretrained(tmp_path / "sft")

    def started() -> PeftModel:
        policy, _ = load_policy(of, Start(of.name, str(tmp_path / "sft"), ""))
        dpo_trainer(policy, None, tokenizer, tmp_path)
        settle_adapters(policy, of, str(tmp_path / "sft"))
        return policy

    def as_reference(policy: PeftModel) -> torch.Tensor:
        with use_adapter(policy, "ref"):
            return logits(policy)

    sft, policy = logits(tuned), started()
    assert not torch.equal(sft, logits(load_weights(of)))
    assert torch.equal(logits(policy), sft) and torch.equal(as_reference(policy), sft)
    move(policy, seed=2)
    assert not torch.equal(logits(policy), sft) and torch.equal(as_reference(policy), sft)
    policy.save_pretrained(tmp_path / "checkpoint")
    resumed = started()
    models.load_adapters(resumed, tmp_path / "checkpoint")
    assert torch.equal(logits(resumed), logits(policy)) and torch.equal(as_reference(resumed), sft)


def move(model: PeftModel, seed: int) -> None:
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_no_start(init, section, tmp_path):
    """Its copy for the reference would take the same weights out of the base again."""
    of = section()
    model = load_weights(of)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA, init_lora_weights=init)).save_pretrained(tmp_path)
    assert refusal(load_policy, of, Start(of.name, str(tmp_path), "")) == (
        f"init_lora_weights of the adapter {tmp_path} is {init!r}; expected true, gaussian or orthogonal: "
        f"the reference needs a base that the adapter leaves as it is; merge it and start there"
    )


def test_an_adapter_with_whole_modules_is_no_start_in_half_precision(section, tmp_path):
    of = section(lora={**LORA, "modules_to_save": ["lm_head"]})
    models.add_adapter(load_weights(of), of).save_pretrained(tmp_path)
    narrow = section(dtype="bfloat16")
    assert refusal(load_policy, narrow, Start(of.name, str(tmp_path), "")) == (
        f"the adapter {tmp_path}: model.lora.modules_to_save is ['lm_head'], which are trained whole, in float32, "
        f"where the model computes in bfloat16; set model.dtype=float32, or leave it out"
    )


def test_trained_tokens_are_refused_where_the_head_shares_their_weights(section, folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "tied")
    config = AutoConfig.from_pretrained(tmp_path / "tied", tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    of = replace(section(lora={**LORA, "trainable_token_indices": [6]}), name=str(tmp_path / "tied"))
    assert refusal(models.add_adapter, load_weights(of), of) == (
        "LoRA is on the output layer lm_head, where TRL does not train it; "
        "it shares the embeddings' weights, so leave model.lora.trainable_token_indices out"
    )


# --- what DPO starts from ---


def test_it_starts_from_the_recipes_own_sft_adapter(section, adapters):
    of, sft = section("llama"), adapters["llama"]
    sentence = f"a frozen copy of the adapter of this recipe's SFT run ({sft})"
    assert find_start(of, sft) == Start(of.name, str(sft), sentence)


def test_it_starts_from_the_recipes_own_full_sft_model(section, folders):
    of, sft = section("llama", lora=None), folders["mistral"]
    assert find_start(of, sft) == Start(str(sft), None, f"this recipe's SFT run ({sft}), as a second, frozen copy")


def test_it_starts_from_the_adapter_that_the_recipe_names(section, adapters):
    of = section("gpt2", start=str(adapters["gpt2"]))
    assert find_start(of, None) == Start(of.name, of.start, f"a frozen copy of the adapter of model.start ({of.start})")


@pytest.mark.parametrize(
    ("lora", "how"), [(LORA, "with the new adapter switched off"), (None, "as a second, frozen copy")]
)
def test_it_starts_from_the_full_model_that_the_recipe_names(lora, how, section, folders):
    of = section("llama", lora=lora, start=str(folders["mistral"]))
    assert find_start(of, None) == Start(of.start, None, f"model.start ({of.start}), {how}")


def test_the_reference_is_the_base_where_the_recipe_says_so(section, adapters, folders):
    of = section("llama", reference="base")
    sft = adapters["llama"]
    assert find_start(of, sft) == Start(of.name, str(sft), f"the base model {of.name}, without this recipe's SFT run")
    full = section("llama", lora=None, start=str(folders["mistral"]), reference="base")
    assert find_start(full, None) == Start(full.start, None, f"the base model {full.name}, without model.start")


def test_a_base_beside_a_full_start_under_lora_is_refused(section, folders):
    of = section("llama", start=str(folders["mistral"]), reference="base")
    assert refusal(find_start, of, None) == (
        f"model.reference: base needs {of.name} in memory beside {of.start}; "
        f"point model.start at an adapter, or leave model.reference out"
    )


def test_an_adapter_of_another_base_is_refused(section, adapters, folders):
    of = section("llama", start=str(adapters["mistral"]))
    assert refusal(find_start, of, None) == (
        f"the adapter {of.start} was trained on {folders['mistral']}, and model.name is {of.name}; "
        f"set model.name to the base it belongs to"
    )


def test_the_same_base_by_another_path_is_accepted(section, adapters, folders, tmp_path):
    (tmp_path / "link").symlink_to(folders["llama"])
    of = replace(section(), name=str(tmp_path / "link"))
    assert find_start(of, adapters["llama"]).adapter == str(adapters["llama"])


def test_an_adapter_where_all_weights_are_trained_is_refused(section, adapters):
    of = section("llama", lora=None, start=str(adapters["llama"]))
    assert refusal(find_start, of, None) == (
        f"{of.start} is an adapter, but the recipe trains all weights; set model.lora, or merge it first"
    )


# --- what cannot be loaded ---


def refusal(call, *arguments, error: type[Exception] = ModelError) -> str:
    with pytest.raises(error) as raised:
        call(*arguments)
    return str(raised.value)


def test_a_tokenizer_without_eos_is_refused(section, tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    assert refusal(load_tokenizer, section(), str(tmp_path)) == (
        f"the tokenizer of {tmp_path} has no EOS token, so no reply could end; set eos_token in its config"
    )


def test_a_tokenizer_without_a_pad_token_pads_with_eos(section, tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    assert load_tokenizer(section(), str(tmp_path)).pad_token == "<eos>"
    assert load_tokenizer(section()).pad_token == "<pad>"


def test_a_recipes_chat_template_takes_the_place_of_the_tokenizers_own(section):
    assert load_tokenizer(section(chat_template="{{ messages }}")).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("load", "what"), [(load_weights, "model"), (load_tokenizer, "tokenizer"), (models.load_config, "config")]
)
def test_a_folder_that_is_not_there_is_named(load, what, section):
    assert refusal(load, section(name="/nowhere/at-all")) == f"there is no {what} at /nowhere/at-all"


def test_a_start_that_is_not_there_is_named(section):
    assert refusal(find_start, section(start="/nowhere/at-all"), None) == "there is no model at /nowhere/at-all"


def test_a_folder_without_weights_is_refused_in_one_line(section, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    said = refusal(load_weights, section(name=str(folder)))
    assert said.startswith(f"the model in {folder} cannot be loaded: ") and "no file named model.safetensors" in said
    assert "\n" not in said


def test_damaged_weights_are_refused_in_one_line(section, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    (folder / "model.safetensors").write_bytes(b"not weights")
    said = refusal(load_weights, section(name=str(folder)))
    assert said.startswith(f"the model in {folder} cannot be loaded: ") and "\n" not in said


def test_a_damaged_adapter_is_refused_in_one_line(section, adapters, tmp_path):
    folder = shutil.copytree(adapters["llama"], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"not weights")
    said = refusal(load_policy, section(), Start(section().name, str(folder), ""))
    assert said.startswith(f"the adapter in {folder} cannot be loaded: ") and "\n" not in said


@pytest.mark.parametrize(
    ("load", "what"), [(load_weights, "model"), (load_tokenizer, "tokenizer"), (models.load_config, "config")]
)
def test_a_hub_name_without_a_network_says_how_to_do_without(load, what, section, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(load, section(name="no-such/model-anywhere"), error=MachineError) == (
        f"the {what} of no-such/model-anywhere is neither on this machine nor can the hub be reached; "
        f"download it where there is a network and point model.name at the folder"
    )


def test_a_hub_start_without_a_network_names_its_own_setting(section, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    of = section(start="no-such/model-anywhere")

    def start_and_load() -> None:
        load_policy(of, find_start(of, None))

    said = refusal(start_and_load, error=MachineError)
    assert said.endswith("download it where there is a network and point model.start at the folder")


@pytest.fixture
def refusing_hub(refusing_hub, monkeypatch):
    """The hub's client, pointed at it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", refusing_hub)
    template = refusing_hub + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("load", [load_weights, load_tokenizer, models.load_config])
def test_a_gated_model_says_how_to_get_in(load, section, refusing_hub):
    assert refusal(load, section(name="some/gated")) == (
        "some/gated is gated: accept its terms on its hub page and log in with `hf auth login`, "
        "or point model.name at a local folder"
    )


@pytest.mark.parametrize("load", [load_weights, load_tokenizer, models.load_config])
def test_a_model_that_the_hub_does_not_know_is_named(load, section, refusing_hub):
    assert refusal(load, section(name="some/typo")) == (
        "the hub has no model some/typo, or hides it; check the name, or log in with `hf auth login`"
    )


@pytest.mark.parametrize("start", ["some/gated", "some/typo"])
def test_a_start_that_the_hub_refuses_is_named(start, section, refusing_hub):
    said = refusal(find_start, section(start=start), None)
    assert start in said and "hf auth login" in said and "model.name" not in said


GRANITE = {"hidden_size": 16, "intermediate_size": 16, "shared_intermediate_size": 16, "num_hidden_layers": 2}
GRANITE |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "mamba_n_heads": 2,
    "mamba_d_head": 16,
}


def granite(**more):
    config = AutoConfig.for_model("granitemoehybrid", **GRANITE, **more)
    return AutoModelForCausalLM.from_config(config)


def test_a_mixture_of_experts_has_what_trls_router_loss_asks_for():
    model = granite(layer_types=["mamba", "attention"], num_local_experts=2, output_router_logits=True)
    models.make_sampleable(model)
    assert model.config.num_experts == model.config.num_local_experts == 2
    assert not model.config.output_router_logits and "num_experts" not in model.config.to_dict()


def test_a_model_without_a_layer_of_attention_is_refused_in_one_line():
    with pytest.raises(ModelError, match="granitemoehybrid with no layer of attention") as e:
        models.make_sampleable(granite(layer_types=["mamba", "mamba"]))
    assert "\n" not in str(e.value)


def test_a_full_disk_is_not_taken_for_a_fault_of_the_model(section):
    with pytest.raises(OSError, match="No space left"), models.loading("model", section().name, section()):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_max_length_above_the_positions_is_refused(folders):
    config = AutoConfig.from_pretrained(folders["gpt2"])
    models.check_positions(config, 128, "sft")
    assert refusal(models.check_positions, config, 129, "dpo") == (
        "dpo.max_length is 129, but the model has 128 positions; "
        "lower data.max_prompt_tokens and data.max_reply_tokens, and dpo.max_length where it is written"
    )


# --- which weights these are ---


def test_the_hash_of_weights_changes_with_any_byte_of_them(adapters, tmp_path):
    folder = shutil.copytree(adapters["llama"], tmp_path / "adapter")
    before = weights_hash(folder)
    (folder / "README.md").write_text("another text")
    assert weights_hash(folder) == before == weights_hash(adapters["llama"])
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_hash(folder) != before


def test_weights_in_two_files_are_hashed_together(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"w": torch.zeros(3)}, tmp_path / name)
    before = weights_hash(tmp_path)
    (tmp_path / "model-2.safetensors").rename(tmp_path / "model-3.safetensors")
    assert weights_hash(tmp_path) != before


def test_a_folder_without_weights_has_no_hash(tmp_path):
    assert refusal(weights_hash, tmp_path) == f"{tmp_path} holds no weights (*.safetensors)"


def test_a_local_model_is_identified_by_its_weights(section, folders):
    assert models.identify(section()) == {"name": str(folders["llama"]), "weights": weights_hash(folders["llama"])}


def test_the_real_model_loads_as_transformers_loads_it(shared, section):
    folder = shared / "models" / "stories260K"
    of = section(name=str(folder))
    assert torch.equal(logits(load_weights(of)), logits(AutoModelForCausalLM.from_pretrained(folder)))
    tokenizer = load_tokenizer(of)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


# --- pickles, and code of a model's own ---


@pytest.fixture
def pickled(folders, tmp_path) -> Path:
    """The Llama's folder with its weights as a pickle."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["llama"] / name, folder)
    torch.save(AutoModelForCausalLM.from_pretrained(folders["llama"]).state_dict(), folder / "pytorch_model.bin")
    return folder


class Command:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_whole_pickle_of_weights_is_loaded(pickled, section):
    assert load_weights(section(name=str(pickled))).num_parameters() > 0


@pytest.mark.parametrize("how", ["empty", "cut", "text", "raw pickle", "refused", "flipped start", "flipped end"])
def test_a_pickle_that_cannot_be_loaded_is_named_in_one_line(pickled, section, how):
    file = pickled / "pytorch_model.bin"
    whole = file.read_bytes()
    contents = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"hello world",
        "raw pickle": pickle.dumps({"a": Command()}),
        "flipped start": whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        "flipped end": whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:],
    }
    if how == "refused":
        torch.save({"a": Command()}, file)
    else:
        file.write_bytes(contents[how])
    said = refusal(load_weights, section(name=str(pickled)))
    assert said.startswith(f"{file} cannot be loaded: ") and "\n" not in said
    assert said.endswith("; where you trust it, save it as safetensors")
    assert how != "refused" or ("torch refuses it" in said and "system" in said)


@pytest.mark.parametrize("load", [load_weights, models.load_config])
def test_code_of_a_models_own_names_the_setting_that_allows_it(load, section, tmp_path):
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "own.py").write_text("raise SystemExit('run unasked')")
    said = refusal(load, section(name=str(tmp_path)))
    assert said.startswith(f"{tmp_path} brings Python code of its own") and said.endswith(
        "model.trust_remote_code=true"
    )


# --- moved bases, ordered settings ---


def test_a_base_is_known_by_content_where_its_folder_has_moved(adapters, folders, section, tmp_path):
    """As after a move of the cache: the adapter names the old place, its run's manifest the weights."""
    run = Run(tmp_path / "sft")
    shutil.copytree(adapters["llama"], run.model)
    moved = shutil.copytree(folders["llama"], tmp_path / "moved")
    config = json.loads((run.model / models.ADAPTER_FILE).read_text())
    (run.model / models.ADAPTER_FILE).write_text(json.dumps({**config, "base_model_name_or_path": "/old/place"}))
    run.note(stage="sft", status="finished", base={"name": "/old/place", "weights": weights_hash(moved)})
    assert find_start(section(name=str(moved)), run.model).adapter == str(run.model)
    said = refusal(find_start, section(name=str(folders["gpt2"])), run.model)
    assert "was trained on other weights than those in" in said


def test_the_settings_of_equal_adapters_are_equal_files(folders, tmp_path):
    """PEFT writes a set in the order of the process's hash seed."""
    program = (
        "import sys; from alignlab.models.load import add_adapter, load_weights, settle_adapters\n"
        "from alignlab.recipe.load import ModelSection\n"
        "lora = {'r': 2, 'target_modules': 'all-linear'}\n"
        "section = ModelSection(name=sys.argv[1], dtype='float32', lora=lora)\n"
        "model = add_adapter(load_weights(section), section)\n"
        "settle_adapters(model, section); model.save_pretrained(sys.argv[2])\n"
    )
    for seed in "123":
        command = [sys.executable, "-c", program, folders["llama"], tmp_path / seed]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert len({(tmp_path / seed / models.ADAPTER_FILE).read_bytes() for seed in "123"}) == 1
