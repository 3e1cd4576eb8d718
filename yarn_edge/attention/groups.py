"""Queries of several sequences that share a cache: each group of queries reads the cells of its own sequence, in their order.

So an answer is the same whatever cells it got and whatever is computed beside it. A unit of work is one of `few_queries`, a span, or
one of `many_queries`, a block.
"""

from __future__ import annotations

from typing import Any

from yarn_edge.attention.blocks import Blocks
from yarn_edge.attention.group_table import GROUP_WIDTH
from yarn_edge.attention.node import KernelShape
from yarn_edge.attention.node_view import NodeView, end_node, part, part_for, span_count
from yarn_edge.attention.vectors import read_i64, take_next
from yarn_edge.attention.work import BLOCK_QUERIES, BLOCK_RESULTS, DONE, FEW, NEXT, PARTIALS, TILE


@part
def _view(node: NodeView, group: int, mask: int) -> NodeView:
    """(node, address of a group's row, room for masks): the node of this group alone."""
    first, queries, seen = read_i64(group), read_i64(group + 8), read_i64(group + 24)
    cells = (seen + queries - 1 + TILE - 1) // TILE * TILE
    return NodeView(
        node.q + first * node.q1,
        node.k,
        node.v,
        mask,
        node.sinks,
        node.out + first * node.out2,
        queries,
        node.heads,
        1,
        cells,
        node.kv_heads,
        node.q1,
        node.q2,
        0,
        node.k1,
        node.k2,
        0,
        node.v1,
        node.v2,
        0,
        2 * TILE,
        0,
        node.out1,
        node.out2,
        0,
        node.scale,
        node.room,
        read_i64(group + 16),
        seen,
    )


def grouped_queries(shape: KernelShape, blocks: Blocks, span_of_few: Any, combine: Any, block_of_many: Any) -> Any:
    """The function (node, threads, work area, scratch, table of groups)."""
    d_k, d_v, copy_q = shape.d_k, shape.d_v, blocks.copy_q

    @part_for(shape)
    def span(node: NodeView, number: int, partials: int, queries: int) -> None:
        for head in range(node.heads):
            for i in range(node.queries):
                copy_q(node.q + i * node.q1 + head * node.q2, queries + 4 * d_k * (head * node.queries + i), node.scale)
        total = node.queries * node.heads
        span_of_few(node, 0, number, partials + number * 4 * total * (d_v + 2), queries + 4 * d_k * total, queries)

    @part_for(shape)
    def grouped(node: NodeView, nth: int, work: int, scratch: int, table: int) -> None:
        size = max(BLOCK_QUERIES, BLOCK_RESULTS // (node.heads // node.kv_heads))
        room, rows = scratch + 2 * TILE * max(FEW, size), table + 8
        last = rows + 8 * GROUP_WIDTH * read_i64(table)
        group, begin, end, partials, following = rows - 8 * GROUP_WIDTH, 0, 0, 0, read_i64(work + PARTIALS)
        view, many = node, False
        unit = take_next(work + NEXT)
        while True:
            if unit < end:
                number = unit - begin
                if many:
                    first = ((view.queries + size - 1) // size - 1 - number // view.kv_heads) * size
                    block_of_many(view, 0, first, min(size, view.queries - first), number % view.kv_heads, room)
                else:
                    span(view, number, partials, room)
                unit = take_next(work + NEXT)
                continue
            group += 8 * GROUP_WIDTH
            if group == last:
                break
            view, many, begin, partials = _view(node, group, scratch), read_i64(group + 32) != 0, end, following
            if many:
                end += (view.queries + size - 1) // size * view.kv_heads
            else:
                end += span_count(view.cells)
                following += span_count(view.cells) * 4 * view.queries * view.heads * (d_v + 2)
        if take_next(work + DONE) == nth - 1:
            partials = read_i64(work + PARTIALS)
            for group in range(rows, last, 8 * GROUP_WIDTH):
                if read_i64(group + 32) == 0:
                    view = _view(node, group, scratch)
                    combine(view, 0, span_count(view.cells), partials, room)
                    partials += span_count(view.cells) * 4 * view.queries * view.heads * (d_v + 2)
            end_node(work)

    return grouped
