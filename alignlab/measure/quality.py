"""Signs that sampled text gets worse, whatever the loss says: little variety, and going round in circles; no torch."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(replies: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of the replies together (arXiv 1510.03055); 1 where there are none.

    >>> distinct([[1, 2, 3], [1, 2, 4]], 2)
    0.75
    """
    found = [gram for reply in replies for gram in grams(reply, n)]
    return len(set(found)) / len(found) if found else 1.0


def repetition(reply: Sequence[int], n: int = 4) -> float:
    """The share of a reply's n-grams that stood in it before (seq-rep-n, arXiv 1908.04319); 0 where it is too short.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    found = grams(reply, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(n)), strict=False))
