"""Figures as one value a prompt: their means are the figures, and their errors those of independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.evaluation.estimates import clustered, distinct_values, perplexity_values, ratio_values, table_row
from alignlab.measure.quality import distinct
from alignlab.text.estimate import Estimate, mean_estimate

DRAW = np.random.default_rng(0)


def test_ratio_by_hand():
    """(1 + 3) ÷ (2 + 2) = 1; the residuals 1 − 2 and 3 − 2 over the mean 2 of the denominators are ∓½."""
    assert ratio_values([1, 3], [2, 2]).tolist() == [0.5, 1.5]


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=30))
def test_the_mean_over_clusters_is_the_mean_over_rows(rows):
    values, clusters = zip(*rows, strict=True)
    found = clustered(values, clusters)
    assert len(found) == len(set(clusters)) and found.mean() == pytest.approx(np.mean(values), abs=1e-9)


def test_rows_without_a_shared_prompt_are_as_they_were():
    assert clustered([3, 1, 2], "abc").tolist() == [3, 1, 2]


def test_the_same_row_twice_says_no_more_than_once():
    once = mean_estimate([1, 2, 4])
    assert mean_estimate(clustered([1, 1, 2, 2, 4, 4], "aabbcc")) == once


def test_clusters_of_different_sizes_have_the_error_of_the_bootstrap():
    """Prompts with one to four pairs each, whose values hang together."""
    sizes = DRAW.integers(1, 5, 400)
    clusters = np.repeat(np.arange(400), sizes)
    values = np.repeat(DRAW.normal(size=400), sizes) + 0.3 * DRAW.normal(size=len(clusters))
    rows = [values[clusters == c] for c in range(400)]
    means = [np.concatenate([rows[c] for c in DRAW.integers(0, 400, 400)]).mean() for _ in range(1500)]
    assert mean_estimate(clustered(values, clusters)).stderr == pytest.approx(np.std(means), rel=0.08)


def test_perplexity_is_that_of_all_tokens_with_the_error_of_the_bootstrap():
    tokens = DRAW.integers(5, 60, 300)
    logps = -DRAW.gamma(2, 0.6, 300) * tokens
    values = perplexity_values(logps, tokens)
    assert values.mean() == pytest.approx(math.exp(-logps.sum() / tokens.sum()))
    draws = DRAW.integers(0, 300, (2000, 300))
    bootstrap = np.exp(-logps[draws].sum(1) / tokens[draws].sum(1))
    assert mean_estimate(values).stderr == pytest.approx(bootstrap.std(), rel=0.08)


def test_distinct_is_the_corpus_figure_with_the_error_of_the_jackknife():
    replies = [DRAW.integers(0, 9, DRAW.integers(0, 12)).tolist() for _ in range(40)]
    values = distinct_values(replies, 2)
    assert values.mean() == pytest.approx(distinct(replies, 2))
    without = [distinct(replies[:i] + replies[i + 1 :], 2) for i in range(40)]
    jackknife = math.sqrt(39 / 40 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert mean_estimate(values).stderr == pytest.approx(jackknife)


def test_distinct_of_replies_too_short_for_it_is_one():
    assert distinct_values([[1], []], 2).tolist() == [1, 1]


def test_a_change_is_paired():
    """Models that differ by ½ on every prompt: the change is certain, however much the prompts scatter."""
    easy = np.array([0.0, 10, 20, 30])
    row = table_row("g", "m", {"sft": easy, "dpo": easy + 0.5}, "sft")
    assert row.values["dpo"].stderr > 6 and row.change == {"dpo": Estimate(0.5, 0.0, 4, 0.5, 0.5)}


def test_a_figure_that_the_other_model_lacks_has_no_change():
    row = table_row("g", "m", {"sft": None, "dpo": [1.0, 2.0]}, "sft")
    assert set(row.values) == {"dpo"} and row.change == {"dpo": None}
