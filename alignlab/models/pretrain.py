"""The embedded base model: a byte-level BPE tokenizer and a tiny Llama, trained on the spot and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from alignlab.data import toy
from alignlab.disk import cache_folder, make_once
from alignlab.recipe.load import ToySection

BLOCK = 128  # tokens to a training example
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TRAINING = {
    "max_steps": 400,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.01,
}


def base_model(section: ToySection) -> Path:
    """The folder of the embedded base model for this seed, trained once (about 20 s on 2 cores) and then reused."""
    folder = cache_folder() / f"toy-base-{_key(section)}"
    make_once(folder, "base model", lambda beside: _train_into(beside, section))
    return folder


def _key(section: ToySection) -> str:
    facts = [section.seed, BLOCK, SHAPE, TRAINING, torch.__version__, hashlib.sha256(_text(section)).hexdigest()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _text(section: ToySection) -> bytes:
    return "\n".join(toy.corpus(section)).encode()


def _train_into(folder: Path, section: ToySection) -> None:
    set_seed(section.seed)
    notes, words = list(toy.corpus(section)), tokenizer(section)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=words.eos_token_id, bos_token_id=None))
    with tempfile.TemporaryDirectory() as unused:
        quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        cpu = not torch.cuda.is_available()
        settings = TrainingArguments(output_dir=unused, seed=section.seed, use_cpu=cpu, **quiet, **TRAINING)
        trainer = Trainer(model=model, args=settings, train_dataset=_blocks(notes, words))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def tokenizer(section: ToySection) -> PreTrainedTokenizerFast:
    """The embedded base model's: byte-level BPE with `<eos>` and `<pad>`."""
    texts = [*toy.corpus(section), *(row["chosen"] for row in toy.rows(section) if row["split"] == "train")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def _blocks(notes: list[str], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    stream = [token for ids in tokenizer(notes)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    blocks = [stream[i : i + BLOCK] for i in range(0, len(stream) - BLOCK + 1, BLOCK)]
    return [{"input_ids": block, "labels": block} for block in blocks]
