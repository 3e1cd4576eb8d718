"""The tensor of a row, read from the checkpoint slice by slice: its rows in the order that the row says."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.runtime.ggml_types import type_named

from .checkpoint import Checkpoint
from .families.orders import Indices, Order
from .families.rows import TensorRow
from .families.sizes import ModelSizes
from .one_pass import SourceTensor
from .stored import DTYPES, Tensor, to_float32

_BAND_BYTES = 1 << 16  # transposed from the cache: at 4.2 GB/s, with a whole expert at 1.2 (2048 x 1536 in BF16)
_SPAN = 2  # rows are read with those between them up to this many times as many, else run by run
_MOST_GRAIN = 1024
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Axis:
    """The rows or the columns of a matrix on disk. order: the index of those in the target, (matrices, n); None is all as they are."""

    n_disk: int
    order: Indices | None

    @classmethod
    def of(cls, n_disk: int, order: Order | None, sizes: ModelSizes) -> _Axis:
        return cls(n_disk, None if order is None else np.atleast_2d(order(sizes, n_disk)))

    @property
    def n(self) -> int:
        return self.n_disk if self.order is None else self.order.shape[1]

    @property
    def matrices(self) -> int:
        return 1 if self.order is None else len(self.order)

    def pick(self, matrix: int, first: int, end: int) -> slice | Indices:
        """Where on disk the target's [first, end) are."""
        if self.order is None:
            return slice(first, end, 1)
        index = self.order[matrix, first:end]
        step = int(index[1] - index[0]) if len(index) > 1 else 1
        even = step > 0 and bool((np.diff(index) == step).all())
        return slice(int(index[0]), int(index[-1]) + 1, step) if even else index

    def span(self, matrix: int, first: int, end: int) -> tuple[int, int]:
        """Where on disk the target's rows from `first` on begin, and those before `end` end."""
        if self.order is None:
            return first, end
        return int(self.order[matrix, first:].min()), int(self.order[matrix, :end].max()) + 1

    @property
    def grain(self) -> int:
        """The smallest number such that slices of its multiples are one range on disk too (a head); 1 if it is too large."""
        if self.order is None:
            return 1
        index = self.order[0]
        before, after = np.maximum.accumulate(index), np.minimum.accumulate(index[::-1])[::-1]
        cut = np.concatenate([[True], before[:-1] < after[1:], [True]])
        most = min(self.n, _MOST_GRAIN)
        return next((grain for grain in range(1, most + 1) if self.n % grain == 0 and cut[::grain].all()), 1)


def source_tensor(checkpoint: Checkpoint, row: TensorRow, sizes: ModelSizes) -> SourceTensor:
    """The tensor of a row, as the pipeline reads it: its sources one after another, of each the rows that the row names."""
    sizes = sizes.in_layer(row.layer)
    sources = [checkpoint.tensors[name] for name in row.sources(sizes)]
    on_disk = [sizes.dimension(name) for name in row.shape if name != "1"]
    vector = len(on_disk) < 2
    *stack, height, width = [1] * (2 - len(on_disk)) + on_disk
    dtype = sources[0].dtype
    kind = type_named(dtype)
    rows = _Axis.of(height, None if vector else row.rows, sizes)
    columns = _Axis.of(width // kind.block, row.rows if vector else row.columns, sizes)
    n_rows, n_columns = (columns.n, rows.n) if row.transposed else (rows.n, columns.n)
    several = [n for n in (rows.matrices,) if n > 1]
    shape = [
        len(sources) if "{e}" in row.source else 1,
        *stack,
        *several,
        *([] if vector else [n_rows]),
        n_columns * kind.block,
    ]
    while len(shape) > 1 and shape[0] == 1:  # llama.cpp's quantizer drops such dimensions too
        del shape[0]
    per_source = math.prod(stack) * rows.matrices
    item = np.dtype(DTYPES[dtype][0] if kind.is_float else f"V{kind.block_bytes}")  # one column is a block
    fill = _fill_transposed if row.transposed else _fill

    def read(first_row: int, out: Bytes) -> None:
        done = 0
        while done < len(out):
            matrix, at = divmod(first_row + done, n_rows)
            n = min(len(out) - done, n_rows - at)
            source, matrix = divmod(matrix, per_source)
            stacked, matrix = divmod(matrix, rows.matrices)
            fill(_Matrix(sources[source], stacked * height, matrix, rows, columns), at, out[done : done + n].view(item))
            done += n

    def place(first_row: int, n: int) -> tuple[int, int]:
        matrix, at = divmod(first_row, n_rows)
        source, matrix = divmod(matrix, per_source)
        stacked, matrix = divmod(matrix, rows.matrices)
        if not sources[source].place:
            return 0, 0
        low, high = rows.span(matrix, 0, rows.n) if row.transposed else rows.span(matrix, at, at + n)
        row_bytes = columns.n_disk * item.itemsize
        first = sources[source].place + stacked * height * row_bytes
        return first + low * row_bytes, first + high * row_bytes

    def read_values(first_row: int, out: Bytes) -> None:
        saved = np.empty((len(out), n_columns * item.itemsize), np.uint8)
        read(first_row, saved)
        assert row.values is not None
        out.view(np.float32)[:] = row.values(to_float32(saved.view(item), dtype))

    label = f"{checkpoint.path}: tensor {row.source.replace('{e}', '*')}"
    grain = n_rows if row.transposed else rows.grain  # a transposed matrix is read once
    made, reader = (kind, read) if row.values is None else (type_named("F32"), read_values)
    of_one = len(sources) == 1 and len(shape) == 2 and not row.transposed
    origin = (row.source, None if rows.order is None else rows.order.reshape(-1)) if of_one else ()
    return SourceTensor(row.target, tuple(reversed(shape)), made, reader, label, grain, place, *origin)


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a target. It is in the one of `tensor` that begins at row `first`, as the number `matrix` of its order of rows."""

    tensor: Tensor
    first: int
    matrix: int
    rows: _Axis
    columns: _Axis

    def read(self, begin: int, end: int, out: npt.NDArray[Any]) -> None:
        """Fill `out` with rows on disk, all columns of them: those that are [begin, end) in the order of rows."""
        row_bytes, raw = out.itemsize * self.columns.n_disk, out.view(np.uint8)
        picked = self.rows.pick(self.matrix, begin, end)
        if isinstance(picked, slice) and picked.step == 1:
            self.tensor.read((self.first + picked.start) * row_bytes, raw.reshape(-1))
            return
        index = np.arange(picked.start, picked.stop, picked.step) if isinstance(picked, slice) else picked
        low, n = int(index.min()), int(index.max()) + 1 - int(index.min())
        if n <= _SPAN * len(index):
            band = np.empty((n, row_bytes), np.uint8)
            self.tensor.read((self.first + low) * row_bytes, band.reshape(-1))
            np.take(band, index - low, axis=0, out=raw, mode="clip")
            return
        starts = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
        for start, stop in itertools.pairwise(starts):
            self.tensor.read((self.first + int(index[start])) * row_bytes, raw[start:stop].reshape(-1))


def _fill(matrix: _Matrix, at: int, out: npt.NDArray[Any]) -> None:
    """Fill `out` with the rows from `at` on."""
    if matrix.columns.order is None:
        matrix.read(at, at + len(out), out)
        return
    whole = np.empty((len(out), matrix.columns.n_disk), out.dtype)
    matrix.read(at, at + len(out), whole)
    out[:] = whole[:, matrix.columns.pick(0, 0, matrix.columns.n)]


def _fill_transposed(matrix: _Matrix, at: int, out: npt.NDArray[Any]) -> None:
    """The same if rows are columns on disk. A band of rows on disk is in memory at a time."""
    n, n_rows = out.shape
    columns = matrix.columns.pick(0, at, at + n)
    step = max(1, _BAND_BYTES // (matrix.columns.n_disk * out.itemsize))
    for row in range(0, n_rows, step):
        band = np.empty((min(step, n_rows - row), matrix.columns.n_disk), out.dtype)
        matrix.read(row, row + len(band), band)
        out[:, row : row + len(band)] = band[:, columns].T
