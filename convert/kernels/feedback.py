"""K-quants with error feedback (GPTQ, LDLQ): what a column's rounding does to a matrix's results is made up for by the columns after it.

With the second moment of a matrix's inputs H = U D Uᵀ, U unit upper triangular, the error of the results of a row is Σ_j D_j (e U)_j²,
e the errors of its weights. Column j is rounded to the level nearest to w_j - Σ_{i<j} e_i U_ij, which makes the j-th term as small as
it can be. The scales of each block come from our own search on these targets, with D as importance.

Sources: Frantar et al. 2022 (arXiv 2210.17323); Chee et al. 2023 (arXiv 2307.13304), which shows that both are the same.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml_types import GGMLType

from . import machine_code
from .choose import Kernels
from .layout import LAYOUTS, WEIGHTS
from .packing import level_limits, put_levels, scales_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
DAMPING = 0.1  # of the mean of the diagonal; 0.01 and 0.4 are worse on held-out texts
_SOURCES = ("feedback_code.py", "machine_code.py", "layout.py")
_ARGUMENTS = (ctypes.c_void_p,) * 4  # where Numba's functions put results and errors; addresses, integers


@dataclass(frozen=True)
class Factors:
    """H = U D Uᵀ of one matrix's inputs. carried: U, (width, width), unit upper triangular. importance: D, (width,)."""

    carried: Floats
    importance: Floats

    @classmethod
    def of(cls, moments: Floats, damping: float = DAMPING) -> Factors:
        """The factors of second moments (width, width), with `damping` times their mean diagonal added to the diagonal.

        Raises YarnEdgeError if they are not those of any inputs.
        """
        diagonal = float(np.diagonal(moments).mean(dtype=np.float64))
        if not (np.isfinite(diagonal) and diagonal > 0):
            raise YarnEdgeError(f"second moments with a mean diagonal of {diagonal:g}")
        turned = moments[::-1, ::-1].copy()
        turned[np.diag_indices(len(turned))] += np.float32(damping * diagonal)
        try:
            upper = np.linalg.cholesky(turned)[::-1, ::-1]
        except np.linalg.LinAlgError as error:
            raise YarnEdgeError("second moments that are not positive") from error
        del turned
        size = np.diagonal(upper).copy()
        carried = np.ascontiguousarray(upper)
        del upper
        carried /= size
        return cls(carried, np.square(size))


def quantize_with_feedback(kernels: Kernels, kind: GGMLType, rows: Floats, factors: Factors, out: Bytes) -> None:
    """Quantize rows (n, width) to a K-quant into `out`, (n, bytes of a row), block of columns by block of columns.

    Bits depend on the rows, the factors and the processor's kind alone, not on threads or on how rows are grouped.
    """
    n, width = rows.shape
    layout, (offset, top) = LAYOUTS[kind.name], level_limits(kind.name)
    n_scales = WEIGHTS // layout.sub_block
    errors, targets = np.zeros((n, width), np.float32), np.empty((n, WEIGHTS), np.float32)
    levels, blocks = np.zeros((n, WEIGHTS), np.uint8), np.empty((n, layout.block_bytes), np.uint8)
    made = out.reshape(n, width // WEIGHTS, layout.block_bytes)
    step = _step()
    for first in range(0, width, WEIGHTS):
        given = (rows, errors, factors.carried, targets)
        step(given, (n, width, first, 0, 0, 0))
        kernels.quantize_into(kind, targets, blocks, np.ascontiguousarray(factors.importance[first : first + WEIGHTS]))
        step((*given, *scales_of(kind.name, blocks), levels), (n, width, first, n_scales, offset, top))
        put_levels(kind.name, levels, blocks)
        made[:, first // WEIGHTS] = blocks


class Step(Protocol):
    """The compiled part, for one block of columns. arrays: rows, errors, carried, targets; then scales, minima, levels.

    numbers: rows, width, first column, scales of a block (0: fill in the targets; else the levels and the errors), offset and
    largest level.
    """

    def __call__(self, arrays: tuple[npt.NDArray[Any], ...], numbers: tuple[int, ...]) -> None: ...


@cache
def _step() -> Step:
    def compile_it() -> bytes:
        from .feedback_code import compile_feedback

        return compile_feedback()

    code, _ = machine_code.kept_or_compiled((Path(__file__).with_name(name) for name in _SOURCES), compile_it)
    function = machine_code.loaded(code, _ARGUMENTS)

    def step(arrays: tuple[npt.NDArray[Any], ...], numbers: tuple[int, ...]) -> None:
        assert all(array.flags.c_contiguous for array in arrays)
        places, integers = np.array([array.ctypes.data for array in arrays], np.uintp), np.array(numbers, np.int64)
        result = np.empty(2, np.int64)
        status = function(result.ctypes.data, result.ctypes.data + 8, places.ctypes.data, integers.ctypes.data)
        if status:
            raise RuntimeError(f"the compiled feedback ended with {status}")

    return step
