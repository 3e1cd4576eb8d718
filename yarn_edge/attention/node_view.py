"""What a kernel reads of its node, and how its parts are compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import numba

from yarn_edge.attention import spans
from yarn_edge.attention.node import DATA, NB, NE, SCALE_AT, SRC, KernelShape
from yarn_edge.attention.softmax import SOME_BIAS, SOME_SEEN, mask_of
from yarn_edge.attention.vectors import read_f32, read_i32, read_i64, write_i32, write_i64
from yarn_edge.attention.work import CALLS, DONE, NEXT, TILE

_SECOND_HIDDEN, _BOTH_HIDDEN = 0xFC000000, 0xFC00FC00  # of two halves: minus infinity


def part(function: Callable[..., Any]) -> Any:
    """Mark a part of a kernel, which is compiled with it; Python cannot call it."""
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True)(function)


def part_for(shape: KernelShape) -> Callable[[Callable[..., Any]], Any]:
    """`part` for a function that differs by shape, under a name that says so.

    Compiled code calls its parts by name. Kernels from the cache that two processes compiled could use the same names, and one
    would call the other's parts.
    """

    def named(function: Callable[..., Any]) -> Any:
        function.__qualname__ += "_" + "_".join(str(value) for value in shape)
        return part(function)

    return named


class NodeView(NamedTuple):
    """What a kernel reads of its node: addresses, sizes, and strides in bytes (1: cell or query, 2: head, 3: sequence).

    room: cells of the cache. places: of a group, the address of its cells in the order of their positions, else 0; seen: how many
    of them its first query sees, the next one sees one more. `mask` is then where the mask of a tile is written.
    """

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
    room: int
    places: int
    seen: int


span_start = part(spans.span_start)
span_count = part(FunctionType(spans.span_count.__code__, {"span_start": span_start}))


@part
def end_node(work: int) -> None:
    """(work area): counts the node and resets the counters, in the last thread to finish."""
    write_i64(work + CALLS, read_i64(work + CALLS) + 1)
    write_i64(work + NEXT, 0)
    write_i64(work + DONE, 0)


@part
def read_node(dst: int) -> NodeView:
    """(dst): the view of the node at this address."""
    q, k, v, mask = read_i64(dst + SRC), read_i64(dst + SRC + 8), read_i64(dst + SRC + 16), read_i64(dst + SRC + 24)
    sinks = read_i64(dst + SRC + 32)
    return NodeView(
        read_i64(q + DATA), read_i64(k + DATA), read_i64(v + DATA), read_i64(mask + DATA),
        read_i64(sinks + DATA) if sinks != 0 else 0, read_i64(dst + DATA),
        read_i64(q + NE + 8), read_i64(q + NE + 16), read_i64(q + NE + 24), read_i64(k + NE + 8), read_i64(k + NE + 16),
        read_i64(q + NB + 8), read_i64(q + NB + 16), read_i64(q + NB + 24),
        read_i64(k + NB + 8), read_i64(k + NB + 16), read_i64(k + NB + 24),
        read_i64(v + NB + 8), read_i64(v + NB + 16), read_i64(v + NB + 24),
        read_i64(mask + NB + 8), read_i64(mask + NB + 24) if read_i64(mask + NE + 24) != 1 else 0,
        read_i64(dst + NB + 8), read_i64(dst + NB + 16), read_i64(dst + NB + 24), read_f32(dst + SCALE_AT),
        read_i64(k + NE + 8), 0, 0,
    )  # fmt: skip


@part
def place_of(node: NodeView, cell: int) -> int:
    """(node, cell): where a cell is in the cache."""
    return cell if node.places == 0 else read_i32(node.places + 4 * cell)


@part
def together(node: NodeView, cell: int) -> bool:
    """(node, cell): whether the cells of the tile that begins here follow one another in the cache."""
    if node.places == 0:
        return True
    first = read_i32(node.places + 4 * cell)
    if first + TILE > node.room:
        return False
    apart = 0
    for j in range(1, min(TILE, node.cells - cell)):
        apart |= read_i32(node.places + 4 * (cell + j)) ^ (first + j)
    return apart == 0


@part
def tile_mask(node: NodeView, sequence: int, cell: int, first: int, count: int) -> tuple[int, int]:
    """(node, sequence, cell, first query, queries): what `mask_of` says of a tile, and the address of its mask."""
    if node.places == 0:
        mask = node.mask + sequence * node.mask3 + first * node.mask1 + 2 * cell
        return mask_of(mask, count, node.mask1), mask
    seen = node.seen + first
    if cell >= seen + count - 1:
        return 0, 0
    if cell + TILE <= seen:
        return SOME_SEEN, 0
    for i in range(count):
        for j in range(0, TILE, 2):
            left = seen + i - (cell + j)
            hidden = 0 if left >= 2 else (_SECOND_HIDDEN if left == 1 else _BOTH_HIDDEN)
            write_i32(node.mask + i * node.mask1 + 2 * j, hidden)
    return SOME_SEEN | SOME_BIAS, node.mask
