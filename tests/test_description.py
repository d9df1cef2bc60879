"""What is in the data, by counts that a reader can redo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignlab.data.prepare import prepare
from alignlab.doctor.description import describe
from alignlab.recipe.load import DataSection


def row(human: str, chosen: str, rejected: str, split: str = "train") -> dict[str, str]:
    prompt = f"\n\nHuman: {human}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}", "split": split}


@pytest.fixture
def description(tmp_path: Path, words):
    rows = [row(f"t{n}", reply, "bb") for n, reply in enumerate(["ccc", "ddd", "e", "ff"])]
    rows += [row("t0", "ccc", "bb"), row("same", "a", "a")]
    rows += [row("one\n\nAssistant: so\n\nHuman: two", "kk", "ll", split) for split in ("validation",)]
    rows += [row("test one", "kk", "ll", "test")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    section = DataSection(source="hh-rlhf", path=str(tmp_path / "rows.jsonl"))
    return json.loads(json.dumps(describe(prepare(section, words), section, words)))


def test_rows_are_counted_kept_and_dropped(description):
    assert (description["rows_read"], description["kept"]) == (8, 7)
    assert description["splits"] == {"train": 5, "validation": 1, "test": 1}
    assert description["dropped"] == {"the two replies are identical": 1}


def test_the_longer_reply_is_the_chosen_one_in_three_of_four(description):
    """0.75 ± sqrt(0.75 · 0.25 / 4) = 0.217; equal lengths are left out, and the repeated pair counts again: 4 of 5."""
    assert description["length_bias"] == pytest.approx({"longer_is_chosen": 0.75, "stderr": 0.2165, "n": 4}, abs=1e-4)


def test_lengths_are_in_tokens_of_the_model(description):
    """A space, "kk" and the EOS are four; each of the seven pairs is in one bin of each histogram."""
    assert description["tokens"]["chosen"]["median"] == 4
    histogram = description["histogram"]
    edges = histogram.pop("edges")
    assert edges == sorted(set(edges)) and edges[0] == 0
    assert all(sum(counts) == 7 and len(counts) == len(edges) - 1 for counts in histogram.values())


def test_turns_are_the_humans(description):
    assert description["turns"] == {"1": 6, "2": 1}


def test_examples_show_what_the_model_sees(description):
    first = {"prompt": "<s>\n\nHuman: t0\n\nAssistant:", "chosen": " ccc</s>", "rejected": " bb</s>"}
    assert description["examples"][0] == first
