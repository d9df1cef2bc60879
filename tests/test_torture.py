"""A minute of the campaigns of tests/torture: kills and fuzzed input, as `make torture` runs them for hours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def campaign(name: str, folder: Path, *options: str) -> list[dict]:
    """The lines that a campaign wrote, each a kill, a damaged file or a block of inputs."""
    command = [sys.executable, "tests/torture", name, "--results", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_chains_of_kills_end_as_if_nobody_had_killed_them(tmp_path):
    kinds = ["dpo, ended by steps", "sft, constant", "data"]
    rows = campaign("kills", tmp_path, "--only", *kinds, "--seeds", "1")
    assert {row["chain"] for row in rows} == {*kinds}
    assert any(row["kill"] != "never" for row in rows)
    assert [row for row in rows if not row["same"]] == []


@pytest.mark.slow
def test_a_thousand_fuzzed_recipes_and_rows_are_read_or_refused_in_a_line(tmp_path):
    rows = campaign("fuzz", tmp_path, "--wanted", "1")
    assert sum(row["inputs"] for row in rows) == 1000
    assert [wrong for row in rows for wrong in row["wrong"]] == []
