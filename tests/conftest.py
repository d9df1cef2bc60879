"""What every test stands on: a cache of its own, no account, and real models small enough to build on the spot."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from fake_hub import Refusing, serving

SHARED = Path(__file__).parents[2] / "shared"
FOREIGN = ("WANDB_", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
SMALL = """
about: never trained
extends: tiny
dpo: {beta: 0.7, max_steps: 4}
monitor: {kl: {max_new_tokens: 8}}
"""
SECONDS = """
about: seconds on a CPU
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 6, learning_rate: 1.0e-2, logging_steps: 1, eval_steps: 3, per_device_eval_batch_size: 8}}
dpo: {{max_steps: 6, learning_rate: 1.0e-3, logging_steps: 1, eval_steps: 3, per_device_eval_batch_size: 8}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}}}
"""


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported: some libraries read their environment only once."""
    if hasattr(config, "workerinput"):  # one of several processes: they share the first one's cache
        return
    cache = tempfile.mkdtemp(prefix="alignlab-test-cache-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:  # the hub on loopback is asked as a hub is
        del os.environ[name]
    os.environ |= {"ALIGNLAB_CACHE": cache, "WANDB_MODE": "disabled", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # tiny models: threads only wait


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the notebooks out unless `-m` names them, whatever else it selects."""
    if "lab" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("lab")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real datasets, tokenizers and models, which lies beside a checkout where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the material in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def words():
    """One token a character, BOS in front: lengths that a reader can count."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    """The URL of a hub on loopback that knows one gated repository, some/gated, and no other."""
    with serving(Refusing) as url:
        yield url


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A working directory with the recipe `small`, which is for reading and never trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture(scope="session")
def of_seconds() -> Callable[[Path], str]:
    """A function: a model's folder → the text of a recipe whose SFT and DPO take seconds."""
    return lambda model: SECONDS.format(name=model)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 400 words, trained on the toy's dialogues."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from alignlab.data import toy
    from alignlab.recipe.load import ToySection

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


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless; a test that needs it is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs a Chromium on the path")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
