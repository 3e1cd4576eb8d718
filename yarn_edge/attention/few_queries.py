"""Up to FEW queries of a sequence: a unit of work is a span of the cache.

Each cell is read once for all heads and queries, and the last thread to finish combines the spans. A row's arithmetic depends on
no other row, so an answer is the same alone and among neighbours, and with any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yarn_edge.attention.blocks import LINE, MOST_ROWS, Blocks
from yarn_edge.attention.cache_rows import CACHE_TYPES
from yarn_edge.attention.node import KernelShape
from yarn_edge.attention.node_view import (
    NodeView,
    end_node,
    part_for,
    place_of,
    span_count,
    span_start,
    tile_mask,
    together,
)
from yarn_edge.attention.online_softmax import NOTHING
from yarn_edge.attention.softmax import SOME_BIAS, SOME_SEEN
from yarn_edge.attention.vectors import WIDTH, exponential, read_f32, read_i64, take_next, write_f32
from yarn_edge.attention.work import DONE, NEXT, PARTIALS, TILE

_RUNS = 4  # of neighbouring spans, for each thread
_STRAIGHT_ROWS = 8  # rows that read values where they are; more read them once into a buffer of floats
_ZERO, _ONE = np.float32(0), np.float32(1)


def few_queries(shape: KernelShape, blocks: Blocks, weights_of: Any) -> tuple[Any, Any, Any]:
    """The functions for few queries: (node, threads, work area, scratch), and its parts: of a span, and to combine all of them."""
    d_k, d_v, copy_q, clear_a = shape.d_k, shape.d_v, blocks.copy_q, blocks.clear_a
    tile_of_few, combine = _tile_of_few(shape, blocks, weights_of), _combination(shape, blocks)

    @part_for(shape)
    def span_of_few(node: NodeView, sequence: int, span: int, a: int, tile: int, queries: int) -> None:
        rows, total = node.queries * (node.heads // node.kv_heads), node.queries * node.heads
        maxima, sums = a + 4 * d_v * total, a + 4 * (d_v + 1) * total
        for r in range(total):
            clear_a(a + 4 * d_v * r)
            write_f32(maxima + 4 * r, NOTHING)
            write_f32(sums + 4 * r, _ZERO)
        for cell in range(span_start(span), min(span_start(span + 1), node.cells), TILE):
            seen, mask = tile_mask(node, sequence, cell, 0, node.queries)
            if seen & SOME_SEEN:
                for head in range(node.kv_heads):
                    first = rows * head
                    tile_of_few(
                        node,
                        sequence,
                        cell,
                        head,
                        queries + 4 * d_k * first,
                        tile,
                        (a + 4 * d_v * first, maxima + 4 * first, sums + 4 * first),
                        mask if seen & SOME_BIAS else 0,
                    )

    @part_for(shape)
    def few(node: NodeView, nth: int, work: int, scratch: int) -> None:
        total, n_spans = node.queries * node.heads, span_count(node.cells)
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
                            row = head * node.queries + i
                            source = node.q + i * node.q1 + head * node.q2 + sequence * node.q3
                            copy_q(source, queries + 4 * d_k * row, node.scale)
                    copied = sequence
                span_of_few(node, sequence, unit % n_spans, partials + unit * each, tile, queries)
        if take_next(work + DONE) == nth - 1:
            for sequence in range(node.sequences):
                combine(node, sequence, n_spans, partials + sequence * n_spans * each, scratch)
            end_node(work)

    return few, span_of_few, combine


def _tile_of_few(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    """One tile of one key-value head. The next tile of all heads is fetched meanwhile: one row waits for the memory."""
    d_k, d_v, read_k, read_v, score, fetch_lines = (
        shape.d_k,
        shape.d_v,
        blocks.read_k,
        blocks.read_v,
        blocks.score,
        blocks.fetch_lines,
    )
    k_bytes, v_bytes = CACHE_TYPES[shape.k_type].row_bytes(d_k), CACHE_TYPES[shape.v_type].row_bytes(d_v)
    straight, buffered = (
        _weighing(shape, "_cells", blocks.weigh_cells),
        _weighing(shape, "_floats", blocks.weigh_floats),
    )

    @part_for(shape)
    def tile_of_few(
        node: NodeView,
        sequence: int,
        cell: int,
        head: int,
        queries: int,
        tile: int,
        state: tuple[int, int, int],
        mask: int,
    ) -> None:
        rows, a = node.queries * (node.heads // node.kv_heads), state[0]
        keys, values, scores = tile, tile + 4 * TILE * d_k, tile + 4 * TILE * (d_k + d_v)
        place, in_a_row = place_of(node, cell), together(node, cell)
        k = node.k + sequence * node.k3
        ahead = k + (place + TILE) * node.k1 + head * (TILE * k_bytes)
        k += head * node.k2
        for j in range(TILE):
            read_k(k + (place + j if in_a_row else place_of(node, cell + j)) * node.k1, keys + 4 * d_k * j)
        products = rows * (TILE // WIDTH)
        lines = (TILE * k_bytes // LINE + products - 1) // products
        for r in range(rows):
            for j in range(0, TILE, WIDTH):
                fetch_lines(ahead, lines)
                ahead += LINE * lines
                score(queries + 4 * d_k * r, keys + 4 * d_k * j, scores + 4 * (TILE * r + j))
        weights_of(scores, a, state[1], state[2], rows, node.queries, mask, node.mask1)
        v = node.v + sequence * node.v3
        ahead = v + (place + TILE) * node.v1 + head * (TILE * v_bytes)
        v += head * node.v2
        fetch_lines(ahead + TILE * LINE * (v_bytes // LINE), -(-TILE * (v_bytes % LINE) // LINE))
        if rows <= _STRAIGHT_ROWS and in_a_row:
            straight(scores, v + place * node.v1, node.v1, a, rows, ahead)
        else:
            for j in range(TILE):
                read_v(v + (place + j if in_a_row else place_of(node, cell + j)) * node.v1, values + 4 * d_v * j)
            buffered(scores, values, 4 * d_v, a, rows, ahead)

    return tile_of_few


def _weighing(shape: KernelShape, name: str, weigh: tuple[Any, ...]) -> Any:
    """A += P V for any number of rows, MOST_ROWS at once."""
    weigh1, weigh2, weigh3, weigh4 = (weigh[min(n, MOST_ROWS) - 1] for n in (1, 2, 3, 4))
    d_v = shape.d_v

    def weigh_rows(scores: int, cells: int, stride: int, a: int, rows: int, ahead: int) -> None:
        r = 0
        while r < rows:
            left, p, to = min(rows - r, MOST_ROWS), scores + 4 * TILE * r, a + 4 * d_v * r
            if left == 1:
                weigh1(p, cells, stride, to, ahead)
            elif left == 2:
                weigh2(p, cells, stride, to, ahead)
            elif left == 3:
                weigh3(p, cells, stride, to, ahead)
            else:
                weigh4(p, cells, stride, to, ahead)
            r += left

    weigh_rows.__qualname__ += name  # one of two
    return part_for(shape)(weigh_rows)


def _combination(shape: KernelShape, blocks: Blocks) -> Any:
    d_v, clear_a, add_a, copy_a = shape.d_v, blocks.clear_a, blocks.add_a, blocks.copy_a

    @part_for(shape)
    def combine(node: NodeView, sequence: int, n_spans: int, partials: int, room: int) -> None:
        total = node.queries * node.heads
        each, maxima, sums = 4 * total * (d_v + 2), partials + 4 * d_v * total, partials + 4 * (d_v + 1) * total
        for row in range(total):
            head, query = row // node.queries, row % node.queries
            largest, whole = NOTHING, _ZERO
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
