"""A memory plan is checked part by part against what real tensors take, to 2 %."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from alignlab import model as models
from alignlab.cli import main
from alignlab.errors import ModelError, RecipeError
from alignlab.plan import change, layers, memory, plan_line, verdict
from alignlab.plan.memory import GIB, plan
from alignlab.plan.shapes import SHIPPED, UNWRITTEN_TARGETS, quantized_bytes, shape_of
from alignlab.plan.tape import Tape, walk
from alignlab.probe import Meter, held_tensors, probe
from alignlab.recipe import load_recipe

RECIPE = """
data: {{source: toy, max_prompt_tokens: 72, max_reply_tokens: 48, toy: {{pairs: 60}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{per_device_train_batch_size: 4, gradient_checkpointing: false}}
dpo: {{per_device_train_batch_size: 4, gradient_checkpointing: false}}
"""


@pytest.fixture
def recipe_of(folders, tmp_path):
    """A function: a random model's name and overrides → a recipe on it."""

    def make(name: str, *overrides: str):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=folders[name]))
        lora = {"gpt2": ["model.lora.fan_in_fan_out=true"]}.get(name, [])
        lora = [] if "model.lora=null" in overrides else lora
        return load_recipe(str(tmp_path / f"{name}.yaml"), [*lora, *overrides])

    return make


@pytest.fixture
def narrow_head(monkeypatch):
    """TRL's LM head in tiles of 64 words, so that its buffers do not hide what the layers take."""
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr(layers, "TILE_WORDS", 64)
    memory._walk_head.cache_clear()
    yield
    memory._walk_head.cache_clear()


def part(found, name: str) -> float:
    return sum(p.bytes for p in found.resident if p.name.startswith(name))


def bytes_of(tensors) -> int:
    """Of tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# --- shapes ---


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("meta-llama/Llama-2-7b-hf", LlamaConfig),
        ("mistralai/Mistral-7B-v0.1", MistralConfig),
        ("openai-community/gpt2", GPT2Config),
    ],
)
def test_shipped_shapes_are_the_defaults_of_their_config_classes(name, config):
    assert shape_of(SHIPPED[name], name) == shape_of(config().to_dict(), name)


def test_the_toy_shape_is_the_one_that_is_trained():
    from alignlab.pretrain import SHAPE

    assert shape_of(SHIPPED["toy"], "toy") == shape_of(LlamaConfig(**SHAPE).to_dict(), "toy")


def test_parameters_of_the_shipped_models():
    """Llama-2-7B has 6,738,415,616 parameters, Mistral-7B 7,241,732,096, GPT-2 124,439,808."""
    counts = [shape_of(SHIPPED[name], name).parameters for name in list(SHIPPED)[:3]]
    assert counts == [6_738_415_616, 7_241_732_096, 124_439_808]


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, GPT2Config])
def test_parameters_are_those_of_the_model_itself(config):
    with torch.device("meta"):
        small = {"vocab_size": 50, "num_hidden_layers": 3}
        model = AutoModelForCausalLM.from_config(config(**small, hidden_size=32, num_attention_heads=4))
    assert shape_of(model.config.to_dict(), "x").parameters == sum(p.numel() for p in model.parameters())


def test_targets_that_nobody_wrote_are_pefts_own():
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as own

    assert {family: own[family] for family in UNWRITTEN_TARGETS} == UNWRITTEN_TARGETS


def test_as_many_replies_are_scored_at_once_as_are_planned():
    import inspect

    from alignlab.generate import reply_logps

    assert inspect.signature(reply_logps).parameters["batch_size"].default == memory.SCORED_AT_ONCE


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "llama", "vocab_size": 10, "hidden_size": 8}, "num_hidden_layers, num_attention_heads"),
        ({"hidden_size": 8}, "model_type"),
    ],
)
def test_an_unknown_architecture_is_refused_with_what_is_missing(config, named):
    with pytest.raises(ModelError, match=named):
        shape_of(config, "x")


# --- the walk ---


def test_a_walk_by_hand():
    """x (10) → a = f(x) saving x → b = g(a) saving a, 4 bytes each.

    With saving, x, a and b are there at the end: 18, of which 14 are saved. The backward starts with b's gradient (4)
    on these 14, makes a's (4): 22; then a and b's gradient go, and x's gradient (10) comes: 10 + 4 + 10 = 24.
    Without saving, at most x and a, then a and b: 14.
    """
    tape = Tape()
    x = tape.tensor(10)
    a = tape.op(4, x, saves=(x,))
    b = tape.op(4, a, saves=(a,))
    saving = walk(tape, x, b, saving=True, pinned=False)
    assert (saving.forward, saving.saved, saving.backward) == (22 - 4, 14, 24)
    assert walk(tape, x, b, saving=False, pinned=False).forward == 14


def test_gradients_that_meet_are_added_in_place():
    """x + x·2, 8 bytes each: the gradient of the sum is x's own too, so the second one (8) is added into a third."""
    tape = Tape()
    x = tape.tensor(8)
    y = tape.op(8, x)
    z = tape.op(8, x, y, passes=True)
    assert walk(tape, x, z, saving=True, pinned=True).backward == 16


# --- resident parts: exact ---


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_4bit_weights_take_the_bytes_that_are_planned(recipe_of, name):
    recipe = recipe_of(name, "model.load_in_4bit=true", "model.dtype=bfloat16")
    model = models.load_weights(recipe.model)
    planned = part(plan(recipe, "sft", cuda=False), "weights") + part(plan(recipe, "sft", cuda=False), "embedding")
    buffers = bytes_of(model.buffers())
    assert bytes_of(held_tensors(model)) - buffers == pytest.approx(planned, rel=0.02)


def test_bytes_of_a_quantized_weight_by_hand():
    """64 × 256 = 16,384 weights: 8,192 bytes, 256 blocks of one byte, one float32 for them, 4 · 273 of tables."""
    assert quantized_bytes(64 * 256) == 8192 + 256 + 4 + 1092


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapter_gradients_and_optimizer_states_take_the_bytes_that_are_planned(recipe_of, name):
    recipe = recipe_of(name)
    policy = models.add_adapter(models.load_weights(recipe.model), recipe.model)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [t for state in optimizer.state.values() for k, t in state.items() if k != "step"]
    found = plan(recipe, "dpo", cuda=False)
    assert bytes_of(trained) == part(found, "adapter") == part(found, "reference")
    assert bytes_of(states) == part(found, "optimizer")
    assert bytes_of(p.grad for p in trained) == found.moments[0].parts[0].bytes


# --- a training step ---


@pytest.mark.parametrize(
    ("name", "stage", "overrides"),
    [
        ("llama", "dpo", []),
        ("llama", "dpo", ["dpo.gradient_checkpointing=true"]),
        ("llama", "sft", ["model.lora.lora_dropout=0.1"]),
        ("llama", "sft", ["model.dtype=bfloat16"]),
        ("llama", "dpo", ["model.lora=null"]),
        ("llama", "dpo", ["model.lora=null", "model.dtype=bfloat16", "dpo.gradient_checkpointing=true"]),
        ("mistral", "dpo", ["dpo.per_device_train_batch_size=2"]),
        ("mistral", "sft", ["sft.gradient_checkpointing=true"]),
        ("mistral", "dpo", ["model.load_in_4bit=true", "model.dtype=bfloat16"]),
        ("gpt2", "dpo", []),
        ("gpt2", "dpo", ["dpo.gradient_checkpointing=true"]),
        ("gpt2", "dpo", ["model.lora=null"]),
    ],
)
def test_a_training_step_takes_what_is_planned(recipe_of, narrow_head, name, stage, overrides):
    found = probe(recipe_of(name, *overrides), stage)
    assert abs(found.difference) < 0.02, {m.name: m.bytes for m in found.plan.moments}


def test_the_lm_head_takes_what_is_planned(recipe_of):
    """With TRL's own tiles its buffers are nearly all there is in so small a model."""
    found = probe(recipe_of("llama"), "dpo")
    assert found.plan.step > 10 * found.plan.weights and abs(found.difference) < 0.02


# --- logits and the cache ---


def test_the_cache_of_keys_and_values_takes_what_is_planned(load, recipe_of):
    """At the end of sampling: every layer's, and one layer's keys a second time while they are extended."""
    from transformers import DynamicCache

    recipe = recipe_of("mistral", "data.max_prompt_tokens=20", "monitor.kl.max_new_tokens=100")
    model = load("mistral")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(8, 120, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = bytes_of(t for layer in cache.layers for t in (layer.keys, layer.values))
    found = next(m for m in plan(recipe, "dpo", cuda=False).moments if m.name == "sampling")
    assert found.parts[0].bytes == held + held / (2 * model.config.num_hidden_layers)


def test_the_kl_takes_what_is_planned(recipe_of):
    """Seven float32 matrices of (reply tokens × words): two of logits, two of log-probabilities, three for the KL."""
    from alignlab.measures import kl_per_reply

    recipe = recipe_of("llama", "monitor.kl.max_new_tokens=50")
    found = plan(recipe, "dpo", cuda=False)
    with Meter() as meter:
        policy, reference = (torch.zeros(8, 51, found.shape.vocabulary) for _ in range(2))
        kl_per_reply(policy, reference, torch.ones(8, 51))
    planned = next(m.bytes for m in found.moments if m.name == "KL")
    assert meter.peak == pytest.approx(planned, rel=0.02)


# --- what a user sees ---


def test_a_plan_is_made_without_torch_and_without_weights():
    program = (
        "import sys, alignlab.cli\nassert alignlab.cli.main(['plan', 'mistral', '--json']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    plan(load_recipe("mistral"), "dpo")  # the first recipe after an installation reads the libraries' fields, once
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]"
    found = json.loads(done.stdout)["stages"]["dpo"]
    peak = sum(found["resident"].values()) + sum(found["moments"][found["peak"]].values())
    assert found["allocated"] == pytest.approx(peak, abs=0.01) and found["gpus"]["24"]["fits"]


def test_what_makes_a_recipe_fit_does():
    recipe = load_recipe("mistral", ["model.load_in_4bit=false"])
    assert plan(recipe, "dpo").needed > 17 * GIB
    changed = [*recipe.overrides, *change(recipe, "dpo", 17)]
    assert plan(load_recipe("mistral", changed), "dpo").needed <= 17 * GIB
    assert "dpo.gradient_accumulation_steps=" in " ".join(changed), "pairs a step stay the same"


def test_a_recipe_that_fits_needs_no_change():
    assert change(load_recipe("mistral"), "dpo", 24) == []


def test_a_gpu_smaller_than_the_weights_is_refused():
    recipe = load_recipe("mistral", ["model.load_in_4bit=false"])
    with pytest.raises(RecipeError, match=r"13\.5 GiB; write model.load_in_4bit=true"):
        verdict(recipe, plan(recipe, "dpo"), 8)


@pytest.mark.parametrize(("key", "value"), [("model.lora.use_dora", "true"), ("dpo.optim", "galore_adamw")])
def test_what_has_no_known_size_is_refused_and_a_run_goes_on(key, value):
    recipe = load_recipe("mistral", [f"{key}={value}"])
    with pytest.raises(ModelError, match=key.rpartition(".")[2]):
        plan(recipe, "dpo")
    line, gib = plan_line(recipe, "dpo", cuda=True)
    assert gib is None and line.startswith("memory: no memory plan")


def test_the_line_of_a_run_names_its_greediest_moment():
    line, gib = plan_line(load_recipe("mistral"), "dpo", cuda=True)
    found = plan(load_recipe("mistral"), "dpo")
    assert gib == round(found.allocated / GIB, 2) and found.peak.name in line and len(line.splitlines()) == 1


def test_more_rows_and_longer_ones_need_more():
    recipe = load_recipe("llama2")
    sizes = [[plan(recipe, "dpo", batch=b, length=n).step for b in (1, 2, 4)] for n in (512, 1024, 2048)]
    assert all(row == sorted(row) for row in sizes) and all(list(c) == sorted(c) for c in zip(*sizes, strict=True))


def test_qlora_of_the_7b_models_fits_16_gib_up_to_1024_tokens_and_4_pairs():
    for name in ("llama2", "mistral"):
        assert plan(load_recipe(name), "dpo", batch=4, length=1024).needed < 16 * GIB


def test_checkpointing_saves_memory_and_a_stored_adapter_is_no_second_model():
    recipe = load_recipe("llama2")
    without = load_recipe("llama2", ["dpo.gradient_checkpointing=false"])
    assert plan(recipe, "dpo").step < plan(without, "dpo").step
    base = load_recipe("llama2", ["model.reference=base"])
    saved = part(plan(recipe, "dpo"), "reference") - part(plan(base, "dpo"), "reference")
    assert saved == part(plan(recipe, "dpo"), "adapter")


def test_the_page_for_a_cpu_says_so(capsys):
    assert main(["plan", "tiny"]) == 0
    page = capsys.readouterr().out
    assert "process on a CPU" in page and "CUDA context (" not in page
