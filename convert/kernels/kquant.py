"""One compiled kernel that quantizes rows of float32 to Q2_K, Q3_K, Q4_K, Q5_K or Q6_K, sixteen blocks at a time.

Blocks are side by side for the search (`search`), and one after another for the final levels and the bytes. The differences
between the types are data (`plan`, `layout`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from .lanes import absolute, any_lane, bits, compiled, floats, ints, load, pick, store, turn
from .layout import GROUP, WEIGHTS
from .machine_code import compiled_object
from .plan import LANES, ROOM, KernelPlan
from .search import (
    between,
    descended_scale,
    largest_of,
    level_of,
    nearest,
    positive_scale,
    scale_and_minimum,
    signed_scale,
    sum_of_squares,
    total,
    weigh,
)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Lanes = Any
Place = Any  # an index into the room
_HALF_SCALE = np.float32(2.0**112)  # between the exponents of half and single precision
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)


# The room of one call holds these values of sixteen blocks, as indices: the weights, their error weights, their importance,
# levels that may be kept, scratch space for a sub-block's levels. Then, by sub-block: scales, minima, the inverse scales and
# bases of their levels, whether all weights are treated as zero, sums of error weights, the scales and minima as stored. At the
# end: the bits of the block's half-precision factors, and the integers of the scales, then of the minima.
_X, _W, _IMPORTANCE, _KEPT, _AUX = (np.intp(k * WEIGHTS * LANES) for k in range(5))
_SCALES, _MINIMA, _INVERSES, _BASES, _NOTHING, _SUMS, _FACTORS, _OFFSETS, _HALVES, _RAW = (
    np.intp(_AUX + (2 + k) * GROUP // 2 * LANES) for k in range(10)
)


@compiled
def _half_bits(value: Lanes) -> Lanes:
    """The bits of half precision as ints; ties round to even."""
    magnitude = bits(absolute(value))
    odd = (magnitude >> ints(np.int32(13))) & ints(np.int32(1))
    normal = ((magnitude + ints(np.int32(0xFFF)) + odd) >> ints(np.int32(13))) - ints(np.int32(112 << 10))
    small = bits(absolute(value) + floats(np.float32(0.5))) - bits(floats(np.float32(0.5)))
    half = pick(magnitude < ints(np.int32(0x38800000)), small, normal)
    half = pick(magnitude >= ints(np.int32(0x47800000)), ints(np.int32(0x7C00)), half)
    return half | ((bits(value) >> ints(np.int32(16))) & ints(np.int32(0x8000)))


@compiled
def _from_half(half: Lanes) -> Lanes:
    """The floats that bits of half precision stand for."""
    sign = (half & ints(np.int32(0x8000))) << ints(np.int32(16))
    magnitude = bits((half & ints(np.int32(0x7FFF))) << ints(np.int32(13))) * floats(_HALF_SCALE)
    infinite = (half & ints(np.int32(0x7C00))) == ints(np.int32(0x7C00))
    return bits(bits(pick(infinite, floats(_INFINITY), magnitude)) | sign)


@compiled
def _side_by_side(rows: Floats, first: int, blocks: int, starts: Any, room: Floats, x: Place) -> None:
    """Write blocks first to first + 15, modulo `blocks`, to x: weight by weight, one block in each lane."""
    for lane in range(LANES):
        starts[lane] = (first + lane) % blocks * WEIGHTS
    for i in range(0, WEIGHTS, LANES):
        turn(rows, starts, room, x + i * LANES)
        for lane in range(LANES):
            starts[lane] += LANES


@compiled
def _search(plan: KernelPlan, room: Floats) -> None:
    """Find the scales and minima of all sub-blocks."""
    zero, n = floats(_ZERO), plan.n
    spread = zero
    if plan.fit:
        spread = floats(plan.spread) * sum_of_squares(room, _X, WEIGHTS) / floats(np.float32(WEIGHTS))
    for j in range(WEIGHTS // n):
        at, here = j * n * LANES, j * LANES
        x, w = _X + at, _W + at
        weigh(plan.weigh, room, x, _IMPORTANCE + at, w, n, spread)
        if plan.fit:
            store(room, _SUMS + here, total(room, w, n))
        inverse, base, nothing = zero, zero, zero
        if plan.descend:
            scale = descended_scale(room, x, w, _KEPT + at, n, plan.top)
        elif plan.signed:
            scale, inverse, is_nothing = signed_scale(room, x, w, n, plan.top, plan.numerators)
            nothing = pick(is_nothing, floats(_ONE), zero)
        else:
            scale, minimum, inverse, base = scale_and_minimum(
                room, x, w, _AUX, n, plan.top, plan.numerators, plan.plain
            )
            store(room, _MINIMA + here, minimum)
        store(room, _SCALES + here, scale)
        store(room, _INVERSES + here, inverse)
        store(room, _BASES + here, base)
        store(room, _NOTHING + here, nothing)


@compiled
def _by_the_largest(room: Floats, x: Place, levels: Place, n: int, top: np.float32) -> Lanes:
    """Write levels 0 to top of the n values at x, the largest at top. Returns the bits of the factor."""
    largest, high = floats(_ZERO), ints(np.int32(top))
    for i in range(n):
        value = load(room, x + i * LANES)
        largest = pick(value > largest, value, largest)
    inverse = pick(largest > floats(_ZERO), floats(top) / largest, floats(_ZERO))
    for i in range(n):
        level = nearest(inverse * load(room, x + i * LANES)) & ints(np.int32(255))
        store(room, levels + i * LANES, floats(pick(level < high, level, high)))
    return _half_bits(largest / floats(top))


@compiled
def _by_the_extreme(plan: KernelPlan, room: Floats, n: int) -> tuple[Lanes, Lanes]:
    """Write signed levels of n scales, the one with the largest magnitude at the least level.

    Returns the bits of the factor, and where all scales are treated as zero.
    """
    extreme, magnitude = largest_of(room, _SCALES, n)
    dead = magnitude < floats(plan.nothing)
    inverse = floats(-plan.scale_top) / extreme
    low, high = ints(np.int32(-plan.scale_top)), ints(np.int32(plan.scale_top - _ONE))
    for i in range(0, n * LANES, LANES):
        level = floats(between(nearest(inverse * load(room, _SCALES + i)), low, high))
        store(room, _RAW + i, pick(dead, floats(-plan.scale_up), level))
    return pick(dead, ints(np.int32(0)), _half_bits(floats(_ONE) / inverse)), dead


@compiled
def _fitted(plan: KernelPlan, room: Floats, n: int) -> Lanes:
    """Write signed levels fitted to n scales. Returns the bits of the factor."""
    factor, inverse, nothing = signed_scale(room, _SCALES, _SUMS, n, plan.scale_top, plan.scale_numerators)
    for i in range(0, n * LANES, LANES):
        level = level_of(inverse * load(room, _SCALES + i), -plan.scale_top, plan.scale_top - _ONE)
        store(room, _RAW + i, pick(nothing, floats(-plan.scale_up), level))
    return _half_bits(factor)


@compiled
def _scale(plan: KernelPlan, room: Floats) -> None:
    """Write the block's factors, the integers of its scales and minima, and the products of both."""
    n, none, top, tries = WEIGHTS // plan.n, ints(np.int32(0)), plan.scale_top, plan.scale_numerators
    minima = _RAW + n * LANES
    half, half_minimum, dead = none, none, none != none
    if plan.signed:
        if plan.fit:
            half = _fitted(plan, room, n)
        else:
            half, dead = _by_the_extreme(plan, room, n)
    elif plan.fit:
        half = _half_bits(positive_scale(room, _SCALES, _SUMS, _RAW, n, top, tries))
        half_minimum = _half_bits(positive_scale(room, _MINIMA, _SUMS, minima, n, top, tries))
    else:
        half = _by_the_largest(room, _SCALES, _RAW, n, top)
        half_minimum = _by_the_largest(room, _MINIMA, minima, n, top)
    store(room, _HALVES, floats(half))
    store(room, _HALVES + LANES, floats(half_minimum))
    for j in range(n):
        here = j * LANES
        factor = _from_half(half) * load(room, _RAW + here)
        store(room, _FACTORS + here, factor)
        offset = floats(_ZERO)
        if not plan.signed:
            offset = _from_half(half_minimum) * load(room, minima + here)
        store(room, _OFFSETS + here, offset)
        if any_lane(factor == floats(_ZERO)) and not plan.descend:
            _keep(plan, room, j, dead)


@compiled
def _keep(plan: KernelPlan, room: Floats, j: int, dead: Lanes) -> None:
    """Write the best levels of the search for a sub-block whose stored scale became zero, so that no level fits better."""
    zero, low, high, up = floats(_ZERO), _ZERO, plan.top, _ZERO
    if plan.signed:
        low, high, up = -plan.top, plan.top - _ONE, plan.top
    inverse, base = load(room, _INVERSES + j * LANES), load(room, _BASES + j * LANES)
    zeroed = dead | (load(room, _NOTHING + j * LANES) != zero)
    for i in range(j * plan.n * LANES, (j + 1) * plan.n * LANES, LANES):
        level = level_of(inverse * (load(room, _X + i) - base), low, high) + floats(up)
        store(room, _KEPT + i, pick(zeroed, zero, level))


@compiled
def _final_levels(plan: KernelPlan, room: Floats, rows: Floats, at: int, lane: int, levels: Bytes) -> None:
    """Write the levels nearest to (weight + offset) / factor, or the kept ones if the factor is zero."""
    low, high, up = np.int32(0), np.int32(plan.top), np.int32(0)
    if plan.signed:
        low, high, up = np.int32(-plan.top), np.int32(plan.top - _ONE), np.int32(plan.top)
    for j in range(WEIGHTS // plan.n):
        factor, offset = room[_FACTORS + j * LANES + lane], room[_OFFSETS + j * LANES + lane]
        for i in range(j * plan.n, (j + 1) * plan.n, LANES):
            if factor != _ZERO:
                exact = (load(rows, at + i) + floats(offset)) / floats(factor)
                store(levels, i, between(nearest(exact), ints(low), ints(high)) + ints(up))
            else:
                for k in range(i, i + LANES):
                    levels[k] = np.uint8(room[_KEPT + k * LANES + lane])


@compiled
def _pack(plan: KernelPlan, room: Floats, lane: int, levels: Bytes, out: Bytes, at: int) -> None:
    """Write one block's bytes, from `at` on."""
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
        stored = np.int64(room[_RAW + value * LANES + lane] + plan.scale_up)
        out[at + byte] |= np.uint8(((stored >> right) & mask_of) << left)
    for k, start in enumerate((plan.d_at, plan.dmin_at)):
        if start >= 0:
            half = np.int64(room[_HALVES + k * LANES + lane])
            out[at + start], out[at + start + 1] = np.uint8(half & 255), np.uint8(half >> 8)


_SIGNATURE = numba.types.void(
    numba.types.CPointer(numba.types.voidptr), numba.types.CPointer(numba.int64), numba.types.CPointer(numba.float32)
)


def _quantize_blocks(places: Any, numbers: Any, factors: Any) -> None:
    """Its arguments are those of `kernel.callable_kernel`."""
    planes = numba.carray(places[0], (numbers[9], 5), np.int64)
    fields = numba.carray(places[1], (numbers[10], 5), np.int64)
    numerators = numba.carray(places[2], numbers[11], np.float32)
    scale_numerators = numba.carray(places[3], numbers[12], np.float32)
    top, scale_top, scale_up, nothing, spread = factors[0], factors[1], factors[2], factors[3], factors[4]
    weigh_by, plain, fit, descend = numbers[3], numbers[4] != 0, numbers[5] != 0, numbers[6] != 0
    first_half = numbers[0], numbers[1], numbers[2] != 0, top, scale_top, scale_up, nothing, weigh_by, spread
    plan = KernelPlan(
        *first_half, plain, fit, descend, numbers[7], numbers[8], planes, fields, numerators, scale_numerators
    )
    n_importance, blocks_of_row, n_blocks = numbers[13], numbers[14], numbers[15]
    x = numba.carray(places[4], n_blocks * WEIGHTS, np.float32)
    importance = numba.carray(places[5], n_importance, np.float32)
    out = numba.carray(places[6], n_blocks * plan.block_bytes, np.uint8)
    room = numba.carray(places[7], ROOM, np.float32)
    levels = numba.carray(places[8], WEIGHTS, np.uint8)
    starts = numba.carray(places[9], LANES, np.int64)
    for first in range(0, n_blocks, LANES):
        _side_by_side(x, first, n_blocks, starts, room, _X)
        if n_importance:
            _side_by_side(importance, first, blocks_of_row, starts, room, _IMPORTANCE)
        _search(plan, room)
        _scale(plan, room)
        for lane in range(min(LANES, n_blocks - first)):
            _final_levels(plan, room, x, (first + lane) * WEIGHTS, lane, levels)
            _pack(plan, room, lane, levels, out, (first + lane) * plan.block_bytes)


def compile_kernel() -> bytes:
    """The object code of the kernel for this processor (`machine_code`). Raises whatever Numba raises if it cannot compile."""
    return compiled_object(_quantize_blocks, _SIGNATURE)
