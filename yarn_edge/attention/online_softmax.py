"""The step from scores to weights, the same for few queries and for many."""

from __future__ import annotations

from typing import Any

import numpy as np

from yarn_edge.attention.blocks import Blocks
from yarn_edge.attention.node import KernelShape
from yarn_edge.attention.node_view import part_for
from yarn_edge.attention.softmax import add_mask, exponentials, largest_of
from yarn_edge.attention.vectors import exponential, read_f32, write_f32
from yarn_edge.attention.work import TILE

NOTHING = np.float32(-1e30)  # below every score: the largest one before the first tile


def online_softmax(shape: KernelShape, blocks: Blocks) -> Any:
    """Turn the scores of a tile into weights; maxima, sums and results so far are adjusted (online softmax, arXiv:1805.02867)."""
    d_v, scale_a = shape.d_v, blocks.scale_a

    @part_for(shape)
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
