"""What can be said of accuracies: intervals that count rows and seeds, paired tests, and which methods cannot be told apart.

`right[s, i]` is 1 where the model trained with seed s answered row i right. Both are samples: the rows of the texts there are,
the seeds of the runs there could have been. An interval from n rows alone says nothing of how another seed would have turned
out; one from S seeds alone says nothing of other rows. With

    right[s, i] = μ + row_i + seed_s + rest[s, i]

(a crossed design with random effects; Searle, Casella & McCulloch 1992, *Variance Components*, chapter 4) a two-way analysis of
variance gives the part of the mean's variance that comes from the rows, MS_rows / (S · n), and the part from the seeds,
(MS_seeds − MS_rest) / (S · n) where that is positive. The half width of an interval is √(t²·rows + t²·seeds), each with the t of its
own degrees of freedom, n − 1 and S − 1 (after Howe 1974, "Approximate confidence limits on the mean of X + Y"): with few seeds
that differ it becomes wide, as it must. One t for the sum (Satterthwaite) holds the truth 91 times in 100 with three seeds, not 95;
this one 95 (tests/test_stats.py, which also sees two equal methods told apart 7 times in 100 with three seeds, 5 with one).
Two methods are compared on the differences `a[s, i] − b[s, i]` of the same rows and seeds, which is much sharper than
comparing two intervals. With one seed nothing is known of seeds: Wilson's interval, and McNemar's exact test, are of the rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ALPHA = 0.05
"""What is called an interval holds the truth in all but so many cases."""
Right = np.ndarray
"""Float or bool, (seeds, rows)."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, and of how many rows and seeds."""

    mean: float
    interval: tuple[float, float]
    n: int
    seeds: int


@dataclass(frozen=True)
class Difference:
    """How much one method's accuracy is above another's, with a 95 % interval, and the p-value of "not at all"."""

    mean: float
    interval: tuple[float, float]
    p: float


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): holds near 0 and 1 and for small n, where ±1.96·σ does not."""
    z = 1.959964
    p, zz = correct / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right: Right) -> Estimate:
    """Accuracy over all rows and seeds."""
    seeds, n = right.shape
    mean = float(right.mean())
    low, high = wilson(round(mean * n), n)
    if seeds > 1:
        half = _half_width(right, ALPHA)
        low, high = min(low, max(0.0, mean - half)), max(high, min(1.0, mean + half))
    return Estimate(mean, (low, high), n, seeds)


def difference(a: Right, b: Right) -> Difference:
    """`a` above `b`, on the same rows and seeds, in the same order."""
    if a.shape != b.shape:
        raise ValueError(f"not the same rows and seeds: {a.shape} and {b.shape}")
    d = a.astype(float) - b.astype(float)
    mean = float(d.mean())
    if len(d) == 1:
        from scipy.stats import binomtest  # here, because its import takes as long as a short evaluation

        better, worse = int((d > 0).sum()), int((d < 0).sum())
        half = NormalDist().inv_cdf(1 - ALPHA / 2) * float(d.std()) / math.sqrt(d.size)
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        return Difference(mean, (mean - half, mean + half), float(p))
    half = _half_width(d, ALPHA)
    return Difference(mean, (mean - half, mean + half), _p_value(d, mean))


def told_apart(rights: Sequence[Right]) -> list[bool]:
    """Which methods differ from the best one, at 5 % for all of them together (Holm 1979); the best itself does not."""
    means = [float(right.mean()) for right in rights]
    best = means.index(max(means))
    others = sorted((difference(rights[best], right).p, i) for i, right in enumerate(rights) if i != best)
    apart = [False] * len(rights)
    for rank, (p, i) in enumerate(others):
        if p > ALPHA / (len(others) - rank):
            break
        apart[i] = True
    return apart


def _half_width(x: Right, alpha: float) -> float:
    """Half the width of the mean's 1 − alpha interval, of a (seeds, rows) table with more than one of both."""
    from scipy.stats import t

    seeds, n = x.shape
    x = x.astype(float)
    by_row, by_seed, mean = x.mean(0), x.mean(1), x.mean()
    rest = float(((x - by_row - by_seed[:, None] + mean) ** 2).sum()) / ((n - 1) * (seeds - 1))
    rows = seeds * float(((by_row - mean) ** 2).sum()) / (n - 1)
    runs = max(0.0, n * float(((by_seed - mean) ** 2).sum()) / (seeds - 1) - rest)
    of_rows, of_seeds = (float(t.ppf(1 - alpha / 2, degrees)) for degrees in (n - 1, seeds - 1))
    return math.sqrt((of_rows**2 * rows + of_seeds**2 * runs) / (seeds * n))


def _p_value(d: Right, mean: float) -> float:
    """The alpha whose interval just reaches zero."""
    if mean == 0:
        return 1.0
    low, high = math.log(1e-12), 0.0  # of alpha: the interval shrinks from one to the other
    if _half_width(d, math.exp(low)) < abs(mean):
        return math.exp(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _half_width(d, math.exp(middle)) > abs(mean) else (low, middle)
    return math.exp(high)
