"""In which order a GGUF has the rows or columns of a checkpoint's matrices: functions of the model's sizes.

An order gets the sizes and the number of rows on disk, and returns the index on disk of each row of the target: (n,), or
(matrices, n) if one matrix on disk becomes several.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .sizes import ModelSizes

Indices = npt.NDArray[np.intp]
Order = Callable[[ModelSizes, int], Indices]


def interleaved(sizes: ModelSizes, n: int) -> Indices:
    """Half-split pairs -> interleaved pairs: rows d and d + D/2 of each head become rows 2d and 2d + 1."""
    return np.arange(n).reshape(-1, 2, sizes.head_dim // 2).swapaxes(1, 2).reshape(-1)


def equal_part(k: int, of: int) -> Order:
    """The k-th of equal parts, one after another: gate and up in one matrix."""
    return lambda _sizes, n: np.arange(n // of * k, n // of * (k + 1))


def every(step: int, first: int) -> Order:
    """Every `step`-th row from `first` on: gate and up that take turns."""
    return lambda _sizes, n: np.arange(first, n, step)


def segment(groups: str, parts: tuple[str, ...], k: int, matrices: bool = False) -> Order:
    """The k-th of the parts of each group, as of heads that hold several things: sizes by name. matrices: one for each group."""

    def order(sizes: ModelSizes, n: int) -> Indices:
        ends = np.cumsum([0, *(sizes.dimension(part) for part in parts)])
        found = np.arange(n).reshape(sizes.dimension(groups), ends[-1])[:, ends[k] : ends[k + 1]]
        return found if matrices else found.reshape(-1)

    return order


def joined(*orders: Order) -> Order:
    """One order after another."""
    return lambda sizes, n: np.concatenate([order(sizes, n) for order in orders])


def by_turns(groups: str, members: str) -> Order:
    """Heads in groups -> the first of each group, then the second of each: sizes by name, how many groups of how many heads."""

    def order(sizes: ModelSizes, n: int) -> Indices:
        heads = np.arange(n).reshape(sizes.dimension(groups), sizes.dimension(members), -1)
        return heads.swapaxes(0, 1).reshape(-1)

    return order


def after(size: str, order: Order) -> Order:
    """As many as `size` says stay, and the others have an order."""

    def whole(sizes: ModelSizes, n: int) -> Indices:
        first = sizes.dimension(size)
        return np.concatenate([np.arange(first), first + order(sizes, n - first)])

    return whole
