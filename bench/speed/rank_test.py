"""The exact Mann-Whitney test: is one set of samples shifted against another, and within which interval is the shift?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

LEVEL = 0.05
MAX_EXACT = 10_000  # n * m of the exact distribution; above that, the normal one is as good


@lru_cache(maxsize=64)
def null_distribution(n: int, m: int) -> tuple[float, ...]:
    """P(U = 0), P(U = 1), … of the Mann-Whitney U for n and m samples of one distribution, without ties.

    Exact while n * m is below MAX_EXACT: the counts are the coefficients of the Gaussian binomial, prod (1 - q^(m + i)) / (1 - q^i)
    for i up to n.
    """
    size = n * m + 1
    if size > MAX_EXACT:
        normal = statistics.NormalDist(n * m / 2, math.sqrt(n * m * (n + m + 1) / 12))
        below = [normal.cdf(u + 0.5) for u in range(size)]
        return (below[0], *(b - a for a, b in itertools.pairwise(below)))
    counts = [1] + [0] * (size - 1)
    for i in range(1, n + 1):
        for at in range(size - 1, m + i - 1, -1):
            counts[at] -= counts[at - m - i]
        for at in range(i, size):
            counts[at] += counts[at - i]
    total = math.comb(n + m, n)
    return tuple(count / total for count in counts)


def p_value(steps: Sequence[float] | np.ndarray[Any, Any], n: int, m: int) -> float:
    """Two-sided, from all n * m differences. A tie counts against finding a difference."""
    above, below = int(np.sum(np.asarray(steps) > 0)), int(np.sum(np.asarray(steps) < 0))
    smaller = n * m - max(above, below)  # ties go to the smaller side
    return min(1.0, 2 * sum(null_distribution(n, m)[: min(smaller, n * m) + 1]))


def not_rejected(ordered: Sequence[float] | np.ndarray[Any, Any], null: Iterable[float]) -> tuple[float, float] | None:
    """The ends of the interval that a two-sided rank test does not reject at LEVEL; None if it can reject nothing.

    ordered: the candidate values, ascending; null: P(rank 0), P(rank 1), … of the statistic if nothing differs.
    """
    tail, inside = 0.0, 0
    for probability in null:
        tail += probability
        if 2 * tail >= LEVEL:
            break
        inside += 1
    return (float(ordered[inside - 1]), float(ordered[len(ordered) - inside])) if inside else None


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
