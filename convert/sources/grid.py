"""Scales and zero points that each stand for a block of a matrix: all of it, a row, some columns of a row, or a rectangle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..stored import Tensor
from .arithmetic import Floats, as_float32


@dataclass(frozen=True)
class Grid:
    """values: one for each block, in matrices of (blocks down, blocks across), its last two dimensions.

    rows: of one matrix of weights. height: weights down in a block.
    """

    values: Tensor
    rows: int
    height: int
    across: int

    def of_rows(self, start: int, stop: int) -> Floats:
        """The values for rows [start, stop) of the weights, counted over all matrices: (rows, blocks across)."""
        matrix, inside = np.divmod(np.arange(start, stop), self.rows)
        at = matrix * -(-self.rows // self.height) + inside // self.height
        first, last = int(at[0]), int(at[-1]) + 1
        row_bytes = self.across * self.values.kind.itemsize
        raw = np.empty((last - first) * row_bytes, np.uint8)
        self.values.read(first * row_bytes, raw)
        found = as_float32(raw.view(self.values.kind), self.values.dtype).reshape(-1, self.across)
        return found if len(found) == stop - start else found[at - first]


def spread(values: Floats, per_block: Floats, width: int, groups: npt.NDArray[np.intp] | None) -> tuple[Floats, Floats]:
    """(`values`, `per_block`) in shapes that broadcast. values: (rows, columns); per_block: (rows, blocks across).

    width: columns of a block. groups: the block of each column, where blocks are not in a row.
    """
    columns, blocks = values.shape[1], per_block.shape[1]
    if blocks == 1:
        return values, per_block
    if groups is not None:
        return values, per_block[:, groups]
    if columns == blocks * width:
        return values.reshape(len(values), blocks, width), per_block[:, :, None]
    return values, np.repeat(per_block, width, axis=1)[:, :columns]


def scale(
    values: Floats, scales: Floats, width: int, zeros: Floats | None = None, groups: npt.NDArray[np.intp] | None = None
) -> Floats:
    """(values - zeros) * scales; `values` may be overwritten. scales, zeros: (rows, blocks across)."""
    values = np.ascontiguousarray(values)
    if zeros is not None:
        shaped, subtracted = spread(values, zeros, width, groups)
        shaped -= subtracted
    shaped, factors = spread(values, scales, width, groups)
    shaped *= factors
    return values
