"""Foreign text on a terminal: whatever a recipe, an override, a file or a column holds, nothing in it acts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.cli.commands import main
from alignlab.text.safe import UNSAFE, harmless, harmless_json, one_line

ACTING = ("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\x08", "\x7f", "\u202e", "\u2066", "\u200b", "\ufeff")
RECIPE = """
about: {about}
extends: {extends}
data: {{path: {path}, {key}: {value}}}
model: {{name: {model}}}
"""


@given(st.text(st.characters() | st.sampled_from([*"".join(ACTING), "\n", "\t"])))
def test_what_is_shown_has_no_character_that_acts(text):
    assert not UNSAFE.search(harmless(text)) and not UNSAFE.search(one_line(text)) and "\n" not in one_line(text)


@given(st.text())
def test_ordinary_text_stays_as_it_is(text):
    assert UNSAFE.search(text) or harmless(text) == text.replace("\r\n", "\n")


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_keeps_its_values_and_has_no_character_that_acts(value):
    shown = harmless_json(value)
    assert json.loads(shown) == value and not UNSAFE.search(shown)


def nasty(draw: random.Random) -> str:
    """A word with something in it that acts on a terminal."""
    word = draw.choice(["beta", "tiny", "a", "übung", "dpo", "x y"])
    at = draw.randrange(len(word) + 1)
    return word[:at] + draw.choice(ACTING) + word[at:]


def test_nothing_in_recipes_overrides_and_names_acts_on_the_terminal(tmp_path, monkeypatch, capsys):
    """Seeded: escape codes in each place of a recipe, in keys and values of overrides, in names of files and runs."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    (tmp_path / "recipes").mkdir()
    for number in range(150):
        texts = {key: json.dumps(nasty(draw)) for key in ("about", "path", "key", "value", "model")}
        hostile = RECIPE.format(**texts, extends=json.dumps(nasty(draw)) if number % 3 == 0 else "tiny")
        if number % 2:
            hostile = f"about: {texts['about']}\nextends: tiny\n"
        name = f"{nasty(draw)}{number}.yaml".replace("/", "-")
        (tmp_path / "recipes" / name).write_text(hostile)
        word = nasty(draw)
        commands = [
            ["show", f"recipes/{name}"],
            ["show", word],
            ["show", "tiny", f"{word}={word}"],
            ["show", "tiny", f"dpo.beta={word}"],
            ["show", "tiny", f"model.name={word}"],
            ["show", "tiny", f"dpo.{word}=1"],
            ["dpo", "tiny", "--run", word],
            ["report", word],
            ["compare", "tiny", f"runs/{word}"],
            ["sweep", "tiny", "--grid", f"{word}={word}"],
            ["sweep", "tiny", "--betas", word],
            ["data", "tiny", "--fail-on", word],
        ]
        main(draw.choice(commands))
        said = capsys.readouterr()
        assert not UNSAFE.search(said.out + said.err), (number, said)
    main(["list"])
    listed = capsys.readouterr().out
    assert not UNSAFE.search(listed) and "⟨U+001B⟩" in listed


@pytest.mark.parametrize(
    "arguments", [["trian\x1b[2J"], ["dpo", "tiny", "--\x1b[2J"], ["plan", "tiny", "--gpu", "\x1b[2J"]]
)
def test_a_wrong_argument_does_not_act_on_the_terminal(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().err
    assert "[2J" in said and not UNSAFE.search(said)


def test_nothing_in_a_data_file_acts_on_the_terminal(folders, tmp_path):
    """Its name, its columns and its rows, in what is logged and in the one line of an error."""
    data = tmp_path / "rows\x1b[2J.jsonl"
    (tmp_path / "r.yaml").write_text(f"data: {{path: x}}\nmodel: {{name: {folders['llama']}}}\n")
    command = [sys.executable, "-m", "alignlab", "data", "r.yaml", f"data.path={json.dumps(str(data))}"]
    for row in ({"chosen\x1b[2J": "a", "b\nforged: line": "c"}, {"prompt\x1b": "\x1b[2J", "chosen": 1}):
        data.write_text(json.dumps(row) + "\n")
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
        assert done.returncode == 2 and "⟨U+001B⟩" in done.stderr, done
        assert not UNSAFE.search(done.stdout + done.stderr) and "\nforged" not in done.stderr
