"""How the scales of each K-quant are searched, as data, and the form of it that compiled code takes (`kquant`).

Source: quantize_row_q2_K_ref … quantize_row_q6_K_ref (without importance) and quantize_row_q2_K_impl … (with) in ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .layout import GROUP, LAYOUTS, WEIGHTS

Floats = npt.NDArray[np.float32]
# How the error of a weight x is weighted: |x|; the sub-block's root mean square + |x|; x squared; importance times the root of
# the sum of x squared and the block's mean square; importance.
ABSOLUTE, AVERAGE_AND_ABSOLUTE, SQUARE, IMPORTANCE_AND_SPREAD, IMPORTANCE = range(5)
NOTHING = np.float32(1e-15)  # GROUP_MAX_EPS: values and scales below it are treated as zero
_SMALLEST = np.float32(1e-45)
LANES = 16  # blocks that are searched side by side
ROOM = (4 * WEIGHTS + 11 * GROUP // 2 + GROUP) * LANES  # floats that the search needs (`kquant`)


@dataclass(frozen=True)
class Search:
    """How a type's scales are found.

    weigh: how errors are weighted. steps: (first, step, count) of the numbers that are added to the largest level to get the
    inverse scales to try. plain: absolute errors instead of squares. spread: factor of the block's mean square in the error
    weights. fit: the block's factor is fitted to the scales of all sub-blocks, instead of to the largest alone. descend:
    levels are moved one by one.
    """

    weigh: int
    steps: tuple[float, float, int] = (0, 0, 0)
    plain: bool = False
    spread: float = 0
    fit: bool = False
    descend: bool = False


_FINE = (-0.9, 0.05, 37)
# Type -> its search without importance weights, and the one with them.
SEARCHES: dict[str, tuple[Search, Search]] = {
    "Q2_K": (Search(ABSOLUTE, (-0.5, 0.1, 16), plain=True), Search(IMPORTANCE_AND_SPREAD, _FINE, spread=1, fit=True)),
    "Q3_K": (Search(SQUARE, descend=True), Search(IMPORTANCE_AND_SPREAD, spread=2, fit=True)),
    "Q4_K": (Search(AVERAGE_AND_ABSOLUTE, (-1, 0.1, 21)), Search(IMPORTANCE_AND_SPREAD, _FINE, spread=2, fit=True)),
    "Q5_K": (Search(AVERAGE_AND_ABSOLUTE, (-0.5, 0.1, 16)), Search(IMPORTANCE_AND_SPREAD, _FINE, spread=2, fit=True)),
    "Q6_K": (Search(SQUARE), Search(IMPORTANCE)),
}


class KernelPlan(NamedTuple):
    """A layout and a search in the form that compiled code takes.

    n: weights of a sub-block. top, scale_top: the largest level, for signed types the magnitude of the least. scale_up: added
    to a scale's level when it is stored. nothing: a block whose largest scale is below it has no scales. numerators: divided
    by the range of a sub-block's values, they are the inverse scales to try; scale_numerators: the same for scales.
    """

    block_bytes: int
    n: int
    signed: bool
    top: np.float32
    scale_top: np.float32
    scale_up: np.float32
    nothing: np.float32
    weigh: int
    spread: np.float32
    plain: bool
    fit: bool
    descend: bool
    d_at: int
    dmin_at: int
    planes: npt.NDArray[np.int64]
    fields: npt.NDArray[np.int64]
    numerators: Floats
    scale_numerators: Floats


@cache
def kernel_plan_of(name: str, important: bool) -> KernelPlan:
    """The plan for a type, with importance weights or without."""
    layout, search = LAYOUTS[name], SEARCHES[name][important]
    top = layout.levels // 2 if layout.signed else layout.levels - 1
    scale_top = layout.scale_levels // 2 if layout.signed else layout.scale_levels - 1
    shifted = layout.signed and layout.scale_levels < 256
    return KernelPlan(
        layout.block_bytes,
        layout.sub_block,
        layout.signed,
        np.float32(top),
        np.float32(scale_top),
        np.float32(scale_top if shifted else 0),
        _SMALLEST if shifted else NOTHING,
        search.weigh,
        np.float32(search.spread),
        search.plain,
        search.fit,
        search.descend,
        layout.d_at,
        layout.dmin_at,
        np.array(layout.planes, np.int64),
        np.array(layout.fields, np.int64),
        _signed_numerators(top) if layout.signed else _numerators(top, *search.steps),
        _signed_numerators(scale_top) if layout.signed else _positive_numerators(scale_top),
    )


def _numerators(top: int, first: float, step: float, count: int) -> Floats:
    return np.float32(first) + np.float32(step) * np.arange(count, dtype=np.float32) + np.float32(top)


def _positive_numerators(top: int) -> Floats:
    return np.concatenate((np.array([top], np.float32), np.float32(0.1) * _around(4) + np.float32(top)))


def _signed_numerators(top: int) -> Floats:
    return np.concatenate((np.array([-top], np.float32), -(np.float32(top) + np.float32(0.1) * _around(9))))


def _around(n: int) -> Floats:
    """-n to n without zero."""
    return np.array([i for i in range(-n, n + 1) if i], np.float32)
