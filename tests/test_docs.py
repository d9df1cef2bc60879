"""The pages of docs: short sentences, links that resolve, a question that each answers."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)
IDS = [page.name for page in PAGES]


def sentences(page: Path) -> list[str]:
    """The prose of a page: paragraphs, list items and table cells, without code."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#]|\d+\. )", text):
        prose = re.sub(r"\s+", " ", re.sub(r"^[-#>\s]+|^\d+\. ", "", paragraph))
        if prose and not prose.startswith(("|", "![")):
            found += re.split(r"(?<=[.!?:;]) (?=[A-Z`*\[])", prose)
    return [sentence for sentence in found if len(sentence.split()) > 1]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_sentence_is_longer_than_thirty_words(page):
    long = [sentence for sentence in sentences(page) if len(sentence.split()) > 30]
    assert not long, long


def test_sentences_have_sixteen_words_at_most_on_average():
    lengths = [len(sentence.split()) for page in PAGES for sentence in sentences(page)]
    print(f"mean sentence {sum(lengths) / len(lengths):.1f} words, longest {max(lengths)}, of {len(lengths)}")
    assert sum(lengths) / len(lengths) <= 16


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_resolves(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists() if path else True, target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (page.parent / path if path else page).read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings], target


def test_every_page_answers_a_question_and_the_readme_names_it():
    readme = README.read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, page.name
        assert page.read_text(encoding="utf-8").startswith("# "), page.name


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8192


@pytest.mark.parametrize("page", ["architecture.md", "recipes.md"])
def test_a_page_made_from_the_code_is_as_the_code_says(page):
    made = runpy.run_path(str(ROOT / "docs" / "make.py"))["PAGES"][page]()
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == made, "python docs/make.py"
