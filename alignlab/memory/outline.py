"""A recipe's model in shapes alone: its config, its kinds of layers, and the model itself without any numbers."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from alignlab.errors import ModelError
from alignlab.models import load as models
from alignlab.recipe.load import ModelSection

# Configs of the shipped recipes' models, as far as they differ from transformers' defaults for their model type
SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {"model_type": "llama"},
    "mistralai/Mistral-7B-v0.1": {"model_type": "mistral"},
    "openai-community/gpt2": {"model_type": "gpt2"},
}
MOST_KINDS = 4  # of layers, before a model is measured whole


def config_of(section: ModelSection) -> PreTrainedConfig:
    """The config of the recipe's model; for a shipped recipe no file and no network is needed."""
    if section.name == "toy":
        from alignlab.models.pretrain import SHAPE

        return AutoConfig.for_model("llama", **SHAPE)
    if section.name in SHIPPED and not Path(section.name).is_dir():
        return AutoConfig.for_model(**SHIPPED[section.name])
    return models.load_config(section)


def outline(config: PreTrainedConfig, section: ModelSection) -> PreTrainedModel:
    """The model on torch's meta device, in the dtype that `model.load_weights` gives it."""
    dtype = (
        torch.float32 if section.lora is None or section.dtype == "float32" else torch.bfloat16
    )  # float16 is as wide
    chosen = section.attn_implementation if section.attn_implementation in ("sdpa", "eager") else None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=dtype, attn_implementation=chosen, trust_remote_code=section.trust_remote_code
            )
    except (ValueError, ImportError) as e:
        raise ModelError(
            f"no memory plan for {section.name}: transformers makes no language model of its config "
            f"({str(e).strip().splitlines()[0][:200]})"
        ) from e


def matrix_weights(config: PreTrainedConfig, section: ModelSection) -> int:
    """Weights that a token is multiplied with: all matrices but embeddings, and of experts those that are chosen."""
    model, text, count = outline(config, section), config.get_text_config(), 0.0
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    share = getattr(text, "num_experts_per_tok", experts) / experts
    for module in model.modules():
        for weight in () if isinstance(module, nn.Embedding) else module._parameters.values():
            if weight is not None and weight.dim() > 1:
                count += weight.numel() * (share if weight.dim() == 3 else 1)
    return round(count)


def samples(model: PreTrainedModel) -> list[tuple[list[int], int]]:
    """Which layers to measure, and how often each measurement counts, so that the sum stands for all layers.

    Each layer of a kind adds as much as any other but the first and the last. So a model with two layers of each kind
    is measured, and for each kind that has more of them a model with a third: the difference is what a layer adds.
    """
    kinds: dict[Any, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers_of(model)):
        kinds[type(layer), tuple((name, weight.shape) for name, weight in layer.named_parameters())].append(number)
    if len(kinds) > MOST_KINDS:
        return [([*range(len(layers_of(model)))], 1)]
    few = [number for numbers in kinds.values() for number in numbers[:2]]
    more = [(sorted([*few, numbers[2]]), len(numbers) - 2) for numbers in kinds.values() if len(numbers) > 2]
    return [(sorted(few), 1 - sum(times for _, times in more)), *more]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    found = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not found:
        raise ModelError(f"no memory plan: {type(model).__name__} does not keep its layers in one list")
    return found[0]


def keep_layers(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Leaves only these layers in the model."""
    config, layers = model.config.get_text_config(), layers_of(model)
    kept = nn.ModuleList([layers[number] for number in numbers])
    for module in model.modules():
        for name, child in module._modules.items():
            if child is layers:
                module._modules[name] = kept
    config.num_hidden_layers = len(kept)
    if types := vars(config).get("layer_types"):
        config.layer_types = [types[number] for number in numbers]
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place


def quantize(model: PreTrainedModel, section: ModelSection) -> None:
    """Puts bitsandbytes' 4-bit layers in place of linear ones, as loading does."""
    settings = models.quantization(replace(section, dtype="bfloat16" if section.dtype == "float16" else section.dtype))
    dtype = model.dtype
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map=None)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
    model.is_loaded_in_4bit = True


@contextlib.contextmanager
def own_tables() -> Iterator[None]:
    """Takes away what bitsandbytes keeps of tensors without content: weights quantized with it later would be zeros."""
    from bitsandbytes import functional
    from bitsandbytes.backends.default import ops

    before = dict(functional.name2qmap)
    try:
        yield
    finally:
        functional.name2qmap.clear()
        functional.name2qmap.update(before)
        ops._get_4bit_quantize_bounds.cache_clear()


def fill(model: nn.Module) -> None:
    """Gives every parameter and buffer a tensor, which under `Fakes` has a size only; tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:
                    made[id(weight)] = _filled(weight)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _filled(weight: nn.Parameter) -> nn.Parameter:
    tensor = torch.empty(weight.shape, dtype=torch.float32 if weight.requires_grad else weight.dtype)
    if not hasattr(weight, "quant_state"):
        return nn.Parameter(tensor, requires_grad=weight.requires_grad)
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
    filled = nn.Parameter(packed, requires_grad=False)
    filled.quant_state = state
    return filled
