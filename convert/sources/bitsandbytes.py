"""bitsandbytes: NF4 and FP4 in blocks of a flat weight, whose scales may be quantized themselves, and rows of 8-bit integers.

Definition: bitsandbytes, backends/default/ops.py: _dequantize_4bit_compute, code * absmax in float32, then rounded to the type
that quant_state names, and int8_vectorwise_dequant, which stays float32; functional.py: QuantState.from_dict.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from yarn_edge.checkpoint.config_file import is_whole, shown

from ..stored import DTYPES, Tensor
from .arithmetic import Bytes, Floats, by_byte, by_code, dequantized_tensor, rounded
from .pieces import Pieces

_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_STATE = 1 << 16  # bytes of its JSON
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_LARGEST_OFFSET = 1e30
_PER_127 = np.float32(7.874015718698502e-3)


@dataclass(frozen=True)
class Absmax:
    """The scale of each block. table: 256 values, if they are quantized; then `outer` has one scale for `per_outer` of them."""

    values: Tensor
    table: Floats
    outer: Floats
    per_outer: int
    offset: np.float32

    def of_blocks(self, start: int, stop: int) -> Floats:
        """The scales of blocks [start, stop)."""
        raw = self.values.bits(start, stop)
        if not self.per_outer:
            return raw.astype(np.float32)
        outer = self.outer[np.arange(start, stop) // self.per_outer]
        return by_byte(self.table, raw) * outer + self.offset


def read_bitsandbytes(pieces: Pieces) -> str:
    """Take all weights of bitsandbytes. Returns what they are."""
    kinds: dict[str, None] = {}
    for module, kind, state in list(_states(pieces)):
        nested, size = _take_blocks(pieces, module, kind, state)
        kinds[f"{kind.upper()}, blocks of {size}{', double quantization' if nested else ''}"] = None
    for module, name in pieces.ending(".SCB"):
        _take_int8(pieces, module, name)
        kinds["8-bit integers, a scale for each row"] = None
    return f"bitsandbytes ({'; '.join(kinds)})"


def _states(pieces: Pieces) -> list[tuple[str, str, str]]:
    """(module, nf4 or fp4, name of the tensor with the JSON)."""
    return [(module, kind, name) for kind in ("nf4", "fp4") for module, name in pieces.ending(_STATE + kind)]


def _json(pieces: Pieces, tensor: Tensor) -> dict[str, Any]:
    """The settings of one weight, checked."""
    try:
        values = json.loads(tensor.whole().tobytes()) if tensor.n_bytes <= _MAX_STATE else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise pieces.error(tensor.name, "is not a JSON object: the file is damaged")
    shape, size, outer = values.get("shape"), values.get("blocksize"), values.get("nested_blocksize", 256)
    numbers = [*(shape if isinstance(shape, list) else ()), size, outer]
    if len(numbers) != 4 or not all(is_whole(n) and n > 0 for n in numbers) or any(n % 2 for n in numbers[1:3]):
        what = f"has the shape {shown(shape)} in blocks of {shown(size)} and {shown(outer)}, which is not read"
        raise pieces.error(tensor.name, what)
    dtype, offset = values.get("dtype"), values.get("nested_offset", 0.0)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise pieces.error(tensor.name, f"has the dtype {shown(dtype)}, known: {', '.join(_DTYPES)}")
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) < _LARGEST_OFFSET:
        raise pieces.error(tensor.name, f"has the nested_offset {shown(offset)}, expected a number")
    return values


def _take_blocks(pieces: Pieces, module: str, kind: str, state: str) -> tuple[bool, int]:
    """A weight of 4 bits. Returns whether its scales are quantized, and the size of a block."""
    name = f"{module}.weight"
    values = _json(pieces, pieces.take(state, ("U8",)))
    if values.get("quant_type") != kind:
        raise pieces.error(state, f"has the quant_type {shown(values.get('quant_type'))}, expected {kind}")
    shape, size = [int(n) for n in values["shape"]], int(values["blocksize"])
    n_weights, columns = math.prod(shape), shape[-1]
    packed = pieces.take(name, ("U8", "I8", *DTYPES), of=state)
    if packed.n_bytes * 2 != n_weights:
        raise pieces.error(name, f"has {packed.n_bytes} bytes, expected half of {shape[0]} x {columns} weights")
    codes = _floats(pieces, f"{name}.quant_map", 16, name)
    absmax = _absmax(pieces, name, values, -(-n_weights // size))
    dtype = _DTYPES[values["dtype"]]

    def rows(start: int, stop: int) -> Floats:
        first, last = start * columns // size, -(-stop * columns // size)
        held: Bytes = np.zeros((last - first) * size // 2, np.uint8)
        packed.read(first * size // 2, held[: packed.n_bytes - first * size // 2])
        found = by_code(codes, held, 4, high_first=True).reshape(-1, size)
        found *= absmax.of_blocks(first, last)[:, None]
        inside = start * columns - first * size
        return rounded(found.reshape(-1)[inside : inside + (stop - start) * columns], dtype)

    pieces.put(name, name, dequantized_tensor(name, shape, rows))
    return bool(absmax.per_outer), size


def _absmax(pieces: Pieces, name: str, values: dict[str, Any], n_blocks: int) -> Absmax:
    nothing = np.empty(0, np.float32)
    if f"{name}.nested_absmax" not in pieces.left:
        return Absmax(pieces.take(f"{name}.absmax", ("F32",), (n_blocks,), of=name), nothing, nothing, 0, np.float32(0))
    quantized = pieces.take(f"{name}.absmax", ("U8",), (n_blocks,), of=name)
    per_outer = int(values.get("nested_blocksize", 256))
    table = _floats(pieces, f"{name}.nested_quant_map", 256, name)
    outer = _floats(pieces, f"{name}.nested_absmax", -(-n_blocks // per_outer), name)
    return Absmax(quantized, table, outer, per_outer, np.float32(values.get("nested_offset", 0.0)))


def _floats(pieces: Pieces, name: str, n: int, of: str) -> Floats:
    return pieces.take(name, ("F32",), (n,), of=of).whole()


def _take_int8(pieces: Pieces, module: str, scales_name: str) -> None:
    """A weight of 8 bits."""
    name = f"{module}.weight"
    weight = pieces.take(name, ("I8",), of=scales_name)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise pieces.error(name, f"has the shape {list(weight.shape)}, expected a matrix")
    scales = _floats(pieces, scales_name, weight.shape[0], name)
    layout = f"{module}.weight_format"
    if layout in pieces.left and pieces.take(layout, ("U8",)).whole().any():
        raise pieces.error(layout, "is not 0, a layout of one kind of GPU: save the model on another machine")

    def rows(start: int, stop: int) -> Floats:
        values = weight.rows(start, stop).astype(np.float32)
        values *= scales[start:stop, None]
        values *= _PER_127
        return values

    pieces.put(name, name, dequantized_tensor(name, weight.shape, rows))
