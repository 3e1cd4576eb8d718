"""The pipeline: every tensor is read once, slice by slice, and goes into every output in the type that its recipe says.

A slice is some rows: a quarter of a million weights. Threads take slices in turn. Each thread reads its slice, converts it to
float32, quantizes it with the chosen kernel and writes it to its place in each output. So reading, computing and writing
overlap, and memory does not grow with the model. Outputs that want the same type share the work.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml_types import GGMLType, dequantize_into, is_valid, largest_magnitude, requires_weights

from .kernels.choose import Kernels
from .kernels.feedback import Factors, quantize_with_feedback
from .kernels.layout import LAYOUTS
from .output_file import Output, OutputFile

SLICE_WEIGHTS = 1 << 18
_HALF_LARGEST = 65504.0  # above it, a scale or a weight in half precision may overflow
_SAFE = {"NVFP4": 2000.0}  # its scales have a smaller range than half precision: 2688 is its largest value
_SPREAD = {"NVFP4": 2.0}
_IQ_LARGEST = 1e9  # ggml's search sums squares in float32, and ends the process if they overflow
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Rounding:
    """How values become blocks. importance: by tensor name, (matrices * width,). kernels: ggml's by default. factors: of the inputs
    of a matrix, by the name and the width of its weight and its number there, for error feedback; None without.
    """

    importance: Mapping[str, npt.NDArray[np.float32]]
    kernels: Kernels = Kernels()
    factors: Callable[[str, int, int], Factors | None] = lambda _name, _width, _matrix: None


@dataclass(frozen=True)
class SourceTensor:
    """One tensor to read. ne: its shape in ggml's order, row width first. kind: its type in the source.

    read(first_row, out): fill `out`, (n_rows, bytes per row), with the rows from `first_row` on, counted over all matrices.
    label: its name in messages. grain: how many rows must be read together (those of a head). place(first_row, n_rows): where in the
    stream of the source what is read for these rows of a matrix begins, and ends; (0, 0) if any order is as good. source: the
    checkpoint's tensor whose rows these are, "" if they are no rows of one; source_rows: which, in this order, None for all.
    """

    name: str
    ne: tuple[int, ...]
    kind: GGMLType
    read: Callable[[int, Bytes], None]
    label: str
    grain: int = 1
    place: Callable[[int, int], tuple[int, int]] = lambda _first_row, _n_rows: (0, 0)
    source: str = ""
    source_rows: npt.NDArray[np.intp] | None = None

    @property
    def width(self) -> int:
        """Weights of a row."""
        return self.ne[0]

    @property
    def rows_per_matrix(self) -> int:
        """Rows of one matrix. An expert tensor has several matrices."""
        return self.ne[1] if len(self.ne) > 1 else 1

    @property
    def n_rows(self) -> int:
        """Rows of all matrices."""
        return int(np.prod(self.ne[1:], dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in the source."""
        return self.n_rows * self.kind.row_bytes(self.width)


@dataclass(frozen=True)
class _Slice:
    tensor: SourceTensor
    first_row: int
    n_rows: int

    @property
    def place(self) -> tuple[int, int]:
        """Where it begins and ends in the stream."""
        return self.tensor.place(self.first_row, self.n_rows)


class SliceRecord:
    """How far a run is, for a source that is a stream; this one keeps nothing.

    first: the first slice to make. n_bytes: the size in the source of those before it. Slices are numbered from 0, in
    the order of their places. Any thread may call.
    """

    first = 0
    n_bytes = 0

    def took(self, number: int, place: tuple[int, int]) -> None:
        """A thread begins with a slice."""

    def finished(self, number: int, n_bytes: int) -> None:
        """A slice is in every output. n_bytes: its size in the source."""

    def stop(self) -> None:
        """The run ends: nobody shall wait for bytes any more."""

    def complete(self) -> None:
        """The outputs are whole."""


def fill(
    tensors: Sequence[SourceTensor],
    outputs: Sequence[Output],
    rounding: Rounding,
    threads: int,
    advance: Callable[[float, str], None] = lambda _bytes, _name: None,
    meanwhile: Callable[[], None] = lambda: None,
    record: SliceRecord = SliceRecord(),
) -> None:
    """Make all outputs from one reading.

    `advance` gets the bytes read and the name of the tensor. `meanwhile` runs in the caller's thread once all headers are written;
    if it raises, the rest is not made. record: the slices before its first are in the outputs already. Raises
    YarnEdgeError for values that are not finite or that a type cannot hold, and for a source that ends early; OSError for a full
    disk. The caller removes the outputs on errors.
    """
    files = [OutputFile(output, keep=record.first > 0) for output in outputs]
    try:
        for file in files:
            file.begin()
        slices = itertools.islice(enumerate(_slices(tensors)), record.first, None)
        _in_threads(slices, lambda: _Worker(files, rounding), threads, advance, meanwhile, record)
    finally:
        for file in files:
            file.close()


def _slices(tensors: Sequence[SourceTensor]) -> Iterator[_Slice]:
    """Slices within one matrix that begin at multiples of the grain; the matrices in the order of their places."""
    matrices = [(t, first) for t in tensors for first in range(0, t.n_rows, t.rows_per_matrix)]
    matrices.sort(key=lambda matrix: matrix[0].place(matrix[1], 1)[0])
    for tensor, first in matrices:
        whole = tensor.rows_per_matrix
        step = max(tensor.grain, SLICE_WEIGHTS // max(1, tensor.width) // tensor.grain * tensor.grain)
        for row in range(0, whole, step):
            yield _Slice(tensor, first + row, min(step, whole - row))


def _in_threads(
    slices: Iterator[tuple[int, _Slice]],
    worker: Callable[[], _Worker],
    threads: int,
    advance: Callable[[float, str], None],
    meanwhile: Callable[[], None],
    record: SliceRecord,
) -> None:
    """Let `threads` threads take slices until none is left or one fails. Ctrl-C stops after the running slices."""
    lock, stop, errors = threading.Lock(), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            own = worker()
            while not stop.is_set():
                with lock:
                    number, slice_ = next(slices, (0, None))
                    if slice_ is None:
                        return
                    record.took(number, slice_.place)
                done = own.make(slice_)
                record.finished(number, done)
                with lock:
                    advance(done, slice_.tensor.name)
        except BaseException as error:
            errors.append(error)
            stop.set()
            record.stop()

    crew = [threading.Thread(target=work, name=f"slices-{i}", daemon=True) for i in range(threads)]
    try:
        for thread in crew:
            try:
                thread.start()
            except RuntimeError as error:  # the system allows no more threads: work with those that started
                if thread is crew[0]:
                    raise YarnEdgeError("the system cannot start a thread") from error
                break
        meanwhile()
        for thread in crew:
            if thread.ident is not None:
                thread.join()
    except BaseException:
        record.stop()
        raise
    finally:
        stop.set()
        for thread in crew:
            if thread.is_alive():
                thread.join()
    if errors:
        raise errors[0]


class _Worker:
    """One thread's buffers, and what it does with a slice."""

    def __init__(self, files: Sequence[OutputFile], rounding: Rounding) -> None:
        self._files, self._rounding = files, rounding
        self._raw, self._floats, self._made = _Room(np.uint8), _Room(np.float32), _Room(np.uint8)

    def make(self, slice_: _Slice) -> int:
        """Read, quantize, write. Returns the bytes read."""
        tensor, n_rows = slice_.tensor, slice_.n_rows
        raw = self._raw.take(n_rows, tensor.kind.row_bytes(tensor.width))
        tensor.read(slice_.first_row, raw)
        wanted: dict[GGMLType, list[OutputFile]] = {}
        for file in self._files:
            wanted.setdefault(file.output.types[tensor.name], []).append(file)
        values: npt.NDArray[np.float32] | None = None
        largest = 0.0
        if tensor.kind.is_float or set(wanted) != {tensor.kind}:
            values = self._floats.take(n_rows, tensor.width)
            dequantize_into(tensor.kind, raw.reshape(-1), values.reshape(-1))
            largest = largest_magnitude(tensor.kind, raw, values)
            if not math.isfinite(largest):
                raise YarnEdgeError(f"{tensor.label} has values that are not finite numbers")
        for kind, files in wanted.items():
            data = raw if kind == tensor.kind or values is None else self._quantized(slice_, kind, values, largest)
            if values is None and not is_valid(kind, data):
                raise YarnEdgeError(
                    f"{tensor.label} has {kind.name} blocks whose scale is not finite: the file is damaged"
                )
            for file in files:
                file.write(file.output.offsets[tensor.name] + slice_.first_row * kind.row_bytes(tensor.width), data)
        return int(raw.nbytes)

    def _quantized(self, slice_: _Slice, kind: GGMLType, values: npt.NDArray[np.float32], largest: float) -> Bytes:
        tensor = slice_.tensor
        weights = self._rounding.importance.get(tensor.name)
        matrix = slice_.first_row // tensor.rows_per_matrix
        if weights is not None:
            weights = weights[matrix * tensor.width : (matrix + 1) * tensor.width]
        elif requires_weights(kind):
            raise YarnEdgeError(f"{tensor.label}: {kind.name} cannot be made without an importance matrix")
        if kind.name.startswith("IQ") and largest > _IQ_LARGEST:
            raise _cannot_hold(tensor, kind, largest)
        out: Bytes = self._made.take(slice_.n_rows, kind.row_bytes(tensor.width))
        kernels = self._rounding.kernels
        factors = self._rounding.factors(tensor.name, tensor.width, matrix) if kind.name in LAYOUTS else None
        if factors is not None:
            quantize_with_feedback(kernels, kind, values, factors, out)
        else:
            kernels.quantize_into(kind, values, out, weights)
        if (largest > _SAFE.get(kind.name, _HALF_LARGEST) and not _holds(kind, out, largest)) or not is_valid(
            kind, out
        ):
            raise _cannot_hold(tensor, kind, largest)
        return out


class _Room:
    """A buffer that is reused, and grows to the largest size requested."""

    def __init__(self, dtype: Any) -> None:
        self._held = np.empty(0, dtype)

    def take(self, n_rows: int, width: int) -> Any:
        if self._held.size < n_rows * width:
            self._held = np.empty(n_rows * width, self._held.dtype)
        rows: Any = self._held[: n_rows * width].reshape(n_rows, width)
        return rows


def _cannot_hold(tensor: SourceTensor, kind: GGMLType, largest: float) -> YarnEdgeError:
    remedy = "use BF16" if kind.name == "F16" else "choose another type for it"
    return YarnEdgeError(f"{tensor.label} has values up to {largest:g}, which {kind.name} cannot hold: {remedy}")


def _holds(kind: GGMLType, out: Bytes, largest: float) -> bool:
    """Whether large values come back finite, and large (one-bit types spread a single large value)."""
    again = np.empty(out.nbytes // kind.block_bytes * kind.block, np.float32)
    dequantize_into(kind, out.reshape(-1), again)
    restored = float(np.abs(again).max())
    return math.isfinite(restored) and restored * _SPREAD.get(kind.name, 1000.0) >= largest
