"""Rows of a weight in float32, changed while they are read: a low-rank product added, DoRA's magnitudes, rows replaced.

A view is a function of (start, stop) that returns those rows, (stop - start, width), as new memory. The arithmetic is PEFT's
merge in float32 (peft/tuners/lora/layer.py, variants.py). Memory holds the rows that were asked for, and an adapter's two
matrices for a few modules.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError

from ..stored import RowsOf, Tensor, made_tensor, to_float32

Floats = npt.NDArray[np.float32]
Factors = Callable[[], tuple[Floats, Floats]]
_STEP_VALUES = 1 << 20  # of a pass over all rows
# Multiplications of one call. For more, OpenBLAS starts threads of its own, which wait for those of the pipeline: 3.5 times the work.
_ALONE, _ALONE_ROWS = 1 << 18, 16


def stored_rows(tensor: Tensor) -> RowsOf:
    """The rows as they are, exact in float32. A vector's rows have one value."""
    width = math.prod(tensor.shape[1:])

    def rows(start: int, stop: int) -> Floats:
        return to_float32(tensor.bits(start, stop), tensor.dtype).reshape(stop - start, width)

    return rows


def plus_product(rows: RowsOf, factors: Factors, scale: float) -> RowsOf:
    """rows + scale * left @ right. factors: left (all rows, rank) and right (rank, width)."""

    def changed(start: int, stop: int) -> Floats:
        left, right = factors()
        with np.errstate(over="ignore", invalid="ignore"):  # `finite` refuses the result
            added = _multiplied(left[start:stop], right)
            added *= np.float32(scale)
            added += rows(start, stop)
        return added

    return changed


def _multiplied(left: Floats, right: Floats) -> Floats:
    """left @ right, block by block."""
    (n_rows, rank), width = left.shape, right.shape[1]
    columns = min(width, max(1, _ALONE // (rank * _ALONE_ROWS)))
    step = max(1, _ALONE // (rank * columns))
    out = np.empty((n_rows, width), np.float32)
    for row in range(0, n_rows, step):
        for column in range(0, width, columns):
            part = slice(row, row + step), slice(column, column + columns)
            np.matmul(left[part[0]], right[:, part[1]], out=out[part])
    return out


def plus_vector(rows: RowsOf, added: RowsOf, scale: float) -> RowsOf:
    """rows + scale * added, of vectors."""

    def changed(start: int, stop: int) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            out: Floats = rows(start, stop) + np.float32(scale) * added(start, stop)
        return out

    return changed


def with_row_norms(rows: RowsOf, magnitude: RowsOf) -> RowsOf:
    """DoRA of a matrix: every row gets the given length. magnitude: (rows, 1)."""

    def changed(start: int, stop: int) -> Floats:
        merged = rows(start, stop)
        lengths: Floats = np.sqrt(np.einsum("rc,rc->r", merged, merged, dtype=np.float64)).astype(np.float32)
        with np.errstate(all="ignore"):  # `finite` refuses the result
            merged *= magnitude(start, stop) / lengths[:, None]
        return merged

    return changed


def with_column_norms(rows: RowsOf, magnitude: RowsOf, n_rows: int, width: int) -> RowsOf:
    """DoRA of an embedding: every column gets the given length, which takes a pass over all rows, once. magnitude: (width, 1)."""
    lock = threading.Lock()
    known: list[Floats] = []

    def factor() -> Floats:
        with lock:
            if not known:
                squares = np.zeros(width, np.float64)
                step = max(1, _STEP_VALUES // width)
                for start in range(0, n_rows, step):
                    part = rows(start, min(start + step, n_rows))
                    squares += np.einsum("rc,rc->c", part, part, dtype=np.float64)
                lengths: Floats = np.sqrt(squares).astype(np.float32)
                with np.errstate(all="ignore"):
                    known.append(magnitude(0, width)[:, 0] / lengths)
            return known[0]

    return lambda start, stop: rows(start, stop) * factor()


def with_rows(rows: RowsOf, ids: tuple[int, ...], values: RowsOf) -> RowsOf:
    """Some rows replaced. values: a row for each of `ids`."""
    at = np.asarray(ids)

    def changed(start: int, stop: int) -> Floats:
        merged = rows(start, stop)
        for number in np.flatnonzero((at >= start) & (at < stop)):
            merged[at[number] - start] = values(int(number), int(number) + 1)[0]
        return merged

    return changed


def finite(rows: RowsOf, what: str) -> RowsOf:
    """The rows, or YarnEdgeError with `what` they are if one of them has a value that is not finite."""

    def checked(start: int, stop: int) -> Floats:
        values = rows(start, stop)
        if not np.isfinite(values).all():
            raise YarnEdgeError(f"{what} has values that are not finite numbers")
        return values

    return checked


def finite_tensor(tensor: Tensor, what: str) -> Tensor:
    """The tensor in its own type; reading raises YarnEdgeError as `finite` does."""

    def read(offset: int, buffer: Any) -> None:
        tensor.read(offset, buffer)
        if not np.isfinite(to_float32(np.frombuffer(buffer, tensor.kind), tensor.dtype)).all():
            raise YarnEdgeError(f"{what} has values that are not finite numbers")

    return replace(tensor, read=read)


def view_of(name: str, shape: tuple[int, ...], rows: RowsOf) -> Tensor:
    """A tensor of float32 whose rows, those of its first dimension, are made when they are read."""
    return made_tensor(name, shape, math.prod(shape[1:]), rows)
