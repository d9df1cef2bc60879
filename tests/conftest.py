"""What every test stands on: a cache of its own, no account, and real models small enough to build on the spot."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported: some libraries read their environment only once."""
    if hasattr(config, "workerinput"):  # one of several processes: they share the first one's cache
        return
    cache = tempfile.mkdtemp(prefix="alignlab-test-cache-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ |= {"ALIGNLAB_CACHE": cache, "WANDB_MODE": "disabled", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # tiny models: threads only wait


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real datasets, tokenizers and models, which lies beside a checkout where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the material in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 400 words, trained on the toy's dialogues."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from alignlab import toy
    from alignlab.recipe import ToySection

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((row["chosen"] for row in toy.rows(ToySection(pairs=100))), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def folders(tokenizer, tmp_path_factory) -> Mapping[str, Path]:
    """Folders of random models (2 layers, 64 wide) with the tokenizer: `gpt2`, `llama` and `mistral`."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    apart = {"initializer_range": 0.2}  # far from uniform, so that rounding never decides which word is likeliest
    configs = {
        "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **words, **apart),
        "llama": LlamaConfig(**shape, max_position_embeddings=128, **words, **apart),
        "mistral": MistralConfig(**shape, num_key_value_heads=2, max_position_embeddings=128, **words, **apart),
    }
    root = tmp_path_factory.mktemp("models")
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in configs}


@pytest.fixture
def load(folders):
    """Loads one of the random models, in float32 and ready for evaluation."""
    from transformers import AutoModelForCausalLM

    return lambda name: AutoModelForCausalLM.from_pretrained(folders[name], dtype="float32").eval()
