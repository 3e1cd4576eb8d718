"""Rows of float32 as Q2_K, Q3_K, Q4_K, Q5_K or Q6_K, sixteen blocks at a time: one compiled kernel for all of them.

Blocks lie side by side for the search (`kquant_search`), one after the other for the final levels and the bytes. What
differs between the types is data (`kquant`, `kquant_layout`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .kquant import Plan
from .kquant_layout import GROUP, WEIGHTS
from .kquant_search import (
    between,
    descended_scale,
    level_of,
    nearest,
    positive_scale,
    scale_and_minimum,
    signed_scale,
    sum_of_squares,
    total,
    weigh,
)
from .lanes import LANES, absolute, any_lane, bits, compiled, floats, ints, load, pick, store

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Lanes = Any
_ALIGNMENT = 64  # bytes; vectors that cross a cache line cost twice
_HALF_SCALE = np.float32(2.0**112)  # between the exponents of half and single precision
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)


class Room(NamedTuple):
    """Memory of one call, in lanes: weights of the blocks, what they count, importance, levels that may be kept; by sub-block
    scales, minima, how the levels were made, which are nothing, sums of what they count, integers of scales and minima; the
    block's factors as they are stored and as they multiply."""

    x: Floats
    w: Floats
    importance: Floats
    kept: Floats
    aux: Floats
    scales: Floats
    minima: Floats
    inverses: Floats
    bases: Floats
    nothing: Floats
    sums: Floats
    raw: Floats
    raw_minima: Floats
    halves: Floats
    factors: Floats
    offsets: Floats


@compiled
def _half_bits(value: Lanes) -> Lanes:
    """Half precision, ties to even: its bits as ints."""
    magnitude = bits(absolute(value))
    odd = (magnitude >> ints(np.int32(13))) & ints(np.int32(1))
    normal = ((magnitude + ints(np.int32(0xFFF)) + odd) >> ints(np.int32(13))) - ints(np.int32(112 << 10))
    small = bits(absolute(value) + floats(np.float32(0.5))) - bits(floats(np.float32(0.5)))
    found = pick(magnitude < ints(np.int32(0x38800000)), small, normal)
    found = pick(magnitude >= ints(np.int32(0x47800000)), ints(np.int32(0x7C00)), found)
    return found | ((bits(value) >> ints(np.int32(16))) & ints(np.int32(0x8000)))


@compiled
def _from_half(half: Lanes) -> Lanes:
    """The floats of half precision's bits."""
    sign = (half & ints(np.int32(0x8000))) << ints(np.int32(16))
    magnitude = bits((half & ints(np.int32(0x7FFF))) << ints(np.int32(13))) * floats(_HALF_SCALE)
    infinite = (half & ints(np.int32(0x7C00))) == ints(np.int32(0x7C00))
    return bits(bits(pick(infinite, floats(_INFINITY), magnitude)) | sign)


@compiled
def _lanes_room(n: int) -> Floats:
    """n times 16 floats that begin at a cache line."""
    held = np.empty(n * LANES + _ALIGNMENT // 4, np.float32)
    start = (_ALIGNMENT - held.ctypes.data % _ALIGNMENT) % _ALIGNMENT // 4
    return held[start : start + n * LANES]


@compiled
def _side_by_side(rows: Floats, first: int, last: int, blocks: int, out: Floats) -> None:
    """Blocks `first` … first + 15 (`last` again behind it) modulo `blocks`, weight by weight into lanes."""
    for lane in range(LANES):
        at = min(first + lane, last) % blocks * WEIGHTS
        for i in range(WEIGHTS):
            out[i * LANES + lane] = rows[at + i]


@compiled
def _search(plan: Plan, room: Room) -> None:
    """Scales and minima of all sub-blocks."""
    zero, n = floats(_ZERO), plan.n
    spread = floats(plan.spread) * sum_of_squares(room.x, 0, WEIGHTS) / floats(np.float32(WEIGHTS))
    for j in range(WEIGHTS // n):
        at, here = j * n * LANES, j * LANES
        weigh(plan.weigh, room.x, room.importance, room.w, at, n, spread)
        if plan.fit:
            store(room.sums, here, total(room.w, at, n))
        inverse, base, nothing = zero, zero, zero
        if plan.descend:
            scale = descended_scale(room.x, room.w, room.kept, at, n, plan.top)
        elif plan.signed:
            scale, inverse, nowhere = signed_scale(room.x, room.w, at, n, plan.top, plan.numerators)
            nothing = pick(nowhere, floats(_ONE), zero)
        else:
            scale, minimum, inverse, base = scale_and_minimum(
                room.x, room.w, room.aux, at, n, plan.top, plan.numerators, plan.plain
            )
            store(room.minima, here, minimum)
        store(room.scales, here, scale)
        store(room.inverses, here, inverse)
        store(room.bases, here, base)
        store(room.nothing, here, nothing)


@compiled
def _by_the_largest(values: Floats, levels: Floats, n: int, top: np.float32) -> Lanes:
    """Levels 0 … top of n values, the largest at top; the bits of the factor."""
    largest = floats(_ZERO)
    for i in range(n):
        value = load(values, i * LANES)
        largest = pick(value > largest, value, largest)
    inverse = pick(largest > floats(_ZERO), floats(top) / largest, floats(_ZERO))
    for i in range(n):
        level = nearest(inverse * load(values, i * LANES)) & ints(np.int32(255))
        store(levels, i * LANES, floats(pick(level < ints(np.int32(top)), level, ints(np.int32(top)))))
    return _half_bits(largest / floats(top))


@compiled
def _by_the_extreme(plan: Plan, values: Floats, levels: Floats, n: int) -> tuple[Lanes, Lanes]:
    """Signed levels of n values, the one of largest magnitude at the least; the bits of the factor; where all is nothing."""
    extreme, magnitude = floats(_ZERO), floats(_ZERO)
    for i in range(n):
        value = load(values, i * LANES)
        larger = absolute(value) > magnitude
        extreme, magnitude = pick(larger, value, extreme), pick(larger, absolute(value), magnitude)
    dead = magnitude < floats(plan.nothing)
    inverse = floats(-plan.scale_top) / extreme
    low, high = ints(np.int32(-plan.scale_top)), ints(np.int32(plan.scale_top - _ONE))
    for i in range(n):
        level = floats(between(nearest(inverse * load(values, i * LANES)), low, high))
        store(levels, i * LANES, pick(dead, floats(-plan.scale_up), level))
    return pick(dead, ints(np.int32(0)), _half_bits(floats(_ONE) / inverse)), dead


@compiled
def _fitted(plan: Plan, room: Room, n: int) -> Lanes:
    """Signed levels of the sub-blocks' scales, fitted; the bits of the factor."""
    factor, inverse, nothing = signed_scale(room.scales, room.sums, 0, n, plan.scale_top, plan.scale_numerators)
    for j in range(n):
        level = level_of(inverse * load(room.scales, j * LANES), -plan.scale_top, plan.scale_top - _ONE)
        store(room.raw, j * LANES, pick(nothing, floats(-plan.scale_up), level))
    return _half_bits(factor)


@compiled
def _scale(plan: Plan, room: Room) -> None:
    """The block's factors, the integers of its scales and minima, and what they make together."""
    n, none = WEIGHTS // plan.n, ints(np.int32(0))
    half, half_minimum, dead = none, none, none != none
    if plan.signed:
        if plan.fit:
            half = _fitted(plan, room, n)
        else:
            half, dead = _by_the_extreme(plan, room.scales, room.raw, n)
    elif plan.fit:
        top, tries = plan.scale_top, plan.scale_numerators
        half = _half_bits(positive_scale(room.scales, room.sums, room.raw, n, top, tries))
        half_minimum = _half_bits(positive_scale(room.minima, room.sums, room.raw_minima, n, top, tries))
    else:
        half = _by_the_largest(room.scales, room.raw, n, plan.scale_top)
        half_minimum = _by_the_largest(room.minima, room.raw_minima, n, plan.scale_top)
    store(room.halves, 0, floats(half))
    store(room.halves, LANES, floats(half_minimum))
    for j in range(n):
        factor = _from_half(half) * load(room.raw, j * LANES)
        store(room.factors, j * LANES, factor)
        offset = floats(_ZERO)
        if not plan.signed:
            offset = _from_half(half_minimum) * load(room.raw_minima, j * LANES)
        store(room.offsets, j * LANES, offset)
        if any_lane(factor == floats(_ZERO)) and not plan.descend:
            _keep(plan, room, j, dead)


@compiled
def _keep(plan: Plan, room: Room, j: int, dead: Lanes) -> None:
    """The levels that the search found best for a sub-block whose scale became zero, so that none fits better."""
    zero, low, high, up = floats(_ZERO), _ZERO, plan.top, _ZERO
    if plan.signed:
        low, high, up = -plan.top, plan.top - _ONE, plan.top
    inverse, base = load(room.inverses, j * LANES), load(room.bases, j * LANES)
    zeroed = dead | (load(room.nothing, j * LANES) != zero)
    for i in range(j * plan.n * LANES, (j + 1) * plan.n * LANES, LANES):
        found = level_of(inverse * (load(room.x, i) - base), low, high) + floats(up)
        store(room.kept, i, pick(zeroed, zero, found))


@compiled
def _final_levels(plan: Plan, room: Room, rows: Floats, at: int, lane: int, levels: Bytes) -> None:
    """The levels nearest to (weight + offset) / factor, or those kept where the factor is zero."""
    low, high, up = np.int32(0), np.int32(plan.top), np.int32(0)
    if plan.signed:
        low, high, up = np.int32(-plan.top), np.int32(plan.top - _ONE), np.int32(plan.top)
    for j in range(WEIGHTS // plan.n):
        factor, offset = room.factors[j * LANES + lane], room.offsets[j * LANES + lane]
        for i in range(j * plan.n, (j + 1) * plan.n, LANES):
            if factor != _ZERO:
                exact = (load(rows, at + i) + floats(offset)) / floats(factor)
                store(levels, i, between(nearest(exact), ints(low), ints(high)) + ints(up))
            else:
                for k in range(i, i + LANES):
                    levels[k] = np.uint8(room.kept[k * LANES + lane])


@compiled
def _pack(plan: Plan, room: Room, lane: int, levels: Bytes, out: Bytes, at: int) -> None:
    """One block's bytes, from `at` on."""
    for p in range(plan.planes.shape[0]):
        start, bit, width, group, step = plan.planes[p]
        shift, mask = ints(np.int32(bit)), ints(np.int32((1 << width) - 1))
        for c in range(0, GROUP, LANES):
            made = ints(np.int32(0))
            for k in range(8 // width):
                part = (load(levels, (group + step * k) * GROUP + c) >> shift) & mask
                made = made | (part << ints(np.int32(width * k)))
            store(out, at + start + c, made)
    for f in range(plan.fields.shape[0]):
        out[at + plan.fields[f, 0]] = 0
    for f in range(plan.fields.shape[0]):
        byte, value, right, mask_of, left = plan.fields[f]
        stored = np.int64(room.raw[value * LANES + lane] + plan.scale_up)
        out[at + byte] |= np.uint8(((stored >> right) & mask_of) << left)
    for k, start in enumerate((plan.d_at, plan.dmin_at)):
        if start >= 0:
            half = np.int64(room.halves[k * LANES + lane])
            out[at + start], out[at + start + 1] = np.uint8(half & 255), np.uint8(half >> 8)


@compiled
def quantize_blocks(x: Floats, importance: Floats, blocks_of_row: int, out: Bytes, plan: Plan) -> None:
    """Whole rows, flat, as blocks of the plan's type into `out`. importance: of a row's columns, or empty.

    Nothing is checked: the sizes are the caller's (`kernels`).
    """
    n_blocks, n = out.size // plan.block_bytes, WEIGHTS // plan.n
    raw = _lanes_room(2 * n)
    room = Room(
        _lanes_room(WEIGHTS), _lanes_room(WEIGHTS), _lanes_room(WEIGHTS), _lanes_room(WEIGHTS), _lanes_room(plan.n),
        _lanes_room(n), _lanes_room(n), _lanes_room(n), _lanes_room(n), _lanes_room(n), _lanes_room(n), raw,
        raw[n * LANES :], _lanes_room(2), _lanes_room(n), _lanes_room(n),
    )  # fmt: skip
    levels = np.empty(WEIGHTS, np.uint8)
    for first in range(0, n_blocks, LANES):
        _side_by_side(x, first, n_blocks - 1, n_blocks, room.x)
        if importance.size:
            _side_by_side(importance, first, n_blocks - 1, blocks_of_row, room.importance)
        _search(plan, room)
        _scale(plan, room)
        for lane in range(min(LANES, n_blocks - first)):
            _final_levels(plan, room, x, (first + lane) * WEIGHTS, lane, levels)
            _pack(plan, room, lane, levels, out, (first + lane) * plan.block_bytes)
