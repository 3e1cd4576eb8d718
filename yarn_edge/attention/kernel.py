"""The attention of one node, as ggml's threads call it (GGML_OP_CUSTOM): softmax(Q K^T x scale + mask) V.

Up to FEW queries of a sequence are handled together: a unit of work is a span of the cache, each cell of it is read once for all
heads and queries, and the last thread to finish combines the spans. A row's arithmetic depends on no other row, so an answer is
the same alone and among neighbours, and with any number of threads. More queries are split into blocks, each of which goes
through the whole cache. Threads take units from a counter: ggml gives a custom operation neither a barrier nor memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from yarn_edge.attention import spans
from yarn_edge.attention.blocks import LINE, MOST_ROWS, Blocks, blocks_for
from yarn_edge.attention.cache_rows import CACHE_TYPES
from yarn_edge.attention.node import DATA, NB, NE, SCALE_AT, SRC, KernelShape
from yarn_edge.attention.softmax import SOME_BIAS, SOME_SEEN, add_mask, exponentials, largest_of, mask_of
from yarn_edge.attention.vectors import (
    BLOCK_ROWS,
    WIDTH,
    exponential,
    read_f32,
    read_i64,
    take_next,
    write_f32,
    write_i64,
)
from yarn_edge.attention.work import (
    BLOCK_QUERIES,
    BLOCK_RESULTS,
    CALLS,
    DONE,
    FEW,
    NEXT,
    PARTIALS,
    SCRATCH,
    SCRATCH_BYTES,
    TILE,
)

_RUNS = 4  # of neighbouring spans, for each thread
_NOTHING = np.float32(-1e30)  # below every score
_ZERO, _ONE = np.float32(0), np.float32(1)


class _Node(NamedTuple):
    """What a kernel reads of its node: addresses, sizes, and strides in bytes (1: cell or query, 2: head, 3: sequence)."""

    q: int
    k: int
    v: int
    mask: int
    sinks: int
    out: int
    queries: int
    heads: int
    sequences: int
    cells: int
    kv_heads: int
    q1: int
    q2: int
    q3: int
    k1: int
    k2: int
    k3: int
    v1: int
    v2: int
    v3: int
    mask1: int
    mask3: int
    out1: int
    out2: int
    out3: int
    scale: float


def build(shape: KernelShape, version: int, keep: bool) -> Any:
    """The kernel: a Numba cfunc (dst, ith, nth, work area). keep: use Numba's cache, with `version` as a part of the key.

    It checks nothing: `yarn_edge.attention.node` says what may be given to it. Raises whatever Numba raises.
    """
    attend = _attention(shape)

    def kernel(dst: int, ith: int, nth: int, work: int) -> None:
        attend(dst, ith, nth, work, version)

    made = FunctionType(kernel.__code__, {"attend": attend}, "kernel", None, kernel.__closure__)
    made.__module__, made.__qualname__ = __name__, "kernel"
    signature = types.void(types.int64, types.int32, types.int32, types.int64)
    return numba.cfunc(signature, cache=keep, error_model="numpy")(made)


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True)(function)


_span_start = _compiled(spans.span_start)
_span_count = _compiled(FunctionType(spans.span_count.__code__, {"span_start": _span_start}))


@_compiled
def _read_node(dst: int) -> _Node:
    q, k, v, mask = read_i64(dst + SRC), read_i64(dst + SRC + 8), read_i64(dst + SRC + 16), read_i64(dst + SRC + 24)
    sinks = read_i64(dst + SRC + 32)
    return _Node(
        read_i64(q + DATA), read_i64(k + DATA), read_i64(v + DATA), read_i64(mask + DATA),
        read_i64(sinks + DATA) if sinks != 0 else 0, read_i64(dst + DATA),
        read_i64(q + NE + 8), read_i64(q + NE + 16), read_i64(q + NE + 24), read_i64(k + NE + 8), read_i64(k + NE + 16),
        read_i64(q + NB + 8), read_i64(q + NB + 16), read_i64(q + NB + 24),
        read_i64(k + NB + 8), read_i64(k + NB + 16), read_i64(k + NB + 24),
        read_i64(v + NB + 8), read_i64(v + NB + 16), read_i64(v + NB + 24),
        read_i64(mask + NB + 8), read_i64(mask + NB + 24) if read_i64(mask + NE + 24) != 1 else 0,
        read_i64(dst + NB + 8), read_i64(dst + NB + 16), read_i64(dst + NB + 24), read_f32(dst + SCALE_AT),
    )  # fmt: skip


def _attention(shape: KernelShape) -> Any:
    blocks = blocks_for(CACHE_TYPES[shape.k_type], CACHE_TYPES[shape.v_type], shape.d_k, shape.d_v)
    add_scores = _softmax(shape, blocks)
    few, many = _few_queries(shape, blocks, add_scores), _many_queries(shape, blocks, add_scores)

    @_compiled
    def attend(dst: int, ith: int, nth: int, work: int, _version: int) -> None:
        node, scratch = _read_node(dst), read_i64(work + SCRATCH) + ith * read_i64(work + SCRATCH_BYTES)
        if node.queries <= FEW:
            few(node, nth, work, scratch)
        else:
            many(node, nth, work, scratch)

    return attend


def _softmax(shape: KernelShape, blocks: Blocks) -> Any:
    """Turn the scores of a tile into weights; maxima, sums and results so far are adjusted (online softmax, arXiv:1805.02867)."""
    d_v, scale_a = shape.d_v, blocks.scale_a

    @_compiled
    def weights_of(
        scores: int, a: int, maxima: int, sums: int, rows: int, queries: int, mask: int, stride: int
    ) -> None:
        query = 0
        for r in range(rows):
            row = scores + 4 * TILE * r
            if mask != 0:
                add_mask(row, mask + query * stride)
            query += 1
            if query == queries:
                query = 0
            largest, before = largest_of(row), read_f32(maxima + 4 * r)
            if largest > before:
                shrink = exponential(before - largest)
                write_f32(sums + 4 * r, read_f32(sums + 4 * r) * shrink)
                write_f32(maxima + 4 * r, largest)
                scale_a(a + 4 * d_v * r, shrink)
                before = largest
            write_f32(sums + 4 * r, read_f32(sums + 4 * r) + exponentials(row, before))

    return weights_of


def _few_queries(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    d_k, d_v, copy_q, clear_a = shape.d_k, shape.d_v, blocks.copy_q, blocks.clear_a
    tile_of_few, combine = _tile_of_few(shape, blocks, weights_of), _combination(shape, blocks)

    @_compiled
    def span_of_few(node: _Node, sequence: int, span: int, a: int, tile: int, queries: int) -> None:
        rows, total = node.queries * (node.heads // node.kv_heads), node.queries * node.heads
        maxima, sums = a + 4 * d_v * total, a + 4 * (d_v + 1) * total
        for r in range(total):
            clear_a(a + 4 * d_v * r)
            write_f32(maxima + 4 * r, _NOTHING)
            write_f32(sums + 4 * r, _ZERO)
        for cell in range(_span_start(span), min(_span_start(span + 1), node.cells), TILE):
            mask = node.mask + sequence * node.mask3 + 2 * cell
            seen = mask_of(mask, node.queries, node.mask1)
            if seen & SOME_SEEN:
                for head in range(node.kv_heads):
                    first = rows * head
                    tile_of_few(
                        node, sequence, cell, head, queries + 4 * d_k * first, tile,
                        (a + 4 * d_v * first, maxima + 4 * first, sums + 4 * first), mask if seen & SOME_BIAS else 0,
                    )  # fmt: skip

    @_compiled
    def few(node: _Node, nth: int, work: int, scratch: int) -> None:
        group, total, n_spans = node.heads // node.kv_heads, node.queries * node.heads, _span_count(node.cells)
        units, each = node.sequences * n_spans, 4 * total * (d_v + 2)
        run, copied = max(1, units // (_RUNS * nth)), -1
        queries, partials = scratch, read_i64(work + PARTIALS)
        tile = queries + 4 * d_k * total
        while True:
            first = take_next(work + NEXT) * run
            if first >= units:
                break
            for unit in range(first, min(first + run, units)):
                sequence = unit // n_spans
                if sequence != copied:
                    for head in range(node.heads):
                        for i in range(node.queries):
                            row = (head // group * group + head % group) * node.queries + i
                            source = node.q + i * node.q1 + head * node.q2 + sequence * node.q3
                            copy_q(source, queries + 4 * d_k * row, node.scale)
                    copied = sequence
                span_of_few(node, sequence, unit % n_spans, partials + unit * each, tile, queries)
        if take_next(work + DONE) == nth - 1:
            for sequence in range(node.sequences):
                combine(node, sequence, n_spans, partials + sequence * n_spans * each, scratch)
            write_i64(work + CALLS, read_i64(work + CALLS) + 1)
            write_i64(work + NEXT, 0)
            write_i64(work + DONE, 0)

    return few


def _tile_of_few(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    """One tile of one key-value head. The next tile of all heads is fetched meanwhile: one row waits for the memory."""
    d_k, d_v, read_k, read_v, score, fetch_lines = (
        shape.d_k, shape.d_v, blocks.read_k, blocks.read_v, blocks.score, blocks.fetch_lines
    )  # fmt: skip
    k_bytes, v_bytes = CACHE_TYPES[shape.k_type].row_bytes(d_k), CACHE_TYPES[shape.v_type].row_bytes(d_v)
    weigh1, weigh2, weigh3, weigh4 = (blocks.weigh[min(n, MOST_ROWS) - 1] for n in (1, 2, 3, 4))

    @_compiled
    def tile_of_few(
        node: _Node,
        sequence: int,
        cell: int,
        head: int,
        queries: int,
        tile: int,
        state: tuple[int, int, int],
        mask: int,
    ) -> None:
        rows, a = node.queries * (node.heads // node.kv_heads), state[0]
        keys, values = tile, tile + 4 * TILE * d_k
        scores = values + 4 * TILE * d_v
        k = node.k + sequence * node.k3 + cell * node.k1
        ahead = k + TILE * node.k1 + head * (TILE * k_bytes)
        k += head * node.k2
        for j in range(TILE):
            read_k(k + j * node.k1, keys + 4 * d_k * j)
        products = rows * (TILE // WIDTH)
        lines = (TILE * k_bytes // LINE + products - 1) // products
        for r in range(rows):
            for j in range(0, TILE, WIDTH):
                fetch_lines(ahead, lines)
                ahead += LINE * lines
                score(queries + 4 * d_k * r, keys + 4 * d_k * j, scores + 4 * (TILE * r + j))
        weights_of(scores, a, state[1], state[2], rows, node.queries, mask, node.mask1)
        v = node.v + sequence * node.v3 + cell * node.v1
        ahead = v + TILE * node.v1 + head * (TILE * v_bytes)
        v += head * node.v2
        for j in range(TILE):
            read_v(v + j * node.v1, values + 4 * d_v * j)
        r = 0
        while r < rows:
            left = min(rows - r, MOST_ROWS)
            if left == 1:
                weigh1(scores + 4 * TILE * r, values, a + 4 * d_v * r, ahead)
            elif left == 2:
                weigh2(scores + 4 * TILE * r, values, a + 4 * d_v * r, ahead)
            elif left == 3:
                weigh3(scores + 4 * TILE * r, values, a + 4 * d_v * r, ahead)
            else:
                weigh4(scores + 4 * TILE * r, values, a + 4 * d_v * r, ahead)
            r += left

    return tile_of_few


def _combination(shape: KernelShape, blocks: Blocks) -> Any:
    d_v, clear_a, add_a, copy_a = shape.d_v, blocks.clear_a, blocks.add_a, blocks.copy_a

    @_compiled
    def combine(node: _Node, sequence: int, n_spans: int, partials: int, room: int) -> None:
        total = node.queries * node.heads
        each, maxima, sums = 4 * total * (d_v + 2), partials + 4 * d_v * total, partials + 4 * (d_v + 1) * total
        for row in range(total):
            head, query = row // node.queries, row % node.queries
            largest, whole = _NOTHING, _ZERO
            if node.sinks != 0:
                largest, whole = read_f32(node.sinks + 4 * head), _ONE
            for span in range(n_spans):
                found = read_f32(maxima + span * each + 4 * row)
                if found > largest:
                    whole *= exponential(largest - found)
                    largest = found
            clear_a(room)
            for span in range(n_spans):
                part = exponential(read_f32(maxima + span * each + 4 * row) - largest)
                whole += part * read_f32(sums + span * each + 4 * row)
                add_a(partials + span * each + 4 * d_v * row, room, part)
            to = node.out + head * node.out1 + query * node.out2 + sequence * node.out3
            copy_a(room, to, _ONE / whole if whole > _ZERO else _ZERO)

    return combine


def _many_queries(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    d_k, d_v, copy_q, copy_a, clear_q, clear_a = (
        shape.d_k, shape.d_v, blocks.copy_q, blocks.copy_a, blocks.clear_q, blocks.clear_a
    )  # fmt: skip
    tile_of_many = _tile_of_many(shape, blocks, weights_of)

    @_compiled
    def block_of_many(node: _Node, sequence: int, first: int, count: int, head: int, scratch: int) -> None:
        group = node.heads // node.kv_heads
        rows = count * group
        padded = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
        queries, a = scratch, scratch + 4 * d_k * padded
        maxima = a + 4 * d_v * padded
        sums, tile = maxima + 4 * padded, maxima + 8 * padded
        for r in range(padded):
            if r < rows:
                at = node.q + (first + r % count) * node.q1 + (head * group + r // count) * node.q2 + sequence * node.q3
                copy_q(at, queries + 4 * d_k * r, node.scale)
            else:
                clear_q(queries + 4 * d_k * r)
            clear_a(a + 4 * d_v * r)
            write_f32(maxima + 4 * r, _NOTHING)
            write_f32(sums + 4 * r, _ZERO)
        for cell in range(0, node.cells, TILE):
            mask = node.mask + sequence * node.mask3 + first * node.mask1 + 2 * cell
            seen = mask_of(mask, count, node.mask1)
            if seen & SOME_SEEN:
                shown = mask if seen & SOME_BIAS else 0
                tile_of_many(node, sequence, cell, head, (queries, a, maxima, sums, tile), (rows, padded, count), shown)
        for r in range(rows):
            own, whole = head * group + r // count, read_f32(sums + 4 * r)
            shrink, largest = _ONE, read_f32(maxima + 4 * r)
            if node.sinks != 0:
                sink = read_f32(node.sinks + 4 * own)
                if sink > largest:
                    shrink = exponential(largest - sink)
                    whole = whole * shrink + _ONE
                else:
                    whole += exponential(sink - largest)
            to = node.out + own * node.out1 + (first + r % count) * node.out2 + sequence * node.out3
            copy_a(a + 4 * d_v * r, to, shrink / whole if whole > _ZERO else _ZERO)

    @_compiled
    def many(node: _Node, nth: int, work: int, scratch: int) -> None:
        size = max(BLOCK_QUERIES, BLOCK_RESULTS // (node.heads // node.kv_heads))
        n_blocks = (node.queries + size - 1) // size
        units = node.sequences * n_blocks * node.kv_heads
        while True:
            unit = take_next(work + NEXT)
            if unit >= units:
                break
            sequence, rest = unit // (n_blocks * node.kv_heads), unit % (n_blocks * node.kv_heads)
            first = (n_blocks - 1 - rest // node.kv_heads) * size  # the last queries see most: first
            block_of_many(node, sequence, first, min(size, node.queries - first), rest % node.kv_heads, scratch)
        if take_next(work + DONE) == nth - 1:
            write_i64(work + CALLS, read_i64(work + CALLS) + 1)
            write_i64(work + NEXT, 0)
            write_i64(work + DONE, 0)

    return many


def _tile_of_many(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    d_k, d_v, read_k_columns, read_v = shape.d_k, shape.d_v, blocks.read_k_columns, blocks.read_v
    score_block, weigh_block = blocks.score_block, blocks.weigh_block

    @_compiled
    def tile_of_many(
        node: _Node,
        sequence: int,
        cell: int,
        head: int,
        at: tuple[int, int, int, int, int],
        counts: tuple[int, int, int],
        mask: int,
    ) -> None:
        queries, a, maxima, sums, tile = at
        rows, padded, count = counts
        columns, values = tile, tile + 4 * TILE * d_k
        scores = values + 4 * TILE * d_v
        k = node.k + sequence * node.k3 + cell * node.k1 + head * node.k2
        v = node.v + sequence * node.v3 + cell * node.v1 + head * node.v2
        for j in range(0, TILE, WIDTH):
            read_k_columns(k + j * node.k1, node.k1, columns + 4 * j)
        for r in range(0, padded, BLOCK_ROWS):
            score_block(queries + 4 * d_k * r, columns, scores + 4 * TILE * r)
        weights_of(scores, a, maxima, sums, rows, count, mask, node.mask1)
        for j in range(TILE):
            read_v(v + j * node.v1, values + 4 * d_v * j)
        for r in range(0, padded, BLOCK_ROWS):
            weigh_block(scores + 4 * TILE * r, values, a + 4 * d_v * r)

    return tile_of_many
