"""The public face: light to import, the same as the commands, printed as the terminal shows it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import alignlab as al


def test_all_is_what_it_says():
    assert sorted(al.__all__) == al.__all__
    for name in al.__all__:
        assert getattr(al, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'train_ppo'"):
        _ = al.train_ppo


def test_importing_a_room_leaves_the_function_of_its_command():
    """A package of the same name would take its place as soon as it is imported."""
    program = (
        "import alignlab as al, pkgutil\n"
        "rooms = {module.name for module in pkgutil.iter_modules(al.__path__)}\n"
        "print(rooms & set(al.__all__))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_a_recipe_prints_where_each_value_was_written():
    text = repr(al.load_recipe("tiny", "dpo.beta=0.3"))
    assert "dpo.beta" in text and "command line" in text and "tiny.yaml:" in text


def test_errors_are_of_one_kind():
    with pytest.raises(al.AlignlabError, match="did you mean 'beta'"):
        al.load_recipe("tiny", "dpo.betta=1")
    with pytest.raises(al.AlignlabError, match="there is no run at"):
        al.Run.open("nowhere")


@pytest.mark.slow
def test_a_run_from_python(tmp_path, monkeypatch):
    """From the recipe to an export, in the folder where the commands would put them."""
    monkeypatch.chdir(tmp_path)
    few = ("data.toy.pairs=200", "sft.max_steps=2", "dpo.max_steps=2", "sft.eval_steps=2", "dpo.eval_steps=2")
    recipe = al.load_recipe("tiny", *few, "sft.logging_steps=1", "dpo.logging_steps=1", "monitor.kl.prompts=4")
    pairs = al.prepare(recipe)
    assert sorted(pairs.splits) == ["test", "train", "validation"] and "rows read" in repr(pairs)
    assert al.examine(pairs).facts["findings"] and "rows read" in repr(al.examine(pairs))
    assert "GiB" in repr(al.plan(recipe))
    table = al.sweep(recipe, beta=[0.2, 0.1])
    assert len(table.runs) == 2 and "margin" in repr(table)
    run = table.best
    assert run and run.test.accuracy.n and run.metrics[0]["step"] == 0 and run.samples
    assert "accuracy" in repr(run) and run._repr_html_().startswith("<pre ")
    model, tokenizer = run.load()
    assert model.generate(**tokenizer("Hi", return_tensors="pt"), max_new_tokens=2).shape[1] > 1
    found = al.evaluate(run, judge="rule", replies=4, max_new_tokens=8)
    assert "dpo over sft" in repr(found) and found.path.is_file(), repr(found)
    assert al.report(run).read_text().startswith("<!DOCTYPE html>")
    assert (al.export(run, tmp_path / "out").path / "model.safetensors").is_file()
