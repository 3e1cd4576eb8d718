"""The attention of one node, as ggml's threads call it (GGML_OP_CUSTOM): softmax(Q K^T x scale + mask) V.

Threads take units of work from a counter: ggml gives a custom operation neither a barrier nor memory.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numba
from numba import types

from yarn_edge.attention.blocks import blocks_for
from yarn_edge.attention.cache_rows import CACHE_TYPES
from yarn_edge.attention.few_queries import few_queries
from yarn_edge.attention.groups import grouped_queries
from yarn_edge.attention.many_queries import many_queries
from yarn_edge.attention.node import KernelShape
from yarn_edge.attention.node_view import part_for, read_node
from yarn_edge.attention.online_softmax import online_softmax
from yarn_edge.attention.vectors import read_i64
from yarn_edge.attention.work import FEW, GROUPS, SCRATCH, SCRATCH_BYTES
from yarn_edge.runtime.compiled_code import named_by


def build_kernel(shape: KernelShape, version: int, keep: bool) -> Any:
    """The kernel: a Numba cfunc (dst, ith, nth, work area). keep: use Numba's cache, under a name with `version` in it.

    It checks nothing: `yarn_edge.attention.node` says what may be given to it. Raises whatever Numba raises.
    """
    named = {**globals(), "_attend": _attention(shape)}  # a global: Numba's cache looks at what a closure holds
    kernel = FunctionType(_kernel.__code__, named, "kernel")
    signature = types.void(types.int64, types.int32, types.int32, types.int64)
    return numba.cfunc(signature, cache=keep, error_model="numpy")(named_by(version, kernel))


def _kernel(dst: int, ith: int, nth: int, work: int) -> None:
    _attend(dst, ith, nth, work)


_attend: Any = None  # of the shape that is being compiled


def _attention(shape: KernelShape) -> Any:
    blocks = blocks_for(CACHE_TYPES[shape.k_type], CACHE_TYPES[shape.v_type], shape.d_k, shape.d_v)
    weights_of = online_softmax(shape, blocks)
    few, span_of_few, combine = few_queries(shape, blocks, weights_of)
    many, block_of_many = many_queries(shape, blocks, weights_of)
    grouped = grouped_queries(shape, blocks, span_of_few, combine, block_of_many)

    @part_for(shape)
    def attend(dst: int, ith: int, nth: int, work: int) -> None:
        node, scratch = read_node(dst), read_i64(work + SCRATCH) + ith * read_i64(work + SCRATCH_BYTES)
        groups = read_i64(work + GROUPS)
        if groups != 0:
            grouped(node, nth, work, scratch, groups)
        elif node.queries <= FEW:
            few(node, nth, work, scratch)
        else:
            many(node, nth, work, scratch)

    return attend
