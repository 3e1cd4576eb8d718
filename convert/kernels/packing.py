"""The parts of K-quant blocks as arrays: scales and minima of their sub-blocks are read, levels are written (`layout`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layout import GROUP, LAYOUTS, WEIGHTS, KQuantLayout

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def scales_of(name: str, blocks: Bytes) -> tuple[Floats, Floats]:
    """(scales, minima) of the sub-blocks, (n, sub-blocks) each: a weight is scale x (level - offset) - minimum.

    blocks: (n, bytes of a block) of the type `name`. Signed types have no minima: theirs are 0.
    """
    layout = LAYOUTS[name]
    n_scales = WEIGHTS // layout.sub_block
    numbers = np.zeros((len(blocks), 2 * n_scales), np.int32)
    for at, value, shift, mask, left in layout.fields:
        numbers[:, value] |= ((blocks[:, at].astype(np.int32) >> left) & mask) << shift
    scales, minima = numbers[:, :n_scales], numbers[:, n_scales:]
    if layout.signed:
        shifted = layout.scale_levels < 256
        scales = scales - layout.scale_levels // 2 if shifted else scales.astype(np.uint8).view(np.int8)
        return _factor(blocks, layout.d_at) * scales.astype(np.float32), np.zeros(scales.shape, np.float32)
    return (
        _factor(blocks, layout.d_at) * scales.astype(np.float32),
        _factor(blocks, layout.dmin_at) * minima.astype(np.float32),
    )


def _factor(blocks: Bytes, at: int) -> Floats:
    """The block's factor in half precision, as a column of float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def level_limits(name: str) -> tuple[int, int]:
    """(the offset of a level, the largest level) of the type `name`; the least is 0."""
    layout = LAYOUTS[name]
    return (layout.levels // 2 if layout.signed else 0), layout.levels - 1


def levels_of(name: str, blocks: Bytes) -> Bytes:
    """The levels of the blocks, (n, 256)."""
    levels = np.zeros((len(blocks), WEIGHTS), np.uint8)
    for group, at, k, bit, width in _parts(LAYOUTS[name]):
        part = (blocks[:, at : at + GROUP] >> (width * k)) & ((1 << width) - 1)
        levels[:, group * GROUP : (group + 1) * GROUP] |= part << bit
    return levels


def put_levels(name: str, levels: Bytes, blocks: Bytes) -> None:
    """Write levels (n, 256) into the blocks, whose scales stay as they are."""
    layout = LAYOUTS[name]
    for plane in layout.planes:
        blocks[:, plane[0] : plane[0] + GROUP] = 0
    for group, at, k, bit, width in _parts(layout):
        part = (levels[:, group * GROUP : (group + 1) * GROUP] >> bit) & ((1 << width) - 1)
        blocks[:, at : at + GROUP] |= part << (width * k)


def _parts(layout: KQuantLayout) -> list[tuple[int, int, int, int, int]]:
    """(group of 32 levels, first of its 32 bytes, its place in a byte in units of `width`, first bit of the level, width in bits)."""
    return [
        (first + step * k, at, k, bit, width)
        for at, bit, width, first, step in layout.planes
        for k in range(8 // width)
    ]
