"""Peak memory of QLoRA DPO steps at real 7B shapes on this GPU, beside the plan.

    python tests/bench/memory_gpu.py                    # Llama-2-7B and Mistral-7B, 512 to 2048 tokens, 1 to 4 pairs
    python tests/bench/memory_gpu.py --toy              # the same at toy size on a CPU: does it run, do the sums hold

Weights are random, quantized layer by layer on the device, so that no whole model is ever there in 16 bits. Each cell
is two optimizer steps of two micro-batches by alignlab's own trainer: a frozen copy of the adapter as the reference,
scored online, gradient checkpointing, AdamW. Every prompt and reply is as long as it may be, except that one reply is
a token shorter: a batch of equal lengths needs no mask. Peaks are `torch.cuda.max_memory_allocated`; on a CPU they are
the bytes of tensors after each operation. Results go to tests/bench/results/memory-GPU.json;
--toy only prints.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import DPOConfig

from alignlab.memory.plan import GIB, plan
from alignlab.models import load as models
from alignlab.recipe.arguments import TrainingContext, trl_arguments
from alignlab.recipe.load import Recipe, load_recipe
from alignlab.train.probe import MICRO_BATCHES, QUIET, STEPS, measured
from alignlab.train.trainers import AlignDPOTrainer

RESULTS = Path(__file__).parent / "results"
MODELS = {"llama2": LlamaConfig(), "mistral": MistralConfig()}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
TOYS = {
    "llama2": LlamaConfig(vocab_size=500, **SMALL, head_dim=32),
    "mistral": MistralConfig(vocab_size=500, **SMALL, num_key_value_heads=2, head_dim=32),
}
LENGTHS, PAIRS = (512, 1024, 2048), (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy shapes on a CPU")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args()
    lengths, configs = ((32, 64), TOYS) if args.toy else (LENGTHS, MODELS)
    if not (args.toy or torch.cuda.is_available()):
        parser.error("there is no GPU here; --toy runs the same at toy size on a CPU")
    name = "toy on a CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    cells = [cell for model in args.models for cell in compare(model, configs[model], lengths)]
    worst = max(abs(cell["difference"]) for cell in cells)
    print(f"{name}: largest difference {worst:.1%} of {len(cells)} cells")
    if not args.toy:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"memory-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        facts = {"device": name, "unit": "GiB", "versions": versions, "cells": cells}
        file.write_text(json.dumps(facts, indent=1) + "\n")


def compare(name: str, config, lengths: tuple[int, ...]) -> list[dict]:
    recipe = load_recipe(name, ["dpo.gradient_checkpointing=true"])
    weights, cells = quantized(config, recipe), []
    for length in lengths:
        for pairs in PAIRS:
            cells.append(cell(name, recipe, weights, config, length, pairs))
            line = "{model} {length} tokens × {pairs}: {measured:.3f}, planned {planned:.3f} GiB ({difference:+.1%})"
            print(line.format(**cells[-1]), flush=True)
    return cells


def cell(name: str, recipe: Recipe, weights: PreTrainedModel, config, length: int, pairs: int) -> dict:
    """Two steps on rows of `length` tokens, half of them prompt, as the plan takes them to be."""
    found = plan(recipe, "dpo", cuda=torch.cuda.is_available(), batch=pairs, length=length, config=config)
    policy = models.add_adapter(weights, recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(policy, recipe, rows(length, pairs, config.vocab_size), pairs, Path(folder))
        with measured(trainer.model, trainer) as took:
            trainer.train()
    del trainer
    policy.unload()
    gc.collect()
    torch.cuda.empty_cache()
    sizes = {key: round(size / GIB, 4) for key, size in took.items()}
    return {
        "model": name,
        "length": length,
        "pairs": pairs,
        "measured": sizes["peak"],
        "reserved": sizes.get("reserved"),
        "planned": round(found.step / GIB, 4),
        "difference": round(took["peak"] / found.step - 1, 4),
    }


def make_trainer(policy, recipe: Recipe, pairs: Dataset, batch: int, folder: Path) -> AlignDPOTrainer:
    cpu = not torch.cuda.is_available()
    given = {**trl_arguments(recipe, "dpo", TrainingContext(folder, len(pairs), cpu)), **QUIET}
    given |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": MICRO_BATCHES, "max_steps": STEPS}
    args = DPOConfig(**{**given, "max_length": None})
    trainer = AlignDPOTrainer(policy, None, args, train_dataset=pairs, processing_class=tokenizer())
    trainer.remove_callback(PrinterCallback)
    models.settle_adapters(policy, recipe.model)
    return trainer


def rows(length: int, batch: int, words: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, words, (count,), generator=generator).tolist()
    prompt, reply = length - length // 2, length // 2
    made = [{"prompt_ids": draw(prompt), "chosen_ids": draw(reply), "rejected_ids": draw(reply)} for _ in range(batch)]
    made[0]["rejected_ids"].pop()
    return Dataset.from_list(made * STEPS * MICRO_BATCHES)


def tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens: the rows are ids already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")


def quantized(config, recipe: Recipe) -> PreTrainedModel:
    """A model of random weights in NF4 with double quantization, as `from_pretrained` would leave it."""
    import bitsandbytes as bnb
    from transformers.quantizers import AutoHfQuantizer

    settings = models.quantization(recipe.model)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", settings.bnb_4bit_compute_dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            features = module.in_features, module.out_features
            new = bnb.nn.Linear4bit(*features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            weight = torch.randn(module.weight.shape, dtype=dtype, device=device) * 0.02
            how = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
            new.weight = bnb.nn.Params4bit(weight, **how).to(device)
            model.set_submodule(name, new)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                fill = torch.ones if weight.dim() == 1 else torch.randn
                made = fill(weight.shape, dtype=dtype, device=device) * (1 if weight.dim() == 1 else 0.02)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    return model


if __name__ == "__main__":
    main()
