"""A gate for a data set: what `--fail-on` takes, and what closes it."""

from __future__ import annotations

import pytest

from alignlab.doctor.gate import failures, read_limits
from alignlab.errors import DataError


def finding(name, level, count, of=100):
    return {"name": name, "level": level, "says": f"{count} pairs", "count": count, "of": of, "share": count / of}


FOUND = [
    finding("overlap", "wrong", 1),
    finding("near-duplicates", "doubtful", 5),
    finding("cut-off-replies", "note", 50),
    finding("contradictions", "wrong", 0),
]


@pytest.mark.parametrize(
    "written, closes",
    [
        ([], []),
        (["overlap"], ["overlap"]),
        (["contradictions"], []),
        (["near-duplicates=0.05"], []),
        (["near-duplicates=0.04"], ["near-duplicates"]),
        (["wrong"], ["overlap"]),
        (["doubtful"], ["overlap", "near-duplicates"]),
        (["note"], ["overlap", "near-duplicates", "cut-off-replies"]),
        (["doubtful=0.02"], ["near-duplicates"]),
        (["doubtful=0.02", "note=0.5"], ["near-duplicates"]),
        (["wrong", "overlap=0.5"], []),  # what is named has its own limit
    ],
)
def test_a_finding_above_its_share_closes_the_gate(written, closes):
    assert [line.partition(":")[0] for line in failures(FOUND, read_limits(written))] == closes


def test_the_line_says_what_was_found_and_how_much():
    assert failures(FOUND, {"overlap": 0.0}) == ["overlap: 1 pairs (1.00% of 100)"]


def test_one_name_stands_for_the_findings_of_all_prompt_files():
    found = [finding("prompt-overlap:mt_bench.jsonl", "wrong", 2)]
    assert len(failures(found, read_limits(["prompt-overlap"]))) == 1


@pytest.mark.parametrize("share", ["=", "=2", "=-0.1", "=few", "=nan", "s"])
def test_what_is_no_finding_and_no_share_is_one_line(share):
    with pytest.raises(DataError) as error:
        read_limits([f"overlap{share}"])
    assert f"overlap{share}" in str(error.value) and "\n" not in str(error.value)
