"""The recipes of models that people align today, at toy size: the real architecture, a template of the same shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl
from chat_models import chat_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alignlab.recipe.load import load_recipe
from alignlab.train.stages import train_dpo

DATA = Path(__file__).parent / "cases" / "02-split-names" / "uf"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SMOLLM3 = (  # as SmolLM3's: a system turn of its own with the day in it, and an empty thought where thinking is off
    "<|im_start|>system\n## Metadata\n\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
    "Reasoning Mode: {{ '/no_think' if not enable_thinking else '/think' }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not enable_thinking %}<think>\n\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {  # recipe → model type, what is its own in shape, its template, and what ends a reply
    "qwen3": ("qwen3", {"head_dim": 16}, "qwen3", "<|im_end|>"),
    "llama3": ("llama", {}, "llama3", "<|eot_id|>"),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 32}, "gemma3", "<end_of_turn>"),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}, None, "<|im_end|>"),
}
QUICK = [
    f"data.path={DATA}",
    "data.split=train_prefs",
    "data.test_split=test_prefs",
    "data.validation_share=0.3",
    "model.dtype=float32",
    "monitor.kl.prompts=2",
    "monitor.kl.max_new_tokens=4",
    *(f"{stage}.{name}=1" for stage in ("sft", "dpo") for name in ("max_steps", "logging_steps", "eval_steps")),
    *(f"{stage}.gradient_accumulation_steps=2" for stage in ("sft", "dpo")),
]


def save_model(name: str, folder: Path) -> Path:
    kind, own, template, end = MODELS[name]
    text = (TEMPLATES / f"{template}.jinja").read_text() if template else SMOLLM3
    tokenizer = chat_tokenizer(text, eos=end)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    shape = {**SHAPE, **own, **ids, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_trains_its_architecture_in_its_own_format(name, tmp_path):
    """SFT and DPO in 4-bit as the recipe has them; that both start where they should is checked in every run."""
    recipe = load_recipe(name, [f"model.name={save_model(name, tmp_path / 'model')}", *QUICK])
    run = train_dpo(recipe, root=tmp_path / "runs")
    assert run.is_finished and run.manifest.consumed["model"]["load_in_4bit"]
    assert MODELS[name][3] in run.manifest.stops and sum(run.manifest.data.kept.values()) == 17
    prompt = run.samples()[0]["prompt"]
    assert ("<think>\n\n</think>" in prompt) == (name in ("qwen3", "smollm3"))
    assert "How do I" in prompt and prompt.count("How do I") == 1
