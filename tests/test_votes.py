"""Votes as files: what is written is read again, and what is wrong is named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignlab.errors import DataError
from alignlab.people.votes import Vote, read_votes, write_votes

ROW = {
    "prompt": "\n\nHuman: Hi\n\nAssistant:",
    "models": ["dpo", "sft"],
    "left": "sft",
    "winner": "dpo",
    "voter": "Ada",
    "at": "2026-01-31T12:00:00Z",
    "helpfulness": {"dpo": 5, "sft": 2},
    "harmlessness": None,
    "replies": {"dpo": " Hello.", "sft": " What?"},
}


def file_of(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_what_is_written_is_read_again(tmp_path):
    path = file_of(tmp_path, ROW, {**ROW, "winner": "both_bad", "prompt": "quote \" 'x' \u2028 line"})
    votes = read_votes(path)
    write_votes(tmp_path / "again.jsonl", votes)
    assert read_votes(tmp_path / "again.jsonl") == votes
    assert json.loads((tmp_path / "again.jsonl").read_text().split("\n")[0]) == ROW


def test_what_a_tool_does_not_know_may_be_left_out(tmp_path):
    few = {name: ROW[name] for name in ("prompt", "models", "winner")}
    assert read_votes(file_of(tmp_path, few)) == [Vote(prompt=ROW["prompt"], models=("dpo", "sft"), winner="dpo")]


def test_an_outcome_is_the_first_models_and_two_bad_replies_are_a_tie(tmp_path):
    winners = ("dpo", "sft", "tie", "both_bad")
    votes = read_votes(file_of(tmp_path, *({**ROW, "winner": winner} for winner in winners)))
    assert [vote.outcome for vote in votes] == [1, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        *(({key: value for key, value in ROW.items() if key != name}, name) for name in ("prompt", "models", "winner")),
        ("{", "not JSON"),
        ("[" * 9000, "not JSON"),
        ("[1]", "not a JSON object"),
        ({**ROW, "models": ["dpo", "dpo"]}, "models"),
        ({**ROW, "models": "dpo|sft"}, "models"),
        ({**ROW, "winner": "base"}, "winner is 'base'"),
        ({**ROW, "winner": []}, "winner"),
        ({**ROW, "left": "base"}, "left"),
        ({**ROW, "prompt": 3}, "prompt is 3"),
        ({**ROW, "helpfulness": 3}, "helpfulness"),
        ({**ROW, "helpfulness": {"dpo": 6}}, "helpfulness is 6"),
        ({**ROW, "harmlessness": {"dpo": True}}, "harmlessness is True"),
        ({**ROW, "replies": {"dpo": "x"}}, "replies"),
    ],
)
def test_a_fault_is_one_line_with_file_line_and_field(tmp_path, row, says):
    with pytest.raises(DataError) as caught:
        read_votes(file_of(tmp_path, ROW, row))
    said = str(caught.value)
    assert says in said and f"{tmp_path / 'votes.jsonl'}:2" in said and "\n" not in said


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot be read as votes"):
        read_votes(tmp_path / "none.jsonl")
