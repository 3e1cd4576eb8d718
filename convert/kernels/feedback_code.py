"""The compiled part of error feedback: one block of columns at a time. Needs Numba; imported only to build it."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .layout import WEIGHTS
from .machine_code import compiled_object

_SIGNATURE = numba.types.void(numba.types.CPointer(numba.types.voidptr), numba.types.CPointer(numba.int64))
_ZERO = np.float32(0)
_COLUMNS = 32  # whose factors for one block stay in the fastest cache


def _feedback(places: Any, numbers: Any) -> None:
    """Its arguments are those of `feedback.Step`: the targets of a block of columns, or their levels."""
    n, width, first, n_scales, offset, top = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    weights = numba.carray(places[0], (n, width), np.float32)
    errors = numba.carray(places[1], (n, width), np.float32)
    carried = numba.carray(places[2], (width, width), np.float32)
    targets = numba.carray(places[3], (n, WEIGHTS), np.float32)
    if n_scales == 0:
        _aim(weights, errors, carried, targets, first)
        return
    scales = numba.carray(places[4], (n, n_scales), np.float32)
    minima = numba.carray(places[5], (n, n_scales), np.float32)
    levels = numba.carray(places[6], (n, WEIGHTS), np.uint8)
    each, low, high = WEIGHTS // n_scales, np.float32(-offset), np.float32(top - offset)
    for row in range(n):
        target = targets[row]
        for j in range(WEIGHTS):
            scale, minimum, weight = scales[row, j // each], minima[row, j // each], weights[row, first + j]
            if scale == _ZERO:
                error = -minimum - weight
            else:
                level = min(max(np.rint((target[j] + minimum) / scale), low), high)
                levels[row, j] = np.uint8(np.int64(level) + offset)
                error = scale * level - minimum - weight
            errors[row, first + j] = error
            factors = carried[first + j, first : first + WEIGHTS]
            for k in range(j + 1, WEIGHTS):
                target[k] -= error * factors[k]


def _aimed(weights: Any, errors: Any, carried: Any, targets: Any, first: int) -> None:
    """The weights less what the errors of the columns before them carry here, some columns at a time."""
    for row in range(len(targets)):
        for k in range(WEIGHTS):
            targets[row, k] = weights[row, first + k]
    for start in range(0, first, _COLUMNS):
        for row in range(len(targets)):
            target = targets[row]
            for i in range(start, start + _COLUMNS):
                error, factors = errors[row, i], carried[i, first : first + WEIGHTS]
                for k in range(WEIGHTS):
                    target[k] -= error * factors[k]


_aim = numba.njit(error_model="numpy")(_aimed)


def compile_feedback() -> bytes:
    """The object code for this processor (`machine_code`). Raises whatever Numba raises if it cannot compile."""
    return compiled_object(_feedback, _SIGNATURE)
