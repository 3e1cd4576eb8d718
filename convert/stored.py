"""One tensor as a file of weights holds it: its type, its shape, and its values on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# safetensors dtype -> (NumPy dtype that holds its bits, is it bfloat16?)
DTYPES: dict[str, tuple[str, bool]] = {"F32": ("<f4", False), "F16": ("<f2", False), "BF16": ("<u2", True)}
# The others, which only buffers and quantized weights have.
_OTHERS = {
    "u1": "U8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    "?": "BOOL",
    "i1": "I8",
    "<i2": "I16",
    "<u2": "U16",
    "<i4": "I32",
    "<u4": "U32",
    "<i8": "I64",
    "<u8": "U64",
    "<f8": "F64",
    "<c8": "C64",
}
_BITS = {name: kind for kind, names in _OTHERS.items() for name in names.split()}
_BITS |= {name: kind for name, (kind, _bfloat16) in DTYPES.items()}


RowsOf = Callable[[int, int], npt.NDArray[np.float32]]  # rows [start, stop), as new memory


@dataclass(frozen=True)
class Tensor:
    """One tensor. name: in the file. dtype: F32, F16, BF16 or MXFP4 (ggml's blocks); others are what quantized weights are made of.

    read(offset, buffer): fill a buffer from byte `offset` of the tensor. place: where it begins in its stream; 0 without one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, Any], None]
    place: int = 0

    @property
    def kind(self) -> np.dtype[Any]:
        """NumPy's type for the bits of one value."""
        return np.dtype(_BITS[self.dtype])

    @property
    def row_bytes(self) -> int:
        """Size of one row of the first dimension."""
        return math.prod(self.shape[1:]) * self.kind.itemsize

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.shape[0] * self.row_bytes if self.shape else self.row_bytes

    def bits(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows [start, stop) of the first dimension, unconverted; BF16 as uint16, 8-bit floats as uint8."""
        n = len(range(*slice(start, stop).indices(self.shape[0])))
        rows = np.empty((n, *self.shape[1:]), self.kind)
        self.read(start * self.row_bytes, rows.reshape(-1).view(np.uint8))
        return rows

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of the last dimension, counted over all matrices, unconverted: (rows, width)."""
        width = self.shape[-1]
        rows = np.empty((stop - start, width), self.kind)
        self.read(start * width * self.kind.itemsize, rows.reshape(-1).view(np.uint8))
        return rows

    def whole(self) -> npt.NDArray[Any]:
        """All values, unconverted, flat; also of a scalar."""
        values = np.empty(self.n_bytes, np.uint8)
        self.read(0, values)
        return values.view(self.kind)

    def float32(self) -> npt.NDArray[np.float32]:
        """The whole tensor as float32 (exact for every float)."""
        return to_float32(self.bits(), self.dtype)


def to_float32(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Bits of dtype F32, F16 or BF16 as float32, exactly."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def item_bytes(dtype: str) -> int | None:
    """Bytes of one value; None for a dtype that is not known."""
    return np.dtype(_BITS[dtype]).itemsize if dtype in _BITS else None


def made_tensor(name: str, shape: Sequence[int], width: int, rows: RowsOf) -> Tensor:
    """A tensor of float32 whose rows of `width` values are made by rows(start, stop) when they are read."""
    row_bytes = 4 * width

    def read(offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        first, inside = divmod(offset, row_bytes)
        made = rows(first, -(-(offset + len(buffer)) // row_bytes))
        buffer[:] = made.reshape(-1).view(np.uint8)[inside : inside + len(buffer)]

    return Tensor(name, "F32", tuple(shape), read)
