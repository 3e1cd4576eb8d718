"""Which of several values is best on the same tokens, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yarn_edge.averages import Mean, blocks_of, paired
from yarn_edge.likelihood import Float64

RESAMPLINGS = 2000
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Best:
    """index: the value with the lowest mean; behind: for each value, its mean paired difference to that one (0 for itself).

    alike: values within SURE standard errors; next: the next best value, `ahead` standard errors behind. fitted, low, high: the
    minimum of a parabola through the best value and its neighbors, and its 95 % interval under resampling of blocks. They are
    None if the values are not numbers, if the best is at the end, or if the parabola opens downward in many resamplings.
    """

    index: int
    behind: list[Mean]
    alike: list[int]
    next: int | None
    ahead: float | None
    fitted: float | None = None
    low: float | None = None
    high: float | None = None


def best_value(numbers: Sequence[float | None], measured: Sequence[Sequence[Float64]], seed: int = 0) -> Best:
    """The best of several values whose scores (lower is better) are given window by window, over the same tokens."""
    means = [float(np.concatenate(list(parts)).mean()) for parts in measured]
    index = int(np.argmin(means))
    behind = [paired(parts, measured[index]) for parts in measured]
    others = [i for i in range(len(means)) if i != index]
    alike = [i for i in others if not behind[i].mean > SURE * behind[i].stderr]
    following = min(others, key=lambda i: means[i], default=None)
    ahead = None
    if following is not None and behind[following].stderr > 0:
        ahead = behind[following].mean / behind[following].stderr
    best = Best(index, behind, alike, following, ahead)
    if not 0 < index < len(means) - 1 or any(n is None for n in numbers):
        return best
    three = [index - 1, index, index + 1]
    x = np.array([numbers[i] for i in three], dtype=np.float64)
    blocks = np.stack([blocks_of(measured[i]) for i in three])
    lowest = _lowest(x, np.array([means[i] for i in three])[:, None])[0]
    drawn = np.random.default_rng(seed).integers(0, blocks.shape[1], (RESAMPLINGS, blocks.shape[1]))
    points = _lowest(x, blocks[:, drawn].mean(axis=2))
    good = points[np.isfinite(points)]
    if blocks.shape[1] < 8 or len(good) < 0.9 * RESAMPLINGS or not np.isfinite(lowest):
        return best
    low, high = np.quantile(good, [0.025, 0.975])
    return Best(index, behind, alike, following, ahead, float(lowest), float(low), float(high))


def _lowest(x: Float64, y: Float64) -> Float64:
    """Minima of the parabolas through (x[0], y[0, i]), (x[1], y[1, i]), (x[2], y[2, i]); NaN for one that opens downward."""
    first = (y[1] - y[0]) / (x[1] - x[0])
    second = ((y[2] - y[1]) / (x[2] - x[1]) - first) / (x[2] - x[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(second > 0, (x[0] + x[1]) / 2 - first / (2 * second), np.nan))
