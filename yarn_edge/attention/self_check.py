"""A compiled kernel next to float64 in NumPy, once when it is loaded: what LLVM made for this processor is not taken on trust.

One sequence of 192 cells, with holes in the mask and a sink, is attended to by one query, by a few and by many. It takes a few
milliseconds.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.node import SCALE_AT, KernelShape
from yarn_edge.attention.work import FEW, TILE, WorkArea, partials_floats, scratch_floats
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml import TensorStruct
from yarn_edge.runtime.ggml_types import GGMLType, dequantize_into, quantize_into, type_named

CELLS, KV_HEADS, HEADS, QUERIES = 3 * TILE, 2, 6, (1, 5, FEW + 5)
_MOST_ERROR = 1e-5  # relative, root mean square; what is right stays below 1e-6
_F32, _F16 = 0, 1
Floats = npt.NDArray[np.float32]


def check_attention(kernel: Any, shape: KernelShape) -> None:
    """Raises YarnEdgeError if `kernel`, an address and its ctypes function, does not compute attention."""
    random = np.random.default_rng(0)
    k, k_held = _cached(type_named(shape.k_type.upper()), random.standard_normal((CELLS, KV_HEADS, shape.d_k)))
    v, v_held = _cached(type_named(shape.v_type.upper()), random.standard_normal((CELLS, KV_HEADS, shape.d_v)))
    sinks = random.standard_normal(HEADS).astype(np.float32)
    area = WorkArea(
        1, scratch_floats(shape.d_k, shape.d_v, HEADS, KV_HEADS), partials_floats(shape.d_v, HEADS, 1, CELLS)
    )
    for n in QUERIES:
        q = random.standard_normal((n, HEADS, shape.d_k)).astype(np.float32)
        mask = np.where(random.random((n, CELLS)) < 0.25, -np.inf, 0).astype(np.float16)
        mask[:, CELLS // 2 : CELLS // 2 + TILE] = -np.inf
        mask[:, 0] = 0
        out = np.full((n, HEADS, shape.d_v), np.nan, np.float32)
        inputs = [
            _tensor(q, (2, 0, 1), _F32),
            _cache_tensor(k_held, type_named(shape.k_type.upper()), shape.d_k),
            _cache_tensor(v_held, type_named(shape.v_type.upper()), shape.d_v),
            _tensor(mask, (1, 0), _F16),
            _tensor(sinks, (0,), _F32),
        ]
        node = _tensor(out, (2, 1, 0), _F32)
        for i, tensor in enumerate(inputs):
            node.src[i] = ctypes.pointer(tensor)
        scale = np.float32(shape.d_k**-0.5)
        ctypes.c_float.from_address(ctypes.addressof(node) + SCALE_AT).value = float(scale)
        kernel.ctypes(ctypes.addressof(node), 0, 1, area.address)
        expected = exact_attention(q, k, v, mask, float(scale), sinks)
        error = float(np.sqrt(np.square(out - expected).sum() / np.square(expected).sum()))
        if not error < _MOST_ERROR:
            raise YarnEdgeError(
                f"the compiled attention kernel for a cache of type {shape.k_type}/{shape.v_type} and heads of {shape.d_k} is wrong "
                f"on this processor (error {error:.1e} with {n} queries): please report it, and use --attention ggml"
            )


def exact_attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    scale: float,
    sinks: Floats | None = None,
) -> npt.NDArray[np.float64]:
    """Attention in float64, (queries, heads, d_v). q (queries, heads, d_k), k and v (cells, kv heads, d), mask (queries, cells), sinks
    (heads,)."""
    n_heads = q.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), n_heads // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("qhd,chd->qhc", q.astype(np.float64), keys) * scale + mask[:, None].astype(np.float64)
    none = np.full(n_heads, -np.inf) if sinks is None else sinks.astype(np.float64)
    sink = np.broadcast_to(none[None, :, None], (len(q), n_heads, 1))
    most = np.maximum(scores.max(-1, keepdims=True), sink)
    weights = np.exp(scores - most)
    weights /= weights.sum(-1, keepdims=True) + np.exp(sink - most)
    result: npt.NDArray[np.float64] = np.einsum("qhc,chd->qhd", weights, values)
    return result


def _cached(kind: GGMLType, values: npt.NDArray[np.float64]) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """(cells, heads, d) as a cache of this type holds them, and their bytes, a row for each cell."""
    cells, heads, width = values.shape
    held = np.empty((cells * heads, kind.row_bytes(width)), np.uint8)
    quantize_into(kind, values.reshape(-1, width).astype(np.float32), held)
    again = np.empty(values.size, np.float32)
    dequantize_into(kind, held.reshape(-1), again)
    return again.reshape(values.shape), held.reshape(cells, -1)


def _cache_tensor(held: npt.NDArray[np.uint8], kind: GGMLType, width: int) -> TensorStruct:
    row = kind.row_bytes(width)
    sizes = (width, CELLS, KV_HEADS, 1)
    return _described(held, kind.number, sizes, (kind.block_bytes, row * KV_HEADS, row, held.nbytes))


def _tensor(values: npt.NDArray[Any], axes: tuple[int, ...], kind: int) -> TensorStruct:
    """A view of an array; axes: fastest first."""
    sizes = [*(values.shape[axis] for axis in axes), *(1 for _ in range(4 - len(axes)))]
    strides = [*(values.strides[axis] for axis in axes), *(values.nbytes for _ in range(4 - len(axes)))]
    return _described(values, kind, sizes, strides)


def _described(values: npt.NDArray[Any], kind: int, sizes: Any, strides: Any) -> TensorStruct:
    tensor = TensorStruct()
    tensor.type, tensor.data = kind, values.ctypes.data
    for i in range(4):
        tensor.ne[i], tensor.nb[i] = sizes[i], strides[i]
    return tensor
