import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignlab.errors import RecipeError
from alignlab.recipe import fields as library
from alignlab.recipe.fields import Setting, library_settings
from alignlab.recipe.load import consumed, load_recipe, run_name, write_yaml
from alignlab.recipe.rules import INSTEAD, OWNED
from alignlab.recipe.show import far_from_usual, list_recipes, show_arguments, show_recipe, without_effect
from alignlab.recipe.written import SHIPPED

MINIMAL = "data: {source: hh-rlhf, path: rows.jsonl}\nmodel: {name: some/model}\n"
SHIPPED_FILES = sorted(SHIPPED.rglob("*.yaml"))
RUNNABLE = ["gemma270m", "gemma3", "gpt2", "llama2", "llama3", "mistral", "qwen3", "smollm3", "tiny", "zephyr"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides)
    return str(caught.value).split("\n")


# --- what a sound recipe becomes ---


def test_defaults_are_those_of_the_sections_and_sft_and_dpo_hold_only_what_was_written():
    recipe = load_recipe(write(MINIMAL + "dpo: {beta: 0.3}\n"))
    assert (recipe.name, recipe.data.max_prompt_tokens, recipe.model.lora) == ("r", 512, None)
    assert (recipe.sft, recipe.dpo) == ({}, {"beta": 0.3})


def test_a_recipe_wins_over_what_it_extends_and_the_command_line_over_both():
    write(MINIMAL + "about: base\ndpo: {beta: 0.1, learning_rate: 1.0e-6, seed: 1}\n", "base.yaml")
    recipe = load_recipe(write("extends: base\ndpo: {learning_rate: 2.0e-6, seed: 2}\n"), ["dpo.seed=3"])
    assert recipe.dpo == {"beta": 0.1, "learning_rate": 2e-6, "seed": 3}
    assert recipe.about == ""  # the base's description is not this recipe's
    assert recipe.sources["dpo.beta"] == "base.yaml:4"
    assert recipe.sources["dpo.learning_rate"] == "r.yaml:2"
    assert recipe.sources["dpo.seed"] == "command line: 'dpo.seed=3'"


def test_null_takes_lora_away_and_a_key_brings_it_back():
    write(MINIMAL.replace("model}", "model, lora: {r: 8, use_dora: true}}"), "base.yaml")
    assert load_recipe(write("extends: base\nmodel: {lora: null}\n")).model.lora is None
    assert load_recipe(write("extends: base\nmodel: {lora: {}}\n")).model.lora == {"r": 8, "use_dora": True}
    assert load_recipe(write("extends: base\nmodel: {lora: null}\n"), ["model.lora.r=4"]).model.lora == {"r": 4}


def test_numbers_and_lists_are_understood_as_their_setting_takes_them():
    recipe = load_recipe(
        write(MINIMAL + "dpo: {learning_rate: 5e-6, loss_type: ipo, num_train_epochs: 2}\n"), ["dpo.beta=3e-1"]
    )
    assert recipe.dpo == {"learning_rate": 5e-6, "loss_type": ["ipo"], "num_train_epochs": 2, "beta": 0.3}


def test_numbers_in_a_list_are_numbers_where_no_text_may_stand():
    """`5e-2` is text to YAML 1.1: a number in sweep.betas, text in target_modules, and no whole number anywhere."""
    recipe = load_recipe(write(MINIMAL + "sweep: {betas: [5e-2, 1e-1, 1]}\n"))
    assert recipe.sweep.betas == [0.05, 0.1, 1]
    assert load_recipe(write(MINIMAL), ["sweep.betas=5e-2", "model.lora.target_modules=[5e-2]"]).model.lora == {
        "target_modules": ["5e-2"]
    }
    assert load_recipe("r.yaml", ["sweep.betas=5e-2"]).sweep.betas == [0.05]
    assert faults(MINIMAL, "sweep.betas=[5e-2, small]") == [
        "sweep.betas is ['5e-2', 'small'] (command line: 'sweep.betas=[5e-2, small]'); expected list[float]"
    ]
    with pytest.raises(ValueError, match=r"expected list\[int\]"):
        Setting(("list[int]",)).read(["5e0"])


def test_lora_on_the_head_is_refused_before_anything_is_loaded():
    assert faults(MINIMAL, "model.lora.target_modules=[q_proj,lm_head]") == [
        "model.lora.target_modules holds lm_head, where TRL does not train it; leave it out, or write all-linear, "
        "which is without it (command line: 'model.lora.target_modules=[q_proj,lm_head]')"
    ]
    assert load_recipe("r.yaml", ["model.lora.target_modules=[q_proj]"]).model.lora == {"target_modules": ["q_proj"]}


BROKEN_COPIES = ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", False]


@pytest.mark.parametrize("init", BROKEN_COPIES)
def test_an_adapter_that_changes_the_base_is_refused_before_anything_is_loaded(init):
    given = f"model.lora.init_lora_weights={str(init).lower()}"
    assert faults(MINIMAL, given) == [
        f"model.lora.init_lora_weights is {init!r} (command line: {given!r}); expected true, gaussian or orthogonal: "
        f"the reference needs a base that the adapter leaves as it is"
    ]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_as_the_reference_would_share_them(bias):
    (fault,) = faults(MINIMAL, f"model.lora.bias={bias}")
    assert fault.endswith("expected none: policy and reference would share the base's biases")


@pytest.mark.parametrize("key", ["layer_replication=[[0,2],[1,2]]", "kasa_config={gamma: 1.0}", "use_bdlora={a: 1}"])
def test_other_layers_under_the_adapter_are_refused(key):
    (fault,) = faults(MINIMAL, f"model.lora.{key}")
    assert fault.endswith("expected nothing: it changes the base")


def test_whole_modules_are_trained_in_float32_only():
    """Their weights are float32 and what comes to them is not: a matrix product of the two fails."""
    saved = "model.lora.modules_to_save=[lm_head]"
    assert faults(MINIMAL, saved, "model.dtype=bfloat16") == [
        "model.lora.modules_to_save is ['lm_head'], which are trained whole, in float32, where the model computes in "
        "bfloat16; set model.dtype=float32, or leave it out "
        "(command line: 'model.lora.modules_to_save=[lm_head]', command line: 'model.dtype=bfloat16')"
    ]
    assert load_recipe("r.yaml", [saved, "model.dtype=float32"]).model.lora == {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("init", ["true", "gaussian", "orthogonal"])
def test_adapters_that_leave_the_base_alone_are_taken(init):
    lora = load_recipe(write(MINIMAL), [f"model.lora.init_lora_weights={init}", "model.lora.bias=none"]).model.lora
    assert lora == {"init_lora_weights": True if init == "true" else init, "bias": "none"}


def test_a_byte_order_mark_and_windows_line_ends_are_read():
    Path("r.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe("r.yaml").model.name == "some/model"


def test_a_name_is_looked_up_in_recipes_then_among_the_shipped():
    assert load_recipe("mistral").path == SHIPPED / "mistral.yaml"
    Path("recipes").mkdir()
    write(MINIMAL, "recipes/mistral.yaml")
    assert load_recipe("mistral").model.name == "some/model"


def test_a_recipe_may_extend_a_shipped_one():
    assert load_recipe(write("extends: qlora-7b\nmodel: {name: some/model}\n")).model.load_in_4bit


def test_a_chat_template_is_taken_in_from_the_file_beside_the_recipe_that_names_it():
    Path("mine").mkdir()
    write("{{ messages }}", "mine/t.jinja")
    write(MINIMAL.replace("model}", "model, chat_template: t.jinja}"), "mine/base.yaml")
    assert load_recipe(write("extends: mine/base\n")).model.chat_template == "{{ messages }}"


def test_the_zephyr_template_ends_a_prompt_where_the_reply_begins():
    import jinja2

    template = jinja2.Template(load_recipe("zephyr").model.chat_template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    prompt = template.render(messages=turns[:1], eos_token="</s>", add_generation_prompt=True)
    assert prompt == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert template.render(messages=turns, eos_token="</s>") == prompt + "Hello</s>"


# --- one line a fault ---

FAULTS = [
    ("dpo: {bta: 0.3}", "dpo.bta is not a setting (r.yaml:3); did you mean 'beta'?"),
    ("model: {lora: {rnk: 8}}", "model.lora.rnk is not a setting (r.yaml:3); did you mean 'r'?"),
    ("model: {load_in_4bt: true}", "model.load_in_4bt is not a setting (r.yaml:3); did you mean 'load_in_4bit'?"),
    ("dpoo: {beta: 0.3}", "dpoo is not a setting (r.yaml:3); did you mean 'dpo'?"),
    ("dpo.beta: 1", "dpo.beta is not a setting (r.yaml:3); keys are nested: write dpo: {beta: 0.3}, not dpo.beta: 0.3"),
    ("xyzzy: 1", "xyzzy is not a setting (r.yaml:3)"),
    ("beta: 0.3", "beta is not a setting (r.yaml:3); write dpo.beta"),
    ("sft: {beta: 0.3}", "sft.beta is not a setting (r.yaml:3); write dpo.beta"),
    ("weight_decay: 0", "weight_decay is not a setting (r.yaml:3); write sft.weight_decay or dpo.weight_decay"),
    (
        "dpo: {max_prompt_length: 9}",
        "dpo.max_prompt_length is not a setting (r.yaml:3); TRL removed it; write data.max_prompt_tokens",
    ),
    (
        "sft: {warmup_ratio: 0.1}",
        "sft.warmup_ratio is not a setting (r.yaml:3); transformers removed it; "
        "write warmup_steps: below 1 it is a share of all steps",
    ),
    ("model: {torch_dtype: float32}", "model.torch_dtype is not a setting (r.yaml:3); write model.dtype"),
    (
        "dpo: {output_dir: out}",
        "dpo.output_dir is set by alignlab (r.yaml:3); a run stands in runs/; name it with --run",
    ),
    ("sft: {bf16: true}", "sft.bf16 is set by alignlab (r.yaml:3); write model.dtype"),
    ("model: {lora: {task_type: CAUSAL_LM}}", "model.lora.task_type is set by alignlab (r.yaml:3); always CAUSAL_LM"),
    ("dpo: {beta: abc}", "dpo.beta is 'abc' (r.yaml:3); expected float"),
    ("dpo: {beta: '0.3'}", "dpo.beta is '0.3' (r.yaml:3); expected float"),
    ("dpo: {seed: true}", "dpo.seed is True (r.yaml:3); expected int"),
    ("dpo: {seed: 1.5}", "dpo.seed is 1.5 (r.yaml:3); expected int"),
    ("dpo: {beta: {x: 1}}", "dpo.beta is {'x': 1} (r.yaml:3); expected float"),
    ("dpo: {beta:}", "dpo.beta is None (r.yaml:3); expected float"),
    ("model: {revision: 1234567}", "model.revision is 1234567 (r.yaml:3); expected str or null; write it in quotes"),
    (
        "sft: {loss_type: nl}",
        "sft.loss_type is 'nl' (r.yaml:3); expected nll, dft, chunked_nll; did you mean 'nll'?",
    ),
    ("sft: {optim: adamw}", "sft.optim is 'adamw' (r.yaml:3); expected a known name; did you mean 'adamw_torch'?"),
    (
        "model: {dtype: bf16}",
        "model.dtype is 'bf16' (r.yaml:3); expected float32, bfloat16, float16; did you mean 'bfloat16'?",
    ),
    ("dpo: {beta: 0}", "dpo.beta is 0 (r.yaml:3); expected a value above 0"),
    (
        "dpo: {learning_rate: 5e6}",
        "dpo.learning_rate is '5e6' (r.yaml:3); expected a value above 0 and at most 1, such as 5e-6",
    ),
    ("dpo: {beta: .nan}", "dpo.beta is nan (r.yaml:3); expected a value above 0"),
    ("data: {test_share: 1.0}", "data.test_share is 1.0 (r.yaml:3); expected a share: at least 0 and below 1"),
    ("model: {lora: {r: 0}}", "model.lora.r is 0 (r.yaml:3); expected 1 or more"),
    ("monitor: {kl: {prompts: 0}}", "monitor.kl.prompts is 0 (r.yaml:3); expected 1 or more"),
    (
        "sft: {save_total_limit: 1}",
        "sft.save_total_limit is 1 (r.yaml:3); "
        "expected 2 or more: where the last checkpoint is damaged, the one before it is used",
    ),
    ("sft:", "sft is None (r.yaml:3); expected keys below it"),
    ("sft: [1]", "sft is [1] (r.yaml:3); expected keys below it"),
    ("model: {lora: true}", "model.lora is True (r.yaml:3); expected keys below it"),
    (
        "model: {load_in_4bit: true}",
        "model.load_in_4bit is true, but 4-bit weights cannot be trained; write model.lora: {r: 16} (r.yaml:3)",
    ),
    (
        "model: {dtype: float16}",
        "model.dtype is float16, in which whole models do not train; "
        "write float32, bfloat16 or a model.lora (r.yaml:3)",
    ),
    (
        "dpo: {max_length: 1000}",
        "dpo.max_length is 1000, but rows may have data.max_prompt_tokens 512 + data.max_reply_tokens 512 = 1024 "
        "tokens; leave it out or lower those (r.yaml:3)",
    ),
    (
        "dpo: {eval_steps: 15}",
        "dpo.eval_steps is 15, no multiple of dpo.logging_steps 10: "
        "a checkpoint is saved at each evaluation and must fall on a logged step (r.yaml:3)",
    ),
    (
        "dpo: {loss_weights: [1, 2]}",
        "dpo.loss_weights has 2 values for the 1 of dpo.loss_type (r.yaml:3)",
    ),
    (
        "dpo: {loss_type: exo_pair}",
        "dpo.loss_type holds exo_pair, which needs dpo.label_smoothing above 0, such as 0.001 (r.yaml:3)",
    ),
    (
        "data: {validation_share: 0.5, test_share: 0.5}",
        "data.validation_share 0.5 and data.test_share 0.5 leave nothing to train on (r.yaml:3)",
    ),
    ("model: {chat_template: no.jinja}", "model.chat_template is 'no.jinja' (r.yaml:3); no such file in ."),
]


@pytest.mark.parametrize(("line", "fault"), FAULTS, ids=[line for line, _ in FAULTS])
def test_a_fault_is_one_line_with_its_place_and_its_remedy(line, fault):
    """The base holds lines 1 and 2 of another file, so the faulty line is alone in its section, on line 3."""
    write(MINIMAL, "base.yaml")
    assert faults(f"extends: base\nabout: a\n{line}\n") == [fault]


def test_an_override_that_is_a_comment_has_no_value():
    said = "command line: 'dpo.beta=# 0.3' has no value; quote one that begins with #"
    assert faults("data: {source: toy}\nmodel: {name: toy}\n", "dpo.beta=# 0.3") == [said]


def test_every_fault_is_reported_at_once_with_file_or_override():
    assert faults("data: {source: toy}\ndpo: {bta: 1, beta: abc}\n", "sft.learning_rate=-1", "dpo.seed=", "oops") == [
        "command line: 'dpo.seed=' is not an override; write section.key=value, such as dpo.beta=0.3",
        "command line: 'oops' is not an override; write section.key=value, such as dpo.beta=0.3",
        "dpo.bta is not a setting (r.yaml:2); did you mean 'beta'?",
        "dpo.beta is 'abc' (r.yaml:2); expected float",
        "sft.learning_rate is -1 (command line: 'sft.learning_rate=-1'); "
        "expected a value above 0 and at most 1, such as 5e-6",
        "model.name is missing; write it in the recipe or as model.name=… on the command line",
    ]


def test_a_source_of_files_needs_a_path_and_the_toy_takes_none():
    model = "model: {name: toy}\n"
    needs = "data.source: pairs needs data.path: a hub id, a folder or a file (r.yaml:1)"
    assert faults("data: {source: pairs}\n" + model) == [needs]
    refuses = "data.path is 'x', but data.source: toy makes its own dialogues (r.yaml:1)"
    assert faults("data: {source: toy, path: x}\n" + model) == [refuses]


def test_a_setting_given_twice_is_a_fault_in_a_file_and_on_the_command_line():
    twice = "dpo.beta is set twice (r.yaml:4, r.yaml:5); keep one"
    assert faults(MINIMAL + "dpo:\n  beta: 0.1\n  beta: 0.2\n") == [twice]
    both = "dpo.beta is set twice (command line: 'dpo.beta=1', command line: 'dpo={beta: 2}'); keep one"
    assert faults(MINIMAL, "dpo.beta=1", "dpo={beta: 2}") == [both]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "r.yaml is empty; a recipe needs at least data.source and model.name"),
        (b"# nothing\n", "r.yaml is empty; a recipe needs at least data.source and model.name"),
        (b"\n- a\n", "r.yaml:2 is not a section; a recipe is sections such as data: and dpo:"),
        (b"about: \xff\n", "r.yaml is not UTF-8 text (byte 7); save it as UTF-8"),
        (b"a: [1\nb: 2\n", "r.yaml:2 is not YAML: expected ',' or ']', but got ':'"),
        (b"\ta: 1\n", "r.yaml:1 is not YAML: found character '\\t' that cannot start any token"),
        (b"a: 1\n b: 2\n", "r.yaml:2 is not YAML: mapping values are not allowed here"),
        (b"a: &x 1\nb: *x\n", "r.yaml:2 is not YAML: *x refers to another place; write its value out"),
        (b"a: !x 1\n", "r.yaml:1 is not YAML: could not determine a constructor for the tag '!x'"),
        (b"a: 2024-13-45\n", "r.yaml:1 is not YAML: month must be in 1..12"),
        (b"a: \x01\n", "r.yaml is not YAML: unacceptable character #x0001: special characters are not allowed"),
        (b"? [a]\n: 1\n", "r.yaml:1 has a key that is not a word; write key: value"),
        (b"a: " + b"[" * 5000, "r.yaml is nested too deeply to be a recipe"),
        (b"extends: [a, b]\n", "extends is ['a', 'b'] (r.yaml:1); name one recipe"),
        (b"extends: r\n", "extends goes in a circle (r.yaml:1): r.yaml → r.yaml"),
        (
            b"extends: mistrl\n",
            f"extends is 'mistrl' (r.yaml:1), which is no recipe (looked in . and {SHIPPED}); did you mean 'mistral'?",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_answered_with_one_line(content, fault):
    Path("r.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value) == fault


def test_a_circle_of_extends_names_every_link():
    write("extends: b\n", "a.yaml")
    write("extends: a\n", "b.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe("a.yaml")
    assert str(caught.value) == "extends goes in a circle (b.yaml:1): a.yaml → b.yaml → a.yaml"


def test_a_missing_recipe_is_answered_with_a_suggestion():
    with pytest.raises(RecipeError) as caught:
        load_recipe("mistrl")
    assert str(caught.value) == f"no recipe 'mistrl' (looked in recipes and {SHIPPED}); did you mean 'mistral'?"
    write(MINIMAL, "mine.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe("mien.yaml")
    assert str(caught.value) == "no recipe 'mien.yaml' (looked in .); did you mean 'mine'?"


PIECES = "data: model: lora: dpo: beta: 'source: toy' 'name: x' 'extends: tiny' 'r: 8' 1e-3 null {} [ ] { } , | \\x00"
MARKS = ["- ", ": ", "? ", "&a ", "*a", "<<: ", "!!int ", "!!set ", "\n", "\n ", "\n  ", "'", '"', "\0"]
WORDS = [*shlex.split(PIECES), *MARKS]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.lists(st.sampled_from(WORDS), max_size=3))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_answered_with_anything_but_a_recipe_or_its_faults(text, overrides):
    write(text)
    for name, given_ in (("r.yaml", ()), ("tiny", [f"dpo.{o}={o}" for o in overrides]), ("tiny", [f"model={text}"])):
        try:
            load_recipe(name, given_)
        except RecipeError as error:
            assert str(error)


# --- the libraries' fields ---


def test_what_alignlab_owns_exists_and_what_has_gone_does_not():
    """A table entry that the installed libraries contradict would give wrong advice."""
    known = library_settings()
    stages = known["sft"].keys() | known["dpo"].keys()
    bare = {key for key in OWNED if "." not in key}
    assert bare and bare <= stages
    assert {key.removeprefix("model.lora.") for key in OWNED if key.startswith("model.lora.")} <= known["lora"].keys()
    assert not INSTEAD.keys() & (stages | known["lora"].keys())


def test_the_known_dpo_losses_are_those_that_the_trainer_computes():
    trainer = Path(find_spec("trl").origin).parent / "trainer" / "dpo_trainer.py"
    computed = set(re.findall(r'loss_type == "(\w+)"', trainer.read_text()))
    assert computed and computed == set(library_settings()["dpo"]["loss_type"].choices)


def test_settings_survive_the_cache_which_is_rebuilt_when_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    library_settings.cache_clear()
    first = library_settings()
    (file,) = (tmp_path / "cache").iterdir()
    assert library._decode(json.loads(file.read_text())) == first
    for damage in ("", "[]", "{}", '{"sft": 1}', '{"sft": {}, "dpo": {"beta": {}}, "lora": {}}'):
        file.write_text(damage)
        library_settings.cache_clear()
        assert library_settings() == first
        assert [f.name for f in file.parent.iterdir()] == [file.name]
        assert library._decode(json.loads(file.read_text())) == first


def test_a_cache_that_cannot_be_written_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "file" / "cache"))
    library_settings.cache_clear()
    assert "beta" in library_settings()["dpo"]
    library_settings.cache_clear()


def test_a_typo_is_answered_within_a_second_without_torch():
    library_settings()  # warms the cache that the other process reads
    program = (
        "import sys\nfrom alignlab.errors import RecipeError\nfrom alignlab.recipe.load import load_recipe\n"
        "try: load_recipe('mistral', ['dpo.bta=0.3'])\n"
        "except RecipeError as error: print(error)\n"
        "print([name for name in ('torch', 'trl', 'transformers', 'peft') if name in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "dpo.bta is not a setting (command line: 'dpo.bta=0.3'); did you mean 'beta'?\n[]\n"
    assert time.monotonic() - start < 1.5


@given(st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.none()))
def test_a_value_is_taken_as_it_is_or_refused_but_never_cast(value):
    for kinds in (("bool",), ("int",), ("str",), ("int", "null")):
        try:
            read = Setting(kinds).read(value)
        except ValueError:
            continue
        assert type(read) is type(value) and read == value


# --- identity ---


def test_a_run_is_named_after_the_overrides_its_stage_consumes():
    def names(*overrides: str) -> tuple[str, str]:
        recipe = load_recipe("mistral", overrides)
        return run_name(recipe, "sft"), run_name(recipe, "dpo")

    assert names() == ("sft", "dpo")
    assert names("dpo.beta=0.3") == ("sft", "dpo-beta0.3")
    assert names("data.max_pairs=100") == ("sft-max_pairs100", "dpo-max_pairs100")
    assert names("dpo.beta=0.1") == ("sft", "dpo")  # the recipe's own value
    assert names("dpo.learning_rate=1e-6") == names("dpo.learning_rate=1.0e-06") == ("sft", "dpo-learning_rate1e-06")
    assert names("model.reference=base") == ("sft", "dpo-reference=base")  # SFT has no reference
    assert names("dpo.loss_type=ipo") == ("sft", "dpo-loss_type=ipo")
    assert names("dpo.logging_steps=5", "monitor.patience=9") == ("sft", "dpo")
    assert names("data.path=a/my rows.jsonl.gz", "dpo.beta=0.3") == ("sft-my_rows", "dpo-my_rows-beta0.3")
    assert names("data.path=[a.csv, b.csv, c.csv]") == ("sft-a_2_more", "dpo-a_2_more")
    assert all(len(name) == 40 for name in names(f"data.path={'a' * 50}.jsonl"))
    assert names("data.seed=3", "dpo.seed=1") == ("sft-data.seed3", "dpo-data.seed3-seed1")


VALUES = {
    "dpo.beta": st.floats(0.001, 10),
    "dpo.loss_type": st.lists(st.sampled_from(["sigmoid", "sft", "ipo"]), min_size=1, max_size=3),
    "dpo.seed": st.integers(0, 10**6),
    "data.seed": st.integers(0, 10**6),
    "model.lora.target_modules": st.one_of(
        st.sampled_from(["q", "null"]), st.lists(st.sampled_from(["q", "v"]), min_size=1)
    ),
    "dpo.adam_beta1": st.sampled_from([0.1, 0.5, 0.75]),
}


@given(*[st.fixed_dictionaries({}, optional=VALUES)] * 2)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_different_overrides_never_share_a_name_and_a_name_is_a_file_name(one, other):
    recipes = [load_recipe("mistral", [f"{k}={json.dumps(v)}" for k, v in given.items()]) for given in (one, other)]
    names = [run_name(recipe, "dpo") for recipe in recipes]
    same = consumed(recipes[0], "dpo") == consumed(recipes[1], "dpo")
    assert (names[0] == names[1]) == same
    assert all(set(name).isdisjoint('/\\:*?"<>| ') and name.isascii() and len(name) < 120 for name in names)


def test_a_stage_consumes_data_model_and_its_own_section_without_logging():
    inputs = consumed(load_recipe("tiny"), "sft")
    assert inputs.keys() == {"data", "model", "sft"}
    assert "logging_steps" not in inputs["sft"] and "learning_rate" in inputs["sft"]
    assert not {"start", "reference"} & inputs["model"].keys()
    assert {"start", "reference"} <= consumed(load_recipe("tiny"), "dpo")["model"].keys()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_written_recipe_reads_back_as_the_same(name):
    recipe = load_recipe(name, ["dpo.beta=0.03", "data.max_pairs=7"])
    again = load_recipe(write(write_yaml(recipe)))
    for part in ("about", "data", "model", "sft", "dpo", "monitor"):
        assert getattr(again, part) == getattr(recipe, part)
    assert load_recipe(name, recipe.overrides) == recipe


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("dpo.learning_rate=1e-3", "0.001 is far from the usual 5e-07 to 5e-06 for a whole model"),
        ("dpo.learning_rate=1e-9", "1e-09 is far from the usual 5e-07 to 5e-06 for a whole model"),
        ("sft.learning_rate=0.01", "0.01 is far from the usual 1e-05 to 5e-05 for a whole model"),
        ("dpo.beta=20", "20 is far from the usual 0.01 to 0.5; 0.2 to 0.3 is a start"),
    ],
)
def test_a_value_far_from_what_is_usual_is_noted_with_what_is(given, said):
    recipe = load_recipe(write(MINIMAL), [given])
    assert far_from_usual(recipe) == {given.partition("=")[0]: said}
    assert said in show_recipe(recipe)


def test_what_an_adapter_learns_at_is_ten_times_what_a_whole_model_does():
    rate = "dpo.learning_rate=3e-4"
    assert far_from_usual(load_recipe(write(MINIMAL), [rate]))
    assert not far_from_usual(load_recipe("r.yaml", [rate, "model.lora.r=8"]))


@pytest.mark.parametrize("name", RUNNABLE)
def test_no_shipped_recipe_is_far_from_what_is_usual(name):
    assert far_from_usual(load_recipe(name)) == {}


# --- the shipped recipes ---


def test_the_runnable_recipes_are_listed_and_the_base_is_not():
    assert [name for name, _, _ in list_recipes()] == RUNNABLE
    assert all(about for _, about, _ in list_recipes())


def test_a_broken_recipe_of_ones_own_does_not_hide_the_others():
    Path("recipes").mkdir()
    write("model: {name: x\n", "recipes/mine.yaml")
    listed = {name: about for name, about, _ in list_recipes()}
    assert listed["mine"].startswith("cannot be read: recipes/mine.yaml:2 is not YAML")
    assert listed.keys() == {*RUNNABLE, "mine"}


def test_recipes_fit_on_a_screen():
    assert SHIPPED_FILES
    for path in SHIPPED_FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 120, path


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED_FILES if path.stem != "qlora-7b"], ids=lambda path: path.stem
)
def test_every_recipe_on_disk_builds_real_config_objects(path, tmp_path):
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import DPOConfig, SFTConfig

    recipe = load_recipe(path)
    machine = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none"}
    assert DPOConfig(**recipe.dpo, **machine).beta == recipe.dpo["beta"]
    assert SFTConfig(**recipe.sft, **machine).learning_rate == recipe.sft["learning_rate"]
    assert LoraConfig(**recipe.model.lora).r == recipe.model.lora["r"]
    dtype = getattr(torch, recipe.model.dtype)
    assert BitsAndBytesConfig(load_in_4bit=recipe.model.load_in_4bit, bnb_4bit_compute_dtype=dtype)


# --- shown ---


def test_show_says_where_each_value_came_from_and_what_has_no_effect():
    shown = show_recipe(load_recipe("mistral", ["dpo.beta=0.3", "dpo.discopop_tau=0.1"]))
    lines = [line.split() for line in shown.splitlines()]
    assert ["dpo.beta", "0.3", "command", "line:", "'dpo.beta=0.3'"] in lines
    assert ["data.long_replies", "drop", "default"] in lines
    assert any(
        line[:2] == ["model.name", "mistralai/Mistral-7B-v0.1"] and line[2].endswith("mistral.yaml:5")
        for line in lines
        if line
    )
    idle = without_effect(load_recipe("mistral", ["dpo.discopop_tau=0.1"]))
    assert idle.keys() == {"model.lora.lora_dropout", "dpo.discopop_tau"}
    assert "model.lora.lora_dropout" not in without_effect(load_recipe("mistral", ["dpo.disable_dropout=false"]))


def test_show_marks_what_alignlab_sets_itself():
    recipe = load_recipe("mistral", ["dpo.beta=0.3"])
    text = show_arguments("dpo", {"beta": 0.3, "output_dir": Path("runs"), "max_length": 1024}, recipe)
    assert text.splitlines() == [
        "trl.DPOConfig",
        "  beta        0.3   command line: 'dpo.beta=0.3'",
        "  max_length  1024  set by alignlab",
        "  output_dir  runs  set by alignlab: a run stands in runs/; name it with --run",
    ]


def test_sections_are_frozen_and_their_fields_are_the_recipe_keys():
    recipe = load_recipe("tiny")
    with pytest.raises(AttributeError):
        recipe.data.seed = 1
    assert {f.name for f in fields(recipe.data)} == asdict(recipe)["data"].keys()


# Paths


PATHS = {
    "recipes/base.yaml": "model: {name: m}\ndata: {source: hh-rlhf, path: Org/hh, subset: helpful, split: train_a}",
    "recipes/mine.yaml": "about: m\nextends: base\ndata: {path: rows.jsonl}",
    "recipes/rows.jsonl": "{}",
    "here.jsonl": "{}",
}


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in PATHS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)


def test_a_path_is_looked_for_beside_the_recipe_then_in_the_working_folder(paths):
    assert load_recipe("mine").data.path == "recipes/rows.jsonl"
    assert load_recipe("mine", ["data.path=here.jsonl"]).data.path == "here.jsonl"
    assert load_recipe("mine", ["data.path=[here.jsonl, rows.jsonl]"]).data.path == ["here.jsonl", "rows.jsonl"]
    assert load_recipe("base").data.path == "Org/hh"


def test_what_was_said_of_another_path_is_not_said_of_a_new_one(paths):
    """In a recipe that extends another, and on the command line; a copy of the same name keeps its parts."""
    for data in (load_recipe("mine").data, load_recipe("base", ["data.path=here.jsonl"]).data):
        assert (data.source, data.subset, data.split) == (None, None, "train")
    copy = load_recipe("base", ["data.path=/copies/hh"]).data
    assert (copy.source, copy.subset, copy.split) == (None, "helpful", "train_a")
    said = load_recipe("base", ["data.path=here.jsonl", "data.source=pairs", "data.split=train_b"]).data
    assert (said.source, said.subset, said.split) == ("pairs", None, "train_b")
    assert load_recipe("base", ["data.sft.path=here.jsonl"]).data.source == "hh-rlhf"
    assert load_recipe("tiny", ["data.path=here.jsonl"]).data.source is None


@pytest.mark.parametrize("path", ["a b.jsonl", "a #1.jsonl", "~/x #2/rows.jsonl", "'a #1.jsonl'"])
def test_a_path_on_the_command_line_may_hold_blanks_and_signs(paths, path):
    assert load_recipe("base", [f"data.path={path}"]).data.path == path.strip("'")


def test_columns_are_written_as_a_mapping(paths):
    data = load_recipe("base", ["data.path=here.jsonl", "data.columns={prompt: q, chosen: a, rejected: b}"]).data
    assert data.columns == {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert load_recipe("base", ["data.path=here.jsonl", "data.columns.prompt=q"]).data.columns == {"prompt": "q"}
