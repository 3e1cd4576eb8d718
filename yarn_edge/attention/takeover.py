"""The callback that gives FLASH_ATTN_EXT nodes to a kernel, without Python; it leaves those that no kernel knows.

Everything that a kernel assumes of a node is checked here, for every node of every graph. What a node must be is in `ggml.h`
(struct ggml_tensor) and in `llama-graph.cpp` (build_attn_mha).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from yarn_edge.attention import work
from yarn_edge.attention.cache_rows import CACHE_TYPES
from yarn_edge.attention.node import DATA, FUNCTION_AT, NB, NE, OP, PARAMS, SCALE_AT, SRC, TASKS_AT, WORK_AT
from yarn_edge.attention.node_view import part, span_count
from yarn_edge.attention.vectors import read_f32, read_i32, read_i64, write_f32, write_i32, write_i64
from yarn_edge.attention.work import TILE
from yarn_edge.runtime.compiled_code import as_callback, named_by

# The state, int64: HEAD values, then a row of ROW_WIDTH for each kernel: types of K and V, bytes of a block of each, floats of a
# head of each, the addresses for FEW queries and for more (0: ggml is faster).
(FLASH_OP, CUSTOM_OP, WORK, SCRATCH_ROOM, PARTIALS_ROOM, TAKEN, LEFT, REASON, N_KERNELS) = range(9)
(SET_ROWS_OP, CELLS, N_CELLS, MISPLACED) = range(
    9, 13
)  # where the batch is expected to be put, and the nodes that differ
HEAD, ROW_WIDTH = 13, 8
REASONS = (
    "",
    "its cache types or head sizes have no kernel",
    "its mask has another form",
    "it has a soft cap or ALiBi",
    "its cache is not cut into whole tiles",
    "it needs more working memory than was set aside",
    "its inputs have another form",
)
_NO_KERNEL, _MASK, _BIAS, _CELLS, _ROOM, _FORM = range(1, 7)
_F32, _F16, _I64 = 0, 1, 27


def _with(function: Any, **names: Any) -> Any:
    return part(FunctionType(function.__code__, {**vars(work), **names}))


_partials = _with(work.partials_floats, span_count=span_count)
_scratch = _with(work.scratch_floats)


@part
def _kernel_for(state: int, k: int, v: int) -> int:
    """The address of the row for these types and head sizes; 0 without one."""
    for i in range(read_i64(state + 8 * N_KERNELS)):
        row = state + 8 * (HEAD + ROW_WIDTH * i)
        same_types = read_i32(k) == read_i64(row) and read_i32(v) == read_i64(row + 8)
        whole = read_i64(k + NB) == read_i64(row + 16) and read_i64(v + NB) == read_i64(row + 24)
        if same_types and whole and read_i64(k + NE) == read_i64(row + 32) and read_i64(v + NE) == read_i64(row + 40):
            return row
    return 0


@part
def _shaped(dst: int, q: int, k: int, v: int) -> bool:
    """Whether queries, keys, values and result belong together, as ggml_flash_attn_ext makes them."""
    for i in (16, 24):
        if read_i64(k + NE + i) != read_i64(v + NE + i):
            return False
    kv_heads, sinks = read_i64(k + NE + 16), read_i64(dst + SRC + 32)
    if sinks != 0 and (read_i32(sinks) != _F32 or read_i64(sinks + NE) != read_i64(q + NE + 16)):
        return False
    return bool(
        read_i32(q) == _F32
        and read_i64(q + NB) == 4
        and read_i32(dst) == _F32
        and read_i64(dst + NB) == 4
        and read_i64(q + NE) == read_i64(k + NE)
        and read_i64(k + NE + 8) == read_i64(v + NE + 8)
        and read_i64(q + NE + 24) == read_i64(k + NE + 24)
        and kv_heads > 0
        and read_i64(q + NE + 16) % kv_heads == 0
        and read_i64(dst + NE + 8) == read_i64(q + NE + 16)
        and read_i64(dst + NE + 16) == read_i64(q + NE + 8)
    )


@part
def _masked(dst: int, q: int, k: int) -> bool:
    mask = read_i64(dst + SRC + 24)
    if mask == 0 or read_i32(mask) != _F16 or read_i64(mask + NB) != 2:
        return False
    sequences = read_i64(mask + NE + 24)
    return bool(
        read_i64(mask + NE) == read_i64(k + NE + 8)
        and read_i64(mask + NE + 8) >= read_i64(q + NE + 8)
        and read_i64(mask + NE + 16) == 1
        and (sequences == 1 or sequences == read_i64(q + NE + 24))
    )


@part
def _reason_to_leave(dst: int, state: int, row: int) -> int:
    """A number of REASONS; row: of the kernel, 0 without one."""
    q, k, v = read_i64(dst + SRC), read_i64(dst + SRC + 8), read_i64(dst + SRC + 16)
    if row == 0:
        return _NO_KERNEL
    if not _shaped(dst, q, k, v):
        return _FORM
    if not _masked(dst, q, k):
        return _MASK
    if read_i32(dst + PARAMS + 4) != 0 or read_i32(dst + PARAMS + 8) != 0:
        return _BIAS
    cells, heads, kv_heads = read_i64(k + NE + 8), read_i64(q + NE + 16), read_i64(k + NE + 16)
    if cells % TILE != 0:
        return _CELLS
    d_k, d_v = read_i64(row + 32), read_i64(row + 40)
    partials = _partials(d_v, heads, read_i64(q + NE + 24), cells)
    if 4 * _scratch(d_k, d_v, heads, kv_heads) > read_i64(state + 8 * SCRATCH_ROOM) or 4 * partials > read_i64(
        state + 8 * PARTIALS_ROOM
    ):
        return _ROOM
    return 0


@part
def _take_over(dst: int, state: int) -> None:
    """Give a node to its kernel, or note why not."""
    row = _kernel_for(state, read_i64(dst + SRC + 8), read_i64(dst + SRC + 16))
    reason = _reason_to_leave(dst, state, row)
    if reason != 0:
        write_i64(state + 8 * LEFT, read_i64(state + 8 * LEFT) + 1)
        write_i64(state + 8 * REASON, reason)
        return
    many = read_i64(read_i64(dst + SRC) + NE + 8) > work.FEW
    function = read_i64(row + (56 if many else 48))
    if function == 0:
        return
    write_f32(dst + SCALE_AT, read_f32(dst + PARAMS))
    write_i64(dst + FUNCTION_AT, function)
    write_i32(dst + TASKS_AT, -1)
    write_i64(dst + WORK_AT, read_i64(state + 8 * WORK))
    write_i32(dst + OP, read_i64(state + 8 * CUSTOM_OP))
    write_i64(state + 8 * TAKEN, read_i64(state + 8 * TAKEN) + 1)


@part
def _compare(dst: int, state: int) -> None:
    """Compare the cells that a SET_ROWS node writes to with those that were expected."""
    cells, count = read_i64(dst + SRC + 8), read_i64(state + 8 * N_CELLS)
    if cells == 0 or read_i32(cells) != _I64 or read_i64(cells + NE) != count:
        return
    data, expected = read_i64(cells + DATA), read_i64(state + 8 * CELLS)
    for i in range(count):
        if read_i64(data + 8 * i) != read_i64(expected + 8 * i):
            write_i64(state + 8 * MISPLACED, read_i64(state + 8 * MISPLACED) + 1)
            return


def build_callback(version: int, keep: bool) -> Any:
    """The callback as llama.cpp takes it; its user data is the address of the state. See `build_kernel` for the arguments."""

    def before_attention(address: int, asking: int, state: int) -> int:
        if asking:
            op = read_i32(address + OP)
            if op == read_i64(state + 8 * FLASH_OP):
                _take_over(address, state)
            elif op == read_i64(state + 8 * SET_ROWS_OP) and read_i64(state + 8 * N_CELLS) > 0:
                _compare(address, state)
        return 0

    signature = types.uint8(types.int64, types.uint8, types.int64)
    return as_callback(numba.cfunc(signature, cache=keep)(named_by(version, before_attention)))


def kernel_row(k_type: str, v_type: str, d_k: int, d_v: int, few: int, many: int) -> npt.NDArray[np.int64]:
    """A row of the state."""
    k, v = CACHE_TYPES[k_type], CACHE_TYPES[v_type]
    return np.array([k.number, v.number, k.ggml_bytes, v.ggml_bytes, d_k, d_v, few, many], np.int64)
