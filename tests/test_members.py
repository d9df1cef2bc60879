"""Which runs a sweep is made of, and the commands that make them."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.cli.commands import main
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import load_recipe, run_name
from alignlab.sweeps.members import commands, find_members


def test_members_are_each_beta_with_each_combination_of_the_grid(small):
    found = find_members("small", [], "0.3,0.1", ["dpo.learning_rate=5e-6,1e-6", "seed=0,1"])
    assert len(found.asked) == 2 * 2 * 2
    first = found.asked[0]
    assert first.settings == {"dpo.beta": 0.3, "dpo.learning_rate": 5e-6, "dpo.seed": 0}
    assert first.name == "dpo-beta0.3-learning_rate5e-06-seed0"
    assert len({member.name for member in found.asked}) == 8


def test_the_betas_are_the_recipes_unless_said_and_its_own_beta_is_the_plain_run(small):
    with_beta = (small / "recipes" / "small.yaml").read_text().replace("beta: 0.7", "beta: 0.1")
    (small / "recipes" / "small.yaml").write_text(with_beta + "sweep: {betas: [0.2, 0.1]}\n")
    assert [member.name for member in find_members("small").asked] == ["dpo-beta0.2", "dpo"]
    assert [member.beta for member in find_members("small", [], "1, 5e-2").asked] == [1.0, 0.05]


def test_a_grid_setting_with_one_value_is_for_all_members(small):
    found = find_members("small", [], "0.3", ["sft.max_steps=2", "dpo.loss_type=[sigmoid]"])
    assert found.shared == ['dpo.loss_type=["sigmoid"]', "sft.max_steps=2"]
    assert found.asked[0].settings == {"dpo.beta": 0.3}


def test_commas_inside_of_a_value_are_its_own(small):
    found = find_members("small", [], "0.3", ["loss_type=[sigmoid,sft],[sigmoid]"])
    assert [member.settings["dpo.loss_type"] for member in found.asked] == [["sigmoid", "sft"], ["sigmoid"]]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--betas", ""], "--betas has no values"),
        (["--betas", "0.1,,"], "is no list of values"),
        (["--betas", "0.1,abc"], "sweep.betas is [0.1, 'abc']"),
        (["--betas", "0.1,-1"], "sweep.betas holds -1.0, but a beta is a number above 0"),
        (["--betas", "0"], "a beta is a number above 0"),
        (["--betas", "nan"], "expected list[float]"),
        (["--betas", "0.1,1e-1"], "sweep.betas holds 0.1 twice, which would be two equal members"),
        (["--grid", "dpo.seed="], "--grid dpo.seed= has no values"),
        (["--grid", "dpo.seed"], "is no setting with its values"),
        (["--grid", "dpo.seed=1,1"], "are two equal members"),
        (["--grid", "dpo.beta=0.1,0.10"], "are two equal members"),
        (["--grid", "dpo.sed=1,2"], "did you mean 'seed'?"),
        (["--grid", "dpo.learning_rate=1e-5,fast"], "dpo.learning_rate is 'fast'"),
        (["--grid", "monitor.patience=1,2"], "no DPO run depends on it"),
        (["--grid", "sft.learning_rate=1e-5,1e-4"], "no DPO run depends on it"),
        (["--grid", "dpo.seed=1,2", "dpo.seed=3"], "names dpo.seed twice"),
        (["--betas", "0.1", "--grid", "dpo.beta=0.1,0.2"], "both name betas"),
        (["dpo.beta=0.3"], "dpo.beta=0.3 is for all members, but dpo.beta is swept over"),
        (["sweep.betas=[]"], "sweep.betas is empty"),
        (["sweep.max_kl=0"], "expected a value above 0"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(arguments, said, small, capsys):
    assert main(["sweep", "small", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (small / "runs").exists()


@given(
    st.lists(st.floats(1e-6, 1e6, allow_nan=False), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 9), min_size=2, max_size=3, unique=True),
)
@settings(max_examples=15, deadline=None)
def test_a_printed_command_names_the_members_own_run(betas, seeds):
    """Read back as a shell reads it, each line is the recipe of its member."""
    found = find_members(
        "tiny", ["data.max_pairs=9"], ",".join(map(repr, betas)), [f"seed={','.join(map(str, seeds))}"]
    )
    shared, *lines = [shlex.split(line) for line in commands(found)]
    assert shared[-1] == "--shared"
    read = [load_recipe(line[line.index("dpo") + 1], line[line.index("dpo") + 2 :]) for line in lines]
    assert [run_name(recipe, "dpo") for recipe in read] == [member.name for member in found.asked]
    assert [recipe.dpo["beta"] for recipe in read] == [member.beta for member in found.asked]


def test_printing_and_collecting_import_no_torch(small):
    library_settings.cache_clear()
    library_settings()  # the first recipe after an installation reads the libraries' fields, once
    heavy = "print([name for name in ('torch', 'trl', 'transformers', 'datasets') if name in sys.modules])"
    for mode in ("--print", "--collect"):
        program = f"import sys\nfrom alignlab.cli.commands import main\nmain(['sweep', 'small', '{mode}'])\n{heavy}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", done
