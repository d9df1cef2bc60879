"""Tokenizers with chat templates of every kind, and models that answer each prompt with the same words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = (  # markers that no token stands for
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}[/GONE]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
BARE = (  # nothing behind a reply but the next turn
    "{% for m in messages %}{{ 'Q' if m['role'] == 'user' else 'A' }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
BEFORE_NEXT = (  # the end of a turn stands only where another turn follows
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|><|assistant|>{% endif %}"
)
THINK = (  # as Qwen 3: a thought, empty where there is none, before the last reply alone
    "{%- for m in messages %}{%- if m['role'] == 'assistant' %}{%- set t = m.get('reasoning_content') or '' %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ t }}\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{%- endif %}"
)
OPENED = (  # as DeepSeek R1: the prompt opens a thought, and no turn shows one
    "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}"
    "<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
DATED = LLAMA.replace("{% for", "Now: {{ strftime_now('%d %b %Y %H:%M:%S %f') }}{% for", 1)
TOOLS = CHATML.replace("{% for", "{% if tools %}{{ tools | tojson }}{% endif %}{% for", 1)


def chat_tokenizer(template: str | None, *, eos: str = "<eos>", plain: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A token a character, and one for each marker of the template; those of `plain` are no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE({word: number for number, word in enumerate(["<eos>", "<bos>", "<pad>", *alphabet])}, [])
    )
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    markers = set(re.findall(r"<[|｜]?/?[\w▁]+[|｜]?>", template or "")) - {"<think>", "</think>"}
    markers |= {f"<|{role}|>" for role in ("user", "assistant", "system")} if "<|{{" in (template or "") else set()
    bpe.add_tokens([AddedToken(word, special=False, normalized=False) for word in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token="<bos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(markers - {eos})})
    tokenizer.chat_template = template
    return tokenizer


def save_parrot(folder: Path, tokenizer: PreTrainedTokenizerFast, begins: str, says: str) -> Path:
    """A model in a folder that has read `begins` and writes `says`, then both again and again.

    Its layers add nothing, so that a word alone decides the next one: no word may stand there twice.
    """
    ids = tokenizer(begins + says, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids), "a word stands twice"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **shape, **ends))
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        words = torch.nn.functional.normalize(torch.randn_like(model.model.embed_tokens.weight), dim=-1)
        model.model.embed_tokens.weight.copy_(words)
        for this, following in [*itertools.pairwise(ids), (ids[-1], ids[0])]:
            model.lm_head.weight[following] += 8 * words[this]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
