"""A figure with its standard error, its number of draws and its 95 % interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n independent draws, and where the true mean lies at 95 % confidence; none is what is not known."""

    mean: float
    stderr: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """`0.62 ± 0.03 (n=256)`, as far as it is known."""
        return self.plus_minus() + ("" if self.n is None else f" (n={self.n})")

    def plus_minus(self) -> str:
        """`0.62 ± 0.03`."""
        return f"{self.mean:.3g}" + ("" if self.stderr is None else f" ± {self.stderr:.2g}")

    def in_words(self) -> str:
        """`0.62, 95 % interval 0.56 to 0.68 (n=256)`."""
        if self.low is None:
            return f"{self.mean:.3g} (n={self.n})"
        return f"{self.mean:.3g}, 95 % interval {self.low:.3g} to {self.high:.3g} (n={self.n})"

    def with_interval(self, share: bool = False) -> Estimate:
        """The same with its interval, by its standard error; one that it has already is kept.

        Student's t over n − 1 degrees of freedom, the normal distribution where n is not known. Of a share, which lies
        between 0 and 1, the interval of `share_estimate`. Where the error is not known, neither is the interval.
        """
        if self.low is not None and self.high is not None:
            return self
        if self.stderr is None or (self.n is not None and self.n < 2):
            return replace(self, low=None, high=None)
        if share and self.n is not None:
            low, high = _share_edges(self.mean, self.stderr, self.n)
        else:
            low, high = _edges(self.mean, self.stderr, self.n)
        return replace(self, low=low, high=high)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that can be shown or drawn: finite, and neither true nor false."""
    return type(value) in (float, int) and math.isfinite(value)


def mean_estimate(values: ArrayLike, share: bool = False) -> Estimate:
    """The mean, its error s/√n with s² over n − 1, and its interval, see `with_interval`. A single value has no error.

    Paired: give it differences.
    """
    x = np.asarray(values, dtype=float)
    stderr = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Estimate(float(x.mean()), stderr, len(x)).with_interval(share)


def share_estimate(values: ArrayLike) -> Estimate:
    """The mean of values between 0 and 1, such as outcomes of 0, ½ and 1, with an interval that is never a point.

    Values that stand for several draws of one prompt (see `evaluate.estimates`) may lie outside; their mean does not.

    Student's interval of the values and, added to them, one 0 and one 1, cut to [0, 1]: the "plus two" rule for
    paired proportions (Bonett and Price, Br. J. Math. Stat. Psychol. 65, 2012). The exact coverage over trinomial
    outcomes is 94.3 to 95.6 % at n = 100 and 94.9 to 95.5 % at n = 400, for win rates of 0.5 to 0.9 and up to 40 %
    ties. Twenty wins of twenty give 0.86 to 1, and a single win 0 to 1. The standard error is that of the same values.
    """
    x = np.asarray(values, dtype=float)
    assert len(x) and -1e-9 <= x.mean() <= 1 + 1e-9, "a share lies between 0 and 1"
    wider = mean_estimate([*x, 0.0, 1.0])
    assert wider.low is not None and wider.high is not None, "two values were added"
    return replace(wider, mean=float(x.mean()), n=len(x), low=max(wider.low, 0.0), high=min(wider.high, 1.0))


def _edges(mean: float, stderr: float, n: int | None) -> tuple[float, float]:
    from scipy.special import stdtrit

    half = float(stdtrit(math.inf if n is None else n - 1, (1 + LEVEL) / 2)) * stderr
    return mean - half, mean + half


def _share_edges(mean: float, stderr: float, n: int) -> tuple[float, float]:
    """Of n draws and, added to them, one 0 and one 1: their mean and variance follow from those of the n."""
    total, squares = n * mean + 1, (n - 1) * n * stderr**2 + n * mean**2 + 1
    centre = total / (n + 2)
    error = math.sqrt(max(0.0, squares - (n + 2) * centre**2) / (n + 1) / (n + 2))
    low, high = _edges(centre, error, n + 2)
    return max(low, 0.0), min(high, 1.0)
