"""ggml's tensor types: sizes, names, and ggml's own kernels to quantize and dequantize rows. Pointers, no copies.

Every function works on memory that the caller owns, and releases Python's lock while ggml runs, so that threads can share
the rows of a tensor. Source: ggml.h; ggml_quantize_chunk and ggml_type_traits in ggml.c.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml import function

FLOATS = ("F32", "F16", "BF16")
# The types that ggml_quantize_chunk can produce (ggml.c); any other one ends the process.
QUANTIZABLE = (
    *FLOATS, "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
TYPE_COUNT = 43  # ggml.h: GGML_TYPE_COUNT; ggml reads past its table for larger numbers
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class TraitsStruct(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class GGMLType:
    """A tensor type: number (enum ggml_type), name in capitals, weights per block, bytes per block."""

    number: int
    name: str
    block: int
    block_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether it is F32, F16 or BF16."""
        return self.name in FLOATS

    def holds(self, width: int) -> bool:
        """Whether rows of `width` weights are made of whole blocks."""
        return width % self.block == 0

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights. Raises ValueError if these are not whole blocks."""
        if not self.holds(width):
            raise ValueError(f"rows of {width} weights are not whole blocks of {self.name}")
        return width // self.block * self.block_bytes


@cache
def types() -> dict[str, GGMLType]:
    """Every tensor type of this build, by name."""
    found: dict[str, GGMLType] = {}
    for number in range(TYPE_COUNT):
        name = function("ggml_type_name")(number)
        block = function("ggml_blck_size")(number)
        if name is not None and block > 0:
            kind = GGMLType(number, name.decode().upper(), block, function("ggml_type_size")(number))
            found[kind.name] = kind
    return found


def type_named(name: str) -> GGMLType:
    """The type with this name, in upper or lower case. Raises YarnEdgeError if this build has no such type."""
    found = types().get(name.upper())
    if found is None:
        raise YarnEdgeError(f"this build of llama-cpp-python has no tensor type {name[:40]!r}")
    return found


def requires_weights(kind: GGMLType) -> bool:
    """Whether ggml cannot quantize to this type without importance weights (ggml_quantize_requires_imatrix)."""
    return bool(function("ggml_quantize_requires_imatrix")(kind.number))


@cache
def _to_float(kind: GGMLType) -> Any:
    traits = TraitsStruct.from_address(function("ggml_get_type_traits")(kind.number))
    if (traits.blck_size, traits.type_size) != (kind.block, kind.block_bytes):
        raise YarnEdgeError("this llama-cpp-python has another layout of ggml_type_traits: install the pinned version")
    if not traits.to_float:
        raise YarnEdgeError(f"ggml cannot convert {kind.name} to float")
    return _ToFloat(traits.to_float)


def dequantize_into(kind: GGMLType, source: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
    """Dequantize `source`, bytes of type `kind`, into `out`, float32 of the right size. Both are contiguous."""
    if kind.name == "F32":
        out[:] = source.view(np.float32)[: out.size]
    elif kind.name == "F16":
        function("ggml_fp16_to_fp32_row")(source.ctypes.data, out.ctypes.data, out.size)
    elif kind.name == "BF16":
        function("ggml_bf16_to_fp32_row")(source.ctypes.data, out.ctypes.data, out.size)
    else:
        _to_float(kind)(source.ctypes.data, out.ctypes.data, out.size)


def largest_magnitude(kind: GGMLType, source: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> float:
    """The largest magnitude of `values`, which `dequantize_into` made of `source`; not finite if one of them is not.

    Of BF16 the bits are compared, which are half as many: within a sign they are in the order of the magnitudes.
    """
    if kind.name != "BF16":
        return max(float(values.max()), -float(values.min()))
    bits = source.view(np.uint16)
    magnitude = max(int(bits.max()) & 0x7FFF, int(bits.view(np.int16).max()))
    return float(np.uint32(magnitude << 16).view(np.float32))


def check_rows(
    kind: GGMLType, rows: npt.NDArray[np.float32], out: npt.NDArray[np.uint8], weights: npt.NDArray[np.float32] | None
) -> None:
    """Raise ValueError if these arguments do not suit `quantize_into`: wrong sizes, not contiguous, or a type that ggml cannot produce."""
    n, width = rows.shape
    fits = out.nbytes == n * kind.row_bytes(width) and (weights is None or weights.shape == (width,))
    contiguous = all(array.flags.c_contiguous for array in (rows, out, weights) if array is not None)
    if kind.name not in QUANTIZABLE or not fits or not contiguous:
        raise ValueError(f"rows {rows.shape} do not fit into {out.nbytes} bytes of {kind.name}")


def quantize_into(
    kind: GGMLType,
    rows: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32] | None = None,
) -> None:
    """Quantize float32 rows (n, width) to `kind` into `out` (n * row bytes), with ggml's own kernel.

    weights: (width,) importance of each column, or None. All arrays are contiguous. Raises ValueError for wrong sizes and
    in the cases in which ggml would end the process: a type that it cannot produce, at all or without weights.
    """
    check_rows(kind, rows, out, weights)
    n, width = rows.shape
    if weights is None and requires_weights(kind):
        raise ValueError(f"{kind.name} needs importance weights")
    column = None if weights is None else weights.ctypes.data
    done = function("ggml_quantize_chunk")(kind.number, rows.ctypes.data, out.ctypes.data, 0, n, width, column)
    if done != out.nbytes:
        raise YarnEdgeError("ggml cannot quantize these rows")


def is_valid(kind: GGMLType, data: npt.NDArray[np.uint8]) -> bool:
    """Whether no scale in quantized `data` is infinite or NaN (ggml_validate_row_data, which also writes to stderr)."""
    return bool(function("ggml_validate_row_data")(kind.number, data.ctypes.data, data.nbytes))
