"""The notebooks of the lab run from a clean state, and name every point of the course."""

from __future__ import annotations

import re
import runpy
import shutil
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need the extra [lab]")
pytest.importorskip("nbclient", reason="the notebooks need the extra [lab]")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LAB = runpy.run_path(str(NOTEBOOKS / "run.py"))
NAMES = LAB["NAMES"]
SOLUTION = re.compile(r"<details><summary>Solution</summary>(.*?)</details>", re.DOTALL)
MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|opt|usr|var|mnt|private)/")
POINTS = {  # the course's check list, each as it is called where it is shown
    "01-Setup_and_Data.ipynb": (
        "Why RLHF is hard",
        "The form of a preference pair",
        "HH-RLHF, summaries, SHP, own pairs",
        "Prompt leak",
        "A collator written by hand, against TRL's",
        "Lengths, counts and quality",
        "What the doctor finds",
        "A shortcut",
    ),
    "02-SFT_Baseline.ipynb": (
        "The base model",
        "The loss on replies only",
        "Perplexity",
        "Which checkpoint",
        "Samples",
        "Why this model becomes the reference",
    ),
    "03-DPO_Training.ipynb": (
        "Bradley–Terry",
        "The loss derived",
        "The loss in fifteen lines, against TRL's",
        "The implicit reward",
        "Margin, accuracy and KL",
        "What beta does: a sweep",
        "The wrong reference, broken on purpose",
        "KL on samples, and why `rewards/chosen ÷ beta` is none",
        "Over-optimisation, and the guard",
        "Learning rate",
    ),
    "04-Evaluation_and_Compare.ipynb": (
        "Win rate with its interval",
        "Comparisons needed to see 55 %",
        "Position and length bias of a judge",
        "Elo",
        "People's votes",
        "Safety, refusals and bias",
        "The table of SFT against DPO, with targets",
        "Wins and failures, read aloud",
        "What was not shown",
        "KTO",
        "ORPO",
        "A round of self-made pairs",
    ),
}


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(output) -> str:
    """All of an output that can be read; a picture cannot."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))])


def check_outputs(notebook) -> None:
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
        assert "Warning" not in text_of(output), text_of(output)
        assert not MACHINE.search(text_of(output)), text_of(output)


@pytest.mark.parametrize("name", NAMES)
def test_every_point_of_the_course_has_a_heading(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    absent = [point for point in POINTS[name] if not any(point in heading for heading in headings)]
    assert not absent, absent


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_has_aims_exercises_a_check_list_and_sources(name):
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells)
    assert all(part in text for part in ("**You will**", "## Exercises", "## Check list", "## Sources", "RECIPE ="))
    assert len(SOLUTION.findall(text)) == text.count("</details>") >= 3


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_small_and_clean(name):
    assert (NOTEBOOKS / name).stat().st_size < 1_000_000
    check_outputs(nbformat.read(NOTEBOOKS / name, as_version=4))


@pytest.mark.parametrize("name", NAMES)
def test_every_plot_names_both_axes(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    plots = [cell.source for cell in notebook.cells if "plt.show()" in cell.source]
    assert len(plots) == sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert all("xlabel=" in plot and "ylabel=" in plot for plot in plots)


@pytest.mark.lab
def test_the_notebooks_and_their_solutions_run_from_a_clean_state(tmp_path, monkeypatch):
    """All four, in their order, beside each other: the later ones open runs of the earlier ones."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "notebooks"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("runs", "__pycache__", ".ipynb_checkpoints"))
    for name in NAMES:
        add_solutions(folder / name)
        began = time.monotonic()
        notebook = LAB["execute"](folder / name)
        print(f"{name}: {time.monotonic() - began:.0f} s")
        check_outputs(notebook)
        assert len(nbformat.writes(notebook)) < 1_000_000


def add_solutions(file: Path) -> None:
    """The code of the exercises' solutions, each as a cell at the end."""
    notebook = nbformat.read(file, as_version=4)
    solutions = SOLUTION.findall("\n".join(cell.source for cell in notebook.cells))
    codes = [code for solution in solutions for code in re.findall(r"```python\n(.*?)```", solution, re.DOTALL)]
    assert len(codes) >= 2
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in codes]
    nbformat.write(notebook, file)


@pytest.mark.parametrize("name", NAMES)
def test_the_cell_that_switches_the_recipe_names_recipes(name):
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells]
    (line,) = [line for cell in cells for line in cell.splitlines() if line.startswith("RECIPE =")]
    named = re.findall(r'"([\w-]+)"', line)
    shipped = {file.stem for file in (NOTEBOOKS.parent / "recipes").glob("*.yaml")}
    assert named == ["tiny", "gemma270m", "gpt2", "mistral"] and set(named) <= shipped
