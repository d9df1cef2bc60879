"""The shapes of a model's parts, read from its config alone; imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import MachineError, ModelError
from alignlab.recipe import ModelSection

GATED = ("llama", "mistral", "qwen2")  # RMSNorm, rotary positions and a gated MLP
FAMILIES = (*GATED, "gpt2")

# The defaults of transformers' LlamaConfig, MistralConfig and GPT2Config are these models' shapes; a test compares.
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA,
    "mistralai/Mistral-7B-v0.1": {
        **_LLAMA,
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    "toy": {  # pretrain.SHAPE
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    },
}
# Which layers PEFT adapts where `target_modules` is left out (peft.utils.constants, PEFT 0.21)
UNWRITTEN_TARGETS = {"gpt2": ["c_attn"], **{family: ["q_proj", "v_proj"] for family in GATED}}


@dataclass(frozen=True)
class Linear:
    """One linear map of a layer, by its path in the layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """A decoder's parts in numbers of features."""

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    learned_positions: int  # 0 where positions are rotary
    tied: bool  # one matrix is embedding and LM head
    window: int | None  # how far back a token sees
    attention_bias: bool  # of q, k and v
    output_bias: bool  # of the attention's output
    mlp_bias: bool
    dropout: float  # the model's own, as in GPT-2

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear maps of one layer, which are what 4-bit loading quantizes and LoRA adapts."""
        h, m, a, kv = self.hidden, self.intermediate, self.heads * self.head_size, self.kv_heads * self.head_size
        if self.family == "gpt2":
            attention = (Linear("attn.c_attn", h, 3 * h, True), Linear("attn.c_proj", h, h, True))
            return (*attention, Linear("mlp.c_fc", h, m, True), Linear("mlp.c_proj", m, h, True))
        return (
            Linear("self_attn.q_proj", h, a, self.attention_bias),
            Linear("self_attn.k_proj", h, kv, self.attention_bias),
            Linear("self_attn.v_proj", h, kv, self.attention_bias),
            Linear("self_attn.o_proj", a, h, self.output_bias),
            Linear("mlp.gate_proj", h, m, self.mlp_bias),
            Linear("mlp.up_proj", h, m, self.mlp_bias),
            Linear("mlp.down_proj", m, h, self.mlp_bias),
        )

    @property
    def embeddings(self) -> int:
        """Numbers in the embedding, in learned positions, and in the LM head where it is a matrix of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.learned_positions * self.hidden

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden * (2 if self.family == "gpt2" else 1)

    @property
    def biases(self) -> int:
        return self.layers * sum(linear.outputs for linear in self.linears if linear.bias)

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def parameters(self) -> int:
        return self.embeddings + self.norms + self.biases + self.linear_weights


def read_shape(section: ModelSection, name: str | None = None) -> Shape:
    """The model's shape from the `config.json` of a folder or of the hub; those of the shipped recipes are known.

    Raises ModelError for an architecture whose parts are not known, or where the config lacks a number.
    """
    name = name or section.name
    if name in SHIPPED and not Path(name).is_dir():
        return shape_of(SHIPPED[name], name)
    file = _config_file(name, section.revision)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file} cannot be read as JSON: {e}") from None
    return shape_of(config, name)


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a config describes; ModelError names what is missing."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(
            f"no memory plan for {name}: the parts of a {family or 'model without model_type'} layer are not known "
            f"({_unknown(config)}); known are {', '.join(FAMILIES)}"
        )
    ours = (
        ("n_embd", "n_layer", "n_head")
        if family == "gpt2"
        else ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    needed = ("vocab_size", *ours, "n_positions" if family == "gpt2" else "intermediate_size")
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise ModelError(f"no memory plan for {name}: its config.json lacks {', '.join(missing)}")
    hidden, layers, heads = (config[key] for key in ours)
    gpt2, qwen = family == "gpt2", family == "qwen2"
    bias = bool(config.get("attention_bias")) or gpt2
    return Shape(
        family=family,
        vocabulary=config["vocab_size"],
        hidden=hidden,
        intermediate=(config.get("n_inner") or 4 * hidden) if gpt2 else config["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=heads if gpt2 else config.get("num_key_value_heads") or heads,
        head_size=hidden // heads if gpt2 else config.get("head_dim") or hidden // heads,
        learned_positions=config["n_positions"] if gpt2 else 0,
        tied=bool(config.get("tie_word_embeddings", gpt2)),
        window=config.get("sliding_window") if config.get("use_sliding_window", not qwen) else None,
        attention_bias=bias or qwen,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")) or gpt2,
        dropout=max(config.get(f"{part}_pdrop", 0.1) for part in ("attn", "resid")) if gpt2 else 0.0,
    )


def _unknown(config: Mapping[str, Any]) -> str:
    """The numbers in a config that speak of parts which no formula here covers."""
    words = ("expert", "state", "conv", "rank", "block", "router", "vision", "text_config", "encoder")
    found = [key for key in config if any(word in key for word in words) and config[key]]
    return ", ".join(found[:6]) if found else "its projections, norms and activations"


def targeted(shape: Shape, lora: Mapping[str, Any]) -> tuple[Linear, ...]:
    """The linear maps of a layer that LoRA adapts, by PEFT's rules for `target_modules`."""
    wanted = lora.get("target_modules") or UNWRITTEN_TARGETS[shape.family]
    if wanted == "all-linear":
        return shape.linears
    if isinstance(wanted, str):  # a regular expression over the whole path
        paths = {
            linear: f"{'transformer.h' if shape.family == 'gpt2' else 'model.layers'}.0.{linear.name}"
            for linear in shape.linears
        }
        return tuple(linear for linear, path in paths.items() if re.fullmatch(wanted, path))
    return tuple(of for of in shape.linears if any(f".{of.name}".endswith(f".{target}") for target in wanted))


def quantized_bytes(weights: int) -> int:
    """Bytes of one weight matrix in NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3).

    Half a byte a weight; of each block of 64 its absmax in 8 bits; of each 256 of those their own absmax in float32;
    and bitsandbytes' two code tables (16 and 256 float32) with an offset.
    """
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def _config_file(name: str, revision: str | None) -> Path:
    folder = Path(name)
    if folder.is_dir() or folder.is_absolute():
        if (folder / "config.json").is_file():
            return folder / "config.json"
        raise ModelError(f"{name} has no config.json, from which the shapes for a memory plan come")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on its hub page and log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(f"the hub has no model {name}, or hides it; check model.name") from None
    except (OSError, HfHubHTTPError, ValueError):
        raise MachineError(
            f"the config of {name} is neither on this machine nor can the hub be reached; point model.name at a folder"
        ) from None
