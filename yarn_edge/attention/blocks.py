"""Products of a tile of the cache with queries: the operations of one kernel, made for its head sizes and cache types.

A tile is TILE cells of one key-value head, read once and kept as float32. Scores S = Q K^T and sums A += P V are computed in two
ways. One token (few rows) takes dot products, whose keys lie as in the cache. Many rows take products of blocks that stay in
registers, whose keys are transposed first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from yarn_edge.attention.cache_rows import PLAIN_FLOATS, CacheType
from yarn_edge.attention.vectors import BLOCK_ROWS, BLOCK_VECTORS, WIDTH, Emitter, constant, operation
from yarn_edge.attention.work import TILE

LINE = 64  # bytes of a cache line
MOST_ROWS = 3 if WIDTH == 8 else 4  # that `weigh` takes at once: AVX2 has half the registers
_FLOAT, _VECTOR = 4, 4 * WIDTH  # bytes


class Blocks(NamedTuple):
    """Operations for compiled code; every argument is an address, unless said otherwise.

    read_k, read_v(cell, to): one cell as float32. read_k_columns(cell, stride, to): WIDTH cells, `to` [d_k][TILE].
    score(q, keys, to): the products of one query with WIDTH keys. weigh_cells[n - 1](p, cells, stride, a, ahead): A += P V for
    n rows, straight from the cache, while what lies at `ahead` is fetched; weigh_floats: from float32.
    score_block(q, columns, to), weigh_block(p, values, a): the same for BLOCK_ROWS rows. copy_q(q, to, factor), copy_a,
    add_a(a, to, factor): rows times a float. scale_a(a, factor); clear_q(to), clear_a(to). fetch_lines(address, n): n lines are
    read soon.
    """

    read_k: Any
    read_v: Any
    read_k_columns: Any
    score: Any
    weigh_cells: tuple[Any, ...]
    weigh_floats: tuple[Any, ...]
    score_block: Any
    weigh_block: Any
    copy_q: Any
    copy_a: Any
    add_a: Any
    scale_a: Any
    clear_q: Any
    clear_a: Any
    fetch_lines: Any


def blocks_for(k_type: CacheType, v_type: CacheType, d_k: int, d_v: int) -> Blocks:
    """The operations for heads of d_k and d_v floats, multiples of 16 and of the types' blocks."""
    ahead = v_type.row_bytes(d_v) // LINE  # what is left over is fetched before the tile
    return Blocks(
        read_k=_reader(k_type, d_k),
        read_v=_reader(v_type, d_v),
        read_k_columns=_column_reader(k_type, d_k),
        score=_dot_products(d_k),
        weigh_cells=tuple(_weighted_sum(rows, d_v, v_type, ahead) for rows in range(1, MOST_ROWS + 1)),
        weigh_floats=tuple(_weighted_sum(rows, d_v, PLAIN_FLOATS, ahead) for rows in range(1, MOST_ROWS + 1)),
        score_block=_block_product(d_k, TILE, add=False),
        weigh_block=_block_product(TILE, d_v, add=True),
        copy_q=_scaled_copy(d_k),
        copy_a=_scaled_copy(d_v),
        add_a=_scaled_sum(d_v),
        scale_a=_scaling(d_v),
        clear_q=_clearing(d_k),
        clear_a=_clearing(d_v),
        fetch_lines=operation(_fetch_lines),
    )


def _reader(kind: CacheType, length: int) -> Any:
    def body(emit: Emitter, cell: Any, to: Any) -> None:
        for i, vector in enumerate(kind.row(emit, cell, length)):
            emit.put(vector, to, _VECTOR * i)

    return operation(body)


def _column_reader(kind: CacheType, length: int) -> Any:
    def body(emit: Emitter, cell: Any, stride: Any, to: Any) -> None:
        rows = [kind.row(emit, emit.builder.add(cell, emit.times(stride, j)), length) for j in range(WIDTH)]
        for i in range(length // WIDTH):
            for j, column in enumerate(emit.transposed([row[i] for row in rows])):
                emit.put(column, to, _FLOAT * TILE * (i * WIDTH + j))

    return operation(body)


def _dot_products(length: int) -> Any:
    def body(emit: Emitter, q: Any, keys: Any, to: Any) -> None:
        query = [emit.floats(q, _VECTOR * i) for i in range(length // WIDTH)]
        sums = [emit.builder.fmul(query[0], emit.floats(keys, _FLOAT * length * j)) for j in range(WIDTH)]
        for i, part in enumerate(query[1:], 1):
            for j in range(WIDTH):
                sums[j] = emit.fused(part, emit.floats(keys, _FLOAT * length * j + _VECTOR * i), sums[j])
        emit.put(emit.sums(sums), to)

    return operation(body)


def _weighted_sum(rows: int, length: int, kind: CacheType, ahead: int) -> Any:
    """ahead: lines that are fetched for each cell."""

    def body(emit: Emitter, p: Any, cells: Any, stride: Any, a: Any, following: Any) -> None:
        for first, count in _shares(length // WIDTH, 4):
            places = [(r, first + i) for r in range(rows) for i in range(count)]
            sums = emit.registers(len(places))
            for (r, i), kept in zip(places, sums, strict=True):
                emit.builder.store(emit.floats(a, _FLOAT * length * r + _VECTOR * i), kept)
            with emit.repeat(TILE) as loop:
                cell = emit.builder.add(cells, emit.builder.mul(loop.index, stride))
                weight = emit.step(p, loop.index, _FLOAT)
                if first == 0:
                    for line in range(ahead):
                        emit.fetch(emit.step(following, loop.index, LINE * ahead), LINE * line)
                vectors = kind.part(emit, cell, first, count)
                for r in range(rows):
                    w = emit.everywhere_from(weight, _FLOAT * TILE * r)
                    for i, vector in enumerate(vectors):
                        kept = sums[r * count + i]
                        emit.builder.store(emit.fused(w, vector, emit.builder.load(kept)), kept)
            for (r, i), kept in zip(places, sums, strict=True):
                emit.put(emit.builder.load(kept), a, _FLOAT * length * r + _VECTOR * i)

    return operation(body)


def _block_product(depth: int, columns: int, *, add: bool) -> Any:
    """C [BLOCK_ROWS][columns] = or += A [BLOCK_ROWS][depth] B [depth][columns]."""

    def body(emit: Emitter, a: Any, b: Any, c: Any) -> None:
        for first, count in _shares(columns // WIDTH, BLOCK_VECTORS):
            places = [_FLOAT * columns * r + _VECTOR * (first + i) for r in range(BLOCK_ROWS) for i in range(count)]
            sums = emit.registers(len(places))
            for place, kept in zip(places, sums, strict=True):
                emit.builder.store(emit.floats(c, place) if add else constant(0.0), kept)
            with emit.repeat(depth) as loop:
                row, column = emit.step(b, loop.index, _FLOAT * columns), emit.step(a, loop.index, _FLOAT)
                vectors = [emit.floats(row, _VECTOR * (first + i)) for i in range(count)]
                for r in range(BLOCK_ROWS):
                    w = emit.everywhere_from(column, _FLOAT * depth * r)
                    for i, vector in enumerate(vectors):
                        kept = sums[r * count + i]
                        emit.builder.store(emit.fused(w, vector, emit.builder.load(kept)), kept)
            for place, kept in zip(places, sums, strict=True):
                emit.put(emit.builder.load(kept), c, place)

    return operation(body)


def _shares(vectors: int, most: int) -> list[tuple[int, int]]:
    """(first, count): vectors in shares of at most `most`, as equal as can be."""
    shares = -(-vectors // most)
    ends = [vectors * i // shares for i in range(shares + 1)]
    return [(start, end - start) for start, end in pairwise(ends)]


def _scaled_copy(length: int) -> Any:
    def body(emit: Emitter, row: Any, to: Any, factor: Any) -> None:
        w = emit.everywhere(factor)
        for offset in range(0, _FLOAT * length, _VECTOR):
            emit.put(emit.builder.fmul(w, emit.floats(row, offset)), to, offset)

    return operation(body, floats=(2,))


def _scaled_sum(length: int) -> Any:
    def body(emit: Emitter, row: Any, to: Any, factor: Any) -> None:
        w = emit.everywhere(factor)
        for offset in range(0, _FLOAT * length, _VECTOR):
            emit.put(emit.fused(w, emit.floats(row, offset), emit.floats(to, offset)), to, offset)

    return operation(body, floats=(2,))


def _scaling(length: int) -> Any:
    def body(emit: Emitter, row: Any, factor: Any) -> None:
        w = emit.everywhere(factor)
        for offset in range(0, _FLOAT * length, _VECTOR):
            emit.put(emit.builder.fmul(w, emit.floats(row, offset)), row, offset)

    return operation(body, floats=(1,))


def _clearing(length: int) -> Any:
    def body(emit: Emitter, row: Any) -> None:
        for offset in range(0, _FLOAT * length, _VECTOR):
            emit.put(constant(0.0), row, offset)

    return operation(body)


def _fetch_lines(emit: Emitter, address: Any, count: Any) -> None:
    with emit.repeat(count) as loop:
        emit.fetch(emit.step(address, loop.index, LINE))
