"""A memory plan is checked against what real tensors take: steps of small models within 5 %, parts exactly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignlab.cli.commands import main
from alignlab.data.format import Stops
from alignlab.errors import ModelError
from alignlab.measure.formulas import kl_per_reply
from alignlab.measure.generate import reply_logits, sample_replies
from alignlab.memory import outline, steps
from alignlab.memory import plan as memory
from alignlab.memory.fakes import Fakes, Meter, held_tensors
from alignlab.memory.page import change, disk, larger_batch, plan_line, verdict
from alignlab.memory.plan import GIB, plan
from alignlab.models import load as models
from alignlab.models import packing
from alignlab.recipe.load import load_recipe
from alignlab.train.probe import probe

RECIPE = """
data: {{source: toy, max_prompt_tokens: 72, max_reply_tokens: 48, toy: {{pairs: 60}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{per_device_train_batch_size: 4, gradient_accumulation_steps: 2, gradient_checkpointing: false}}
dpo: {{per_device_train_batch_size: 4, gradient_accumulation_steps: 2, gradient_checkpointing: false}}
"""
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
KINDS = {  # attention of two kinds, ALiBi, a mixture of experts, convolutions, LayerNorm and one projection for all
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    "bloom": {"n_layer": 4, "n_head": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False},
    "lfm2": {"block_multiple_of": 16, "layer_types": ["conv", "full_attention"]},
    "phi3": {"pad_token_id": 1, "sliding_window": 16},
    "qwen3": {"head_dim": 16, "num_hidden_layers": 5},
}


@pytest.fixture
def recipe_of(folders, tmp_path):
    """A function: a random model's name and overrides → a recipe on it."""

    def make(name: str, *overrides: str, folder=None):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=folder or folders[name]))
        lora = ["model.lora.fan_in_fan_out=true"] if name == "gpt2" and "model.lora=null" not in overrides else []
        return load_recipe(str(tmp_path / f"{name}.yaml"), [*lora, *overrides])

    return make


@pytest.fixture
def of_kind(tokenizer, tmp_path):
    """A function: the folder of a random model of one kind."""

    def make(kind: str):
        words = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(kind, **{**SIZE, **words, "vocab_size": len(tokenizer), **KINDS[kind]})
        AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def narrow_head(monkeypatch):
    """TRL's LM head in tiles of 64 words, so that its buffers do not hide what the layers take."""
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    monkeypatch.setattr(packing, "CPU_TILE", 64)
    monkeypatch.setattr(memory, "_code_and_versions", lambda: ["narrow"])


def part(found, name: str) -> float:
    return sum(size for each, size in found.resident.items() if each.startswith(name))


def bytes_of(tensors) -> int:
    """Of tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# --- tensors without content ---


def test_a_fake_tensor_has_a_size_and_takes_no_memory():
    """A mebi of float32 is 4 MiB, twice that while its double is there."""
    with Fakes() as meter:
        x = torch.empty(2**50)
        y = x * 2
        assert meter.now == 2 * 2**52 and y.shape == (2**50,)
        del x, y
    assert meter.now == 0 and meter.peak == 2**53


def test_integers_and_masks_stay_real_and_choose_what_is_computed():
    with Fakes():
        mask = torch.arange(10) > 6
        assert mask.sum().item() == 3 and torch.empty(10, 4)[mask].shape == (3, 4)
        assert torch.empty(4, 8).topk(2).indices.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


# --- which layers stand for all ---


@pytest.mark.parametrize("kind", ["gemma3_text", "lfm2", "granite"])
def test_a_few_layers_stand_for_all(kind, monkeypatch):
    """Nine layers measured, or two and three of each kind and their difference: the same bytes of every step."""
    types = {"lfm2": {"layer_types": ["conv", "full_attention", "conv"] * 3}}.get(kind, {})
    config = AutoConfig.for_model(kind, **{**SIZE, "num_hidden_layers": 9, **KINDS.get(kind, {}), **types})
    recipe = load_recipe("mistral", ["model.load_in_4bit=false", "dpo.gradient_checkpointing=false"])
    few = plan(recipe, "dpo", config=config)
    monkeypatch.setattr(outline, "MOST_KINDS", 0)
    whole = plan(recipe, "dpo", config=config)
    assert few.resident == pytest.approx(whole.resident)
    in_steps = {name: size for name, size in whole.moments.items() if name in memory.STEP}
    assert {name: few.moments[name] for name in in_steps} == pytest.approx(in_steps, rel=0.01)
    assert few.moments["sampling"] == pytest.approx(whole.moments["sampling"], rel=0.1)


def test_layers_of_each_kind_count_as_often_as_there_are():
    """Seven layers, of which the third and the sixth are of another kind: 5 and 2 of a kind."""
    types = ["conv", "conv", "full_attention"] * 2 + ["conv"]
    config = AutoConfig.for_model("lfm2", **{**SIZE, "num_hidden_layers": 7, "layer_types": types})
    found = outline.samples(outline.outline(config, load_recipe("mistral").model))
    assert found == [([0, 1, 2, 5], 1 - 3), ([0, 1, 2, 3, 5], 3)]


# --- shapes of the shipped recipes ---


def test_parameters_of_the_shipped_models():
    """Llama-2-7B has 6,738,415,616 parameters, Mistral-7B 7,241,732,096, GPT-2 124,439,808."""
    wanted = {"llama2": 6_738_415_616, "mistral": 7_241_732_096, "gpt2": 124_439_808}
    assert {name: plan(load_recipe(name), "dpo").parameters for name in wanted} == wanted


def test_a_shipped_recipe_needs_no_file_and_no_network(monkeypatch):
    monkeypatch.setattr(models, "load_config", None)
    for name in ("tiny", "llama2", "mistral", "zephyr", "gpt2"):
        assert outline.config_of(load_recipe(name).model).num_hidden_layers


def test_weights_that_a_token_is_multiplied_with(recipe_of):
    """Of experts those that are chosen: Mixtral's layers, with two of eight, have 8 · 3/4 fewer of their matrices."""
    config = AutoConfig.for_model("mixtral", **{**SIZE, "vocab_size": 100, "num_hidden_layers": 1})
    attention, expert, router, head = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128, 8 * 64, 100 * 64
    section = load_recipe("mistral").model
    assert outline.matrix_weights(config, section) == attention + 2 * expert + router + head


# --- resident parts: exact ---


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_4bit_weights_take_the_bytes_that_are_planned(recipe_of, name):
    recipe = recipe_of(name, "model.load_in_4bit=true", "model.dtype=bfloat16")
    model = models.load_weights(recipe.model)
    found = plan(recipe, "sft", cuda=False)
    weights = [tensor for weight in model.parameters() for tensor in held_tensors(weight)]
    assert bytes_of([*weights, *model.buffers()]) == pytest.approx(
        part(found, "weights") + part(found, "emb"), rel=0.01
    )


def test_a_plan_leaves_nothing_behind_that_a_4bit_model_is_made_with(recipe_of, monkeypatch, tmp_path):
    """bitsandbytes keeps its table of scales: one without content would make the base model another."""
    from bitsandbytes import functional

    monkeypatch.setattr(functional, "name2qmap", {})
    recipe = recipe_of("llama", "model.load_in_4bit=true")
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    plan(recipe, "sft", cuda=False)
    after_plan = scales_of(models.load_weights(recipe.model))
    functional.name2qmap.clear()
    assert torch.equal(after_plan, scales_of(models.load_weights(recipe.model))) and after_plan.unique().numel() > 9


def scales_of(model: torch.nn.Module) -> torch.Tensor:
    states = [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]
    return torch.cat([state.absmax.flatten() for state in states])


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
    assert bytes_of(p.grad for p in trained) == found.gradients == found.moments["optimizer step"]


# --- a training step ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_any_architecture_takes_what_is_planned(recipe_of, of_kind, narrow_head, kind):
    own = ["dpo.router_aux_loss_coef=0.0"] if kind == "mixtral" else []
    found = probe(recipe_of(kind, *own, folder=of_kind(kind)), "dpo")
    assert abs(found.difference) < 0.05, found.plan.moments


@pytest.mark.parametrize(
    ("name", "stage", "overrides"),
    [
        ("llama", "dpo", ["dpo.gradient_checkpointing=true"]),
        ("llama", "dpo", ["model.prefix_sharing=false", "dpo.gradient_accumulation_steps=1"]),
        ("llama", "dpo", ["dpo.max_steps=3"]),
        ("llama", "sft", ["model.lora.lora_dropout=0.1", "model.dtype=bfloat16"]),
        ("llama", "dpo", ["model.lora=null"]),
        ("mistral", "dpo", ["model.load_in_4bit=true", "model.dtype=bfloat16"]),
        ("mistral", "sft", ["sft.gradient_checkpointing=true", "sft.per_device_train_batch_size=2"]),
        ("gpt2", "dpo", []),
        ("gpt2", "sft", ["model.lora=null", "model.dtype=bfloat16"]),
    ],
)
def test_a_training_step_takes_what_is_planned(recipe_of, narrow_head, name, stage, overrides):
    found = probe(recipe_of(name, *overrides), stage)
    assert abs(found.difference) < 0.05, found.plan.moments


def test_the_lm_head_takes_what_is_planned(recipe_of):
    """With the tiles of a real run its buffers are nearly all there is in so small a model."""
    found = probe(recipe_of("llama"), "dpo")
    assert found.plan.step > 10 * part(found.plan, "weights") and abs(found.difference) < 0.05


# --- sampling and the KL ---


def test_sampling_takes_what_is_planned(load, tokenizer, recipe_of):
    recipe = recipe_of("mistral", "data.max_prompt_tokens=40", "monitor.kl.max_new_tokens=60")
    found = plan(recipe, "dpo", cuda=False)
    model = load("mistral")
    with Meter() as meter:
        ends = Stops((len(tokenizer),), ("",))  # which no reply reaches
        sample_replies(model, tokenizer, [[5] * 40] * 8, max_new_tokens=60, seed=0, batch_size=8, stops=ends)
    assert meter.peak == pytest.approx(found.moments["sampling"], rel=0.15)


def test_the_kl_takes_what_is_planned(load, recipe_of):
    recipe = recipe_of("llama", "data.max_prompt_tokens=40", "monitor.kl.max_new_tokens=50")
    found = plan(recipe, "dpo", cuda=False)
    texts = [[5] * 40] * 8, [[6] * 50] * 8
    model = load("llama")
    with Meter() as meter, torch.no_grad():
        ours, _, mask = reply_logits(model, *texts, pad=0)
        theirs, _, _ = reply_logits(model, *texts, pad=0)
        kl_per_reply(ours, theirs, mask)
    assert meter.peak == pytest.approx(found.moments["KL"], rel=0.05)


def test_as_many_replies_are_scored_at_once_as_are_planned():
    import inspect

    from alignlab.measure.generate import reply_logps

    assert inspect.signature(reply_logps).parameters["batch_size"].default == steps.AT_ONCE


# --- what a user sees ---


def test_help_is_light():
    program = (
        "import sys\nfrom alignlab.cli.commands import main\n"
        "try:\n    main(['plan', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]"


def test_json_holds_what_the_page_adds_up(capsys):
    assert main(["plan", "mistral", "--stage", "dpo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stages"]["dpo"]
    peak = sum(found["resident"].values()) + found["moments"][found["peak"]]
    assert found["allocated"] == pytest.approx(peak, abs=0.01) and found["gpus"]["24"]["fits"]


def test_a_gpu_that_is_too_small_is_exit_code_1_with_what_would_fit(capsys):
    assert main(["plan", "mistral", "--stage", "dpo", "--gpu", "16"]) == 0
    assert main(["plan", "mistral", "--stage", "dpo", "--gpu", "16", "--gpu", "7"]) == 1
    page = capsys.readouterr().out
    assert "--gpu 7: does not fit" in page and "dpo.per_device_train_batch_size=1" in page


def test_a_gpu_smaller_than_the_weights_is_told_what_takes_fewer_bits():
    recipe = load_recipe("mistral", ["model.load_in_4bit=false"])
    line = verdict(plan(recipe, "dpo"), 8)
    assert "does not fit" in line and "model.load_in_4bit=true" in line


def test_what_makes_a_recipe_fit_does():
    recipe = load_recipe("mistral", ["model.load_in_4bit=false"])
    found = plan(recipe, "dpo")
    assert not found.fits(17)
    changes = change(found, 17)
    assert plan(load_recipe("mistral", [*recipe.overrides, *changes]), "dpo").fits(17)
    assert "dpo.gradient_accumulation_steps=" in " ".join(changes), "pairs a step stay the same"


def test_a_recipe_that_fits_needs_no_change_and_is_told_of_a_larger_batch():
    found = plan(load_recipe("mistral"), "dpo")
    assert change(found, 24) == []
    rows, steps_ = (int(each.partition("=")[2]) for each in larger_batch(found, 24))
    assert rows > 2 and rows * steps_ == 64
    assert plan(load_recipe("mistral"), "dpo", batch=rows).fits(24)
    assert not plan(load_recipe("mistral"), "dpo", batch=2 * rows).fits(24)


def test_disk_of_an_adapter_and_of_a_whole_model():
    """41,943,040 numbers of an adapter (r 16): policy and reference in float32, and two optimizer states of each."""
    sizes = disk(plan(load_recipe("mistral"), "dpo"))
    numbers, whole = 41_943_040, 7_241_732_096
    assert [*sizes.values()] == [numbers * (2 * 4 + 8), numbers * 4, whole * 2]
    whole_model = disk(plan(load_recipe("gpt2", ["model.lora=null"]), "sft"))
    assert whole_model["each checkpoint"] == 124_439_808 * (4 + 8)


def test_an_optimizer_of_unknown_states_is_refused_and_a_run_goes_on():
    recipe = load_recipe("mistral", ["dpo.optim=galore_adamw"])
    with pytest.raises(ModelError, match="galore_adamw"):
        plan(recipe, "dpo")
    line, gib = plan_line(recipe, "dpo", cuda=True)
    assert gib is None and line.startswith("memory: no memory plan")


def test_modelling_code_that_fails_without_numbers_is_one_line_and_a_run_goes_on(monkeypatch):
    monkeypatch.setattr(memory, "_code_and_versions", lambda: ["nothing is known"])
    monkeypatch.setattr(memory, "measure", lambda *_: torch.zeros(2) @ torch.zeros(3))
    line, gib = plan_line(load_recipe("mistral"), "dpo", cuda=True)
    assert gib is None and "its steps fail where no numbers are there" in line and len(line.splitlines()) == 1


def test_what_was_measured_is_not_measured_again(monkeypatch):
    first = plan(load_recipe("tiny"), "dpo", cuda=False)
    monkeypatch.setattr(memory, "measure", None)
    assert plan(load_recipe("tiny"), "dpo", cuda=False).moments == first.moments


@pytest.mark.parametrize("damage", [lambda text: "[]", lambda text: text[:9], lambda text: text.replace("1", "2", 1)])
def test_what_was_measured_and_then_changed_is_measured_again(damage, monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    first = plan(load_recipe("tiny"), "sft", cuda=False)
    files = [*tmp_path.glob("plans/*.json")]
    for file in files:
        file.write_text(damage(file.read_text()))
    assert files and plan(load_recipe("tiny"), "sft", cuda=False).moments == first.moments


def test_a_model_that_is_no_language_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    recipe = load_recipe("mistral", [f"model.name={tmp_path}"])
    with pytest.raises(ModelError, match="no language model") as e:
        plan(recipe, "dpo")
    assert len(str(e.value).splitlines()) == 1


def test_the_line_of_a_run_names_its_greediest_moment():
    line, gib = plan_line(load_recipe("mistral"), "dpo", cuda=True)
    found = plan(load_recipe("mistral"), "dpo")
    assert gib == round(found.allocated / GIB, 2) and found.peak in line and len(line.splitlines()) == 1


def test_more_rows_and_longer_ones_need_more():
    recipe = load_recipe("llama2")
    sizes = [[plan(recipe, "dpo", batch=b, length=n).step for b in (1, 4)] for n in (512, 2048)]
    assert all(row == sorted(row) for row in sizes) and all(list(c) == sorted(c) for c in zip(*sizes, strict=True))


def test_qlora_of_the_7b_models_fits_16_gib_up_to_1024_tokens_and_4_pairs():
    for name in ("llama2", "mistral"):
        assert plan(load_recipe(name), "dpo", batch=4, length=1024).fits(16)


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
