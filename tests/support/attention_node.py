"""FLASH_ATTN_EXT nodes made by hand, their attention in float64, and our kernels called as ggml's threads call them."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.node import SCALE_AT, KernelShape
from yarn_edge.attention.work import WorkArea, partials_floats, scratch_floats
from yarn_edge.runtime.ggml import TensorStruct
from yarn_edge.runtime.ggml_types import dequantize_into, quantize_into, type_named
from yarn_edge.runtime.kv_cache import KV_TYPES

Values = npt.NDArray[np.float32]


@dataclass
class AttentionNode:
    """q (sequences, queries, heads, d_k), k and v (sequences, cells, kv heads, d), mask (sequences, queries, cells) in half precision.

    sinks: (heads,) or None. k and v are rounded to `kind`; `keys` and `values` hold what it says.
    """

    kind: str
    q: Values
    k: Values
    v: Values
    mask: npt.NDArray[np.float16]
    sinks: Values | None = None
    scale: float = 0.125
    out: Values = field(init=False)

    def __post_init__(self) -> None:
        self.keys, self._k = _rounded(self.kind, self.k)
        self.values, self._v = _rounded(self.kind, self.v)
        self.out = np.full((*self.q.shape[:3], self.v.shape[-1]), np.nan, np.float32)
        self._tensors = [
            _tensor(self.q, 0, (0, 2, 1, 3), 4),
            _cache_tensor(self._k, self.kind, self.k.shape),
            _cache_tensor(self._v, self.kind, self.v.shape),
            _tensor(self.mask[:, None], 1, (0, 1, 2, 3), 2),
        ]
        self.node = _tensor(self.out, 0, (0, 1, 2, 3), 4)
        words = _bytes(self.node)
        words[SCALE_AT : SCALE_AT + 4].view(np.float32)[0] = self.scale
        if self.sinks is not None:
            self._tensors.append(_tensor(self.sinks[None, None, None], 0, (0, 1, 2, 3), 4))
        for i, tensor in enumerate(self._tensors):
            self.node.src[i] = ctypes.pointer(tensor)

    @property
    def shape(self) -> KernelShape:
        return KernelShape(self.kind, self.kind, self.k.shape[-1], self.v.shape[-1])

    def area(self, threads: int) -> WorkArea:
        sequences, _, heads, d_k = self.q.shape
        cells, kv_heads = self.k.shape[1:3]
        scratch = scratch_floats(d_k, self.v.shape[-1], heads, kv_heads)
        return WorkArea(threads, scratch, partials_floats(self.v.shape[-1], heads, sequences, cells))

    def computed(self, kernel: Any, threads: int = 1) -> Values:
        """The kernel's result, with this many threads."""
        area = self.area(threads)
        self.out[:] = np.nan
        address = ctypes.addressof(self.node)
        workers = [
            threading.Thread(target=kernel.ctypes, args=(address, i, threads, area.address)) for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert area.calls == 1
        return self.out.copy()

    def exact(self) -> npt.NDArray[np.float64]:
        """In float64, from the rounded cache."""
        group = self.q.shape[2] // self.k.shape[2]
        q, k, v = (a.astype(np.float64) for a in (self.q, self.keys, self.values))
        k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
        scores = np.einsum("sqhd,schd->shqc", q, k) * np.float64(np.float32(self.scale))
        with np.errstate(invalid="ignore"):
            scores += self.mask[:, None].astype(np.float64)
        most = scores.max(-1, keepdims=True)
        if self.sinks is not None:
            most = np.maximum(most, self.sinks[None, :, None, None])
        most = np.where(np.isinf(most), 0, most)
        weights = np.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        if self.sinks is not None:
            total = total + np.exp(self.sinks[None, :, None, None] - most)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        return np.einsum("shqc,schd->sqhd", weights, v)


def random_node(
    kind: str = "f16",
    *,
    queries: int,
    cells: int,
    heads: int = 6,
    kv_heads: int = 2,
    sequences: int = 1,
    widths: tuple[int, int] = (64, 64),
    seed: int = 0,
    sinks: bool = False,
) -> AttentionNode:
    """Normal values, and a causal mask whose queries are the last cells."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Values:
        return random.standard_normal(shape).astype(np.float32)

    mask = np.zeros((sequences, queries, cells), np.float16)
    for i in range(queries):
        mask[:, i, max(1, cells - queries + i + 1) :] = -np.inf
    return AttentionNode(
        kind,
        normal(sequences, queries, heads, widths[0]),
        normal(sequences, cells, kv_heads, widths[0]),
        normal(sequences, cells, kv_heads, widths[1]),
        mask,
        normal(heads) if sinks else None,
        widths[0] ** -0.5,
    )


def _rounded(kind: str, rows: Values) -> tuple[Values, npt.NDArray[np.uint8]]:
    """What a cache of this type holds: as float32, and as bytes."""
    if kind == "f16":
        half = rows.astype(np.float16)
        return half.astype(np.float32), np.ascontiguousarray(half).view(np.uint8)
    if kind == "bf16":
        high = (rows.view(np.uint32) >> 16).astype(np.uint16)
        return (high.astype(np.uint32) << 16).view(np.float32), high.view(np.uint8)
    of = type_named(kind.upper())
    flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]))
    out = np.empty((len(flat), of.row_bytes(rows.shape[-1])), np.uint8)
    quantize_into(of, flat, out)
    again = np.empty(flat.size, np.float32)
    dequantize_into(of, out.reshape(-1), again)
    return again.reshape(rows.shape), out


def _tensor(values: npt.NDArray[Any], kind: int, order: tuple[int, ...], item: int) -> TensorStruct:
    """A view of an array, whose axes are given slowest first, in ggml's order."""
    tensor = TensorStruct()
    tensor.type, tensor.data = kind, values.ctypes.data
    for i, axis in enumerate(reversed(order)):
        tensor.ne[i], tensor.nb[i] = values.shape[axis], values.strides[axis]
    assert tensor.nb[0] == item
    return tensor


def _cache_tensor(held: npt.NDArray[np.uint8], kind: str, shape: tuple[int, ...]) -> TensorStruct:
    sequences, cells, heads, width = shape
    number, per_float = KV_TYPES[kind]
    row = int(width * per_float)
    tensor = TensorStruct()
    tensor.type, tensor.data = number, held.ctypes.data
    block = {"f16": 2, "bf16": 2}.get(kind) or int(32 * per_float)
    for i, (n, step) in enumerate(
        ((width, block), (cells, row * heads), (heads, row), (sequences, row * heads * cells))
    ):
        tensor.ne[i], tensor.nb[i] = n, step
    return tensor


def _bytes(tensor: TensorStruct) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * ctypes.sizeof(tensor)).from_address(ctypes.addressof(tensor)))
