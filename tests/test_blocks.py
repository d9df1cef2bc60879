"""What the pages tell a reader to type: commands are ones that alignlab and make know, and the Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from alignlab.cli.options import read_arguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<mark><!-- not run: [^>]+ -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.DOTALL)
TARGETS = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def typed_lines(program: str) -> list[tuple[str, str]]:
    """Each line of a block without a language, or of the shell, that begins with this program, and its page."""
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block["kind"] in ("", "bash", "sh"):
                lines = block["text"].replace("\\\n", " ").splitlines()
                found += [(page.name, line) for line in lines if line.startswith(f"{program} ")]
    return found


def words_of(line: str) -> list[str]:
    """The words of a command, without its comment and what it is piped to."""
    words = shlex.split(line, comments=True)
    ends = [at for at, word in enumerate(words) if word in ("|", ">", "&&", "||", ";", "&")]
    return words[: ends[0]] if ends else words


@pytest.mark.parametrize(("page", "line"), typed_lines("alignlab"))
def test_a_command_of_the_pages_is_one_that_alignlab_takes(page, line):
    words = words_of(line)[1:]
    if not {"--help", "--version"} & {*words} and "…" not in line and "COMMAND" not in words:
        read_arguments(words)


@pytest.mark.parametrize(("page", "line"), typed_lines("make"))
def test_a_target_of_the_pages_is_one_of_the_makefile(page, line):
    targets = [word for word in words_of(line)[1:] if "=" not in word]
    assert targets and {*targets} <= {*TARGETS}


def python_blocks(page: Path) -> str:
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return "\n".join(block["text"] for block in blocks if block["kind"] == "python" and not block["mark"])


def test_there_are_commands_and_python_to_look_at():
    assert len(typed_lines("alignlab")) > 30 and len(typed_lines("make")) > 5
    assert "al.train_dpo" in python_blocks(ROOT / "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks(ROOT / page), page, "exec"), {})
    assert list(tmp_path.glob("runs/tiny/dpo*/model/adapter_model.safetensors"))
