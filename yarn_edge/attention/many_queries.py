"""More than FEW queries: a unit of work is a block of them under one key-value head, which goes through the whole cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from yarn_edge.attention.blocks import Blocks
from yarn_edge.attention.node import KernelShape
from yarn_edge.attention.node_view import NodeView, end_node, part_for, place_of, tile_mask, together
from yarn_edge.attention.online_softmax import NOTHING
from yarn_edge.attention.softmax import SOME_BIAS, SOME_SEEN
from yarn_edge.attention.vectors import BLOCK_ROWS, WIDTH, exponential, read_f32, take_next, write_f32
from yarn_edge.attention.work import BLOCK_QUERIES, BLOCK_RESULTS, DONE, NEXT, TILE

_ZERO, _ONE = np.float32(0), np.float32(1)


def many_queries(shape: KernelShape, blocks: Blocks, weights_of: Any) -> tuple[Any, Any]:
    """The function (node, threads, work area, scratch) for many queries, and its part of one block."""
    block_of_many = _block_of_many(shape, blocks, weights_of)

    @part_for(shape)
    def many(node: NodeView, nth: int, work: int, scratch: int) -> None:
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
            end_node(work)

    return many, block_of_many


def _block_of_many(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    """One block of queries under one key-value head."""
    d_k, d_v, copy_q, copy_a, clear_q, clear_a = (
        shape.d_k,
        shape.d_v,
        blocks.copy_q,
        blocks.copy_a,
        blocks.clear_q,
        blocks.clear_a,
    )
    tile_of_many = _tile_of_many(shape, blocks, weights_of)

    @part_for(shape)
    def block_of_many(node: NodeView, sequence: int, first: int, count: int, head: int, scratch: int) -> None:
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
            write_f32(maxima + 4 * r, NOTHING)
            write_f32(sums + 4 * r, _ZERO)
        for cell in range(0, node.cells, TILE):
            seen, mask = tile_mask(node, sequence, cell, first, count)
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

    return block_of_many


def _tile_of_many(shape: KernelShape, blocks: Blocks, weights_of: Any) -> Any:
    d_k, d_v, read_k_columns, read_v = shape.d_k, shape.d_v, blocks.read_k_columns, blocks.read_v
    read_k = blocks.read_k
    score_block, weigh_block = blocks.score_block, blocks.weigh_block

    @part_for(shape)
    def tile_of_many(
        node: NodeView,
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
        place, in_a_row = place_of(node, cell), together(node, cell)
        k = node.k + sequence * node.k3 + head * node.k2
        v = node.v + sequence * node.v3 + head * node.v2
        if in_a_row:
            for j in range(0, TILE, WIDTH):
                read_k_columns(k + (place + j) * node.k1, node.k1, columns + 4 * j)
        else:
            for j in range(TILE):
                read_k(k + place_of(node, cell + j) * node.k1, scores)
                for i in range(d_k):
                    write_f32(columns + 4 * (TILE * i + j), read_f32(scores + 4 * i))
        for r in range(0, padded, BLOCK_ROWS):
            score_block(queries + 4 * d_k * r, columns, scores + 4 * TILE * r)
        weights_of(scores, a, maxima, sums, rows, count, mask, node.mask1)
        for j in range(TILE):
            read_v(v + (place + j if in_a_row else place_of(node, cell + j)) * node.v1, values + 4 * d_v * j)
        for r in range(0, padded, BLOCK_ROWS):
            weigh_block(scores + 4 * TILE * r, values, a + 4 * d_v * r)

    return tile_of_many
