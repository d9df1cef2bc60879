"""A pytest plugin: TRL's tests with a trainer of choice, and stand-ins for the models and datasets of the hub."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import import_utils

OWNER = "trl-internal-testing/"
SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# model → model type, what it needs besides SIZE, chat template that TRL ships for it
MODELS = {
    "tiny-Cohere2ForCausalLM": ("cohere2", {"logit_scale": 0.125, "head_dim": 4}, "cohere2"),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {"n_routed_experts": 4, "head_dim": 8, **EXPERTS}, "glm4moe"),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "gptoss"),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}, "qwen2_5"),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 4, "head_dim": 8, **EXPERTS}, "qwen3"),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}, "qwen2_5"),
    "tiny-Lfm2ForCausalLM": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}, "lfm2"),
    "tiny-Lfm2ForCausalLM-2.5": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
        "lfm2_2_5",
    ),
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>")
THINGS = "boats roads hats birds lamps rivers stones trees books clouds doors fields".split()
FOLDER = Path(os.environ["CONTRACT_FOLDER"])


def pairs(kind: str) -> list[dict]:
    """Preference rows in the columns of TRL's test datasets."""
    rows = []
    for number, thing in enumerate(THINGS * 2):
        prompt = f"Tell me about {thing}, please, in {2 + number} words."
        chosen, rejected = f"Most {thing} are old, and well made.", f"No idea what {thing} are! Ask somebody else."
        if "conversational" not in kind:
            row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            before = prompt
        else:
            said = lambda role, text: [{"role": role, "content": text}]
            row = {
                "prompt": said("user", prompt),
                "chosen": said("assistant", chosen),
                "rejected": said("assistant", rejected),
            }
            before = row["prompt"]
        if "implicit" in kind:
            row = {"chosen": before + row["chosen"], "rejected": before + row["rejected"]}
        rows.append(row)
    return rows


def harmony() -> list[dict]:
    rows = []
    for row in pairs("conversational"):
        thought = [
            {"role": "assistant", "content": reply[0]["content"], "thinking": "Let me see."}
            for reply in (row["chosen"], row["rejected"])
        ]
        rows.append(
            {
                "prompt": row["prompt"],
                "chosen": [thought[0]],
                "rejected": [thought[1]],
                "chat_template_kwargs": {"reasoning_effort": "low"},
            }
        )
    return rows


def tool_calls() -> list[dict]:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What the weather is like.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
    call = lambda place: {"type": "function", "function": {"name": "weather", "arguments": {"place": place}}}
    return [
        {
            "prompt": [{"role": "user", "content": f"How is the weather among {thing}?"}],
            "chosen": [{"role": "assistant", "tool_calls": [call(thing)]}],
            "rejected": [{"role": "assistant", "content": "I cannot tell."}],
            "tools": [tool],
        }
        for thing in THINGS
    ]


def load_dataset(name: str, config: str | None = None, split: str | None = None, streaming: bool = False, **kwargs):
    if not name.startswith(OWNER):
        raise FileNotFoundError(f"no stand-in for the dataset {name}")
    kind = name.removeprefix(OWNER)
    if kind in ("zen-image", "zen-multi-image"):
        raise FileNotFoundError(f"no stand-in for the dataset {name}")
    rows = harmony() if kind == "harmony" else tool_calls() if kind == "toolcall" else pairs(config or "")
    whole = datasets.Dataset.from_list(rows)
    parts = datasets.DatasetDict({"train": whole, "test": whole.select(range(4))})
    made = parts[split] if split else parts
    return made.to_iterable_dataset() if streaming else made


def model_folder(name: str) -> str:
    """A random model of this name, made once."""
    folder = FOLDER / name
    if not folder.is_dir():
        kind, more, template = MODELS[name]
        words = tokenizer(template)
        config = AutoConfig.for_model(kind, **SIZE, vocab_size=len(words), max_position_embeddings=2048, **more)
        config.eos_token_id = config.pad_token_id = words.eos_token_id
        config.bos_token_id = None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        model.generation_config.eos_token_id = words.eos_token_id
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return str(folder)


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    source = (importlib.resources.files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    texts = [row[column] for row in pairs("standard") for column in row] + [source]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([AddedToken(each) for each in SPECIAL])
    eos = "<|return|>" if template == "gptoss" else "<|im_end|>"
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<|endoftext|>")
    made.chat_template = source
    return made


def from_the_hub(loader):
    """`from_pretrained` that takes a stand-in for a model of TRL's tests."""
    original = loader.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        if str(name).startswith(OWNER):
            short = str(name).removeprefix(OWNER)
            if short not in MODELS:
                pytest.skip(f"no stand-in for the model {short}")
            name = model_folder(short)
        return original(cls, name, *args, **kwargs)

    loader.from_pretrained = classmethod(from_pretrained)


for each in (
    transformers.AutoConfig,
    transformers.AutoModelForCausalLM,
    transformers.AutoTokenizer,
    transformers.AutoProcessor,
    transformers.PreTrainedModel,
    transformers.GenerationConfig,
):
    from_the_hub(each)
datasets.load_dataset = load_dataset


def _gone(name: str):
    """What a checkout that is older than the installed TRL asks for and no longer finds: "is X there?" No."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


import_utils.__getattr__ = _gone

SETTING = os.environ["CONTRACT_TRAINER"]
if SETTING != "stock":
    from trl import DPOTrainer

    from alignlab.train.trainers import AlignDPOTrainer

    class ContractTrainer(AlignDPOTrainer):
        """AlignDPOTrainer on rows that TRL has tokenized, as `prepare` would have."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.share_prefixes("auto" if SETTING == "auto" else True)

        def _prepare_dataset(self, dataset, *args, **kwargs):
            rows = DPOTrainer._prepare_dataset(self, dataset, *args, **kwargs)
            return super()._prepare_dataset(rows, *args, **kwargs)

    trl.DPOTrainer = ContractTrainer
