"""Means and their standard errors: over all tokens, up to a length, and by position.

The standard error is that of the mean over tokens, as in llama-perplexity. Neighboring tokens are not independent; to compare two
runs over the same tokens, use the paired difference in blocks (`paired`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.likelihood import Float64

MAX_BUCKETS = 4096
BLOCK = 256  # neighboring tokens that count as one observation


@dataclass(frozen=True)
class Mean:
    """A mean over n values and its standard error (NaN for fewer than 2 values)."""

    n: int
    mean: float
    stderr: float

    @property
    def perplexity(self) -> float:
        """exp of a mean negative log-likelihood."""
        return perplexity_of(self.mean)

    @property
    def perplexity_stderr(self) -> float:
        """The standard error of the perplexity."""
        return self.perplexity * self.stderr


@dataclass(frozen=True)
class Bucket:
    """The tokens at positions [start, end): their number, their perplexity and its standard error."""

    start: int
    end: int
    n_tokens: int
    perplexity: float
    stderr: float = math.nan

    def as_json(self) -> dict[str, float]:
        """The bucket as a JSON object."""
        return {
            "start": self.start,
            "end": self.end,
            "ppl": self.perplexity,
            "stderr": self.stderr,
            "n_tokens": self.n_tokens,
        }


def perplexity_of(mean: float) -> float:
    """exp of a mean negative log-likelihood; infinity beyond the range of a float."""
    return math.exp(mean) if mean < 700 else math.inf


def mean_of(values: Float64) -> Mean:
    """Mean and standard error of independent values; NaN if there are none."""
    n = len(values)
    if not n:
        return Mean(0, math.nan, math.nan)
    return Mean(n, float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan)


def edges_of(n_ctx: int, width: int | None = None) -> list[int]:
    """Bucket edges from 0 to n_ctx, `width` tokens apart (default: the smallest power of two >= 256 that gives at most 32 buckets)."""
    if width is None:
        width = 256
        while n_ctx > 32 * width:
            width *= 2
    if n_ctx // width > MAX_BUCKETS:
        raise YarnEdgeError(
            f"--bucket {width} makes {n_ctx // width} buckets of {n_ctx} tokens; the maximum is {MAX_BUCKETS}"
        )
    return [*range(0, n_ctx, width), n_ctx]


def perplexity_by_position(
    nll: Float64, edges: Sequence[int], positions: npt.NDArray[np.int64] | None = None
) -> list[Bucket]:
    """Perplexity between consecutive `edges`, without empty buckets. positions: of the predicted tokens, by default 1, 2, 3, …"""
    at = np.arange(1, len(nll) + 1) if positions is None else positions
    buckets = []
    for start, end in pairwise(edges):
        part = nll[(at >= start) & (at < end)]
        if len(part):
            mean = mean_of(part)
            buckets.append(Bucket(start, end, mean.n, mean.perplexity, mean.perplexity_stderr))
    return buckets


def lengths_up_to(n_ctx: int, first: int = 512) -> list[int]:
    """first, 2 * first, 4 * first, …, and n_ctx itself."""
    lengths = []
    while first < n_ctx:
        lengths.append(first)
        first *= 2
    return [*lengths, n_ctx]


def blocks_of(groups: Iterable[Float64], size: int = BLOCK) -> Float64:
    """Means of blocks of `size` neighbors within each group; a shorter last block counts if it has at least half the size."""
    means = []
    for values in groups:
        for at in range(0, len(values), size):
            part = values[at : at + size]
            if len(part) * 2 >= size or len(values) < size:
                means.append(float(part.mean()))
    return np.array(means)


def paired(a: Sequence[Float64], b: Sequence[Float64], size: int = BLOCK) -> Mean:
    """The mean of a - b over the same tokens, with its standard error from blocks of neighbors."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    whole = np.concatenate(differences)
    blocks = mean_of(blocks_of(differences, size))
    return Mean(len(whole), float(whole.mean()), blocks.stderr)
