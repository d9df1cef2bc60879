"""Variety and repetition, on sequences counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.measure.quality import distinct, repetition

REPLIES = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=6)


@pytest.mark.parametrize(
    ("replies", "share"),
    [
        ([[1, 2, 3], [1, 2, 4]], 3 / 4),  # 12, 23, 12, 24
        ([[7, 7, 7, 7]], 1 / 3),
        ([[1], [2]], 1.0),
        ([], 1.0),
    ],
)
def test_distinct_bigrams_by_hand(replies, share):
    assert distinct(replies, 2) == pytest.approx(share)


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234, 2341, 3412, 4123, 1234
        ([5] * 10, 6 / 7),
        ([1, 2, 3], 0.0),
        (list(range(50)), 0.0),
    ],
)
def test_repeated_four_grams_by_hand(reply, share):
    assert repetition(reply) == pytest.approx(share)


@given(REPLIES)
def test_a_share_lies_between_zero_and_one(replies):
    assert 0 < distinct(replies, 2) <= 1
    assert all(0 <= repetition(reply) < 1 for reply in replies)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=12))
def test_a_reply_said_over_and_over_repeats_itself_more(reply):
    assert repetition(reply * 5) > repetition(reply * 2) - 1e-9 >= 0
