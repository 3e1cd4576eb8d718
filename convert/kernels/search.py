"""The searches of the K-quants, for sixteen blocks at once: which scale and minimum give a sub-block the least weighted error.

The candidates, the weights and the order of all sums are those of ggml's make_qkx2_quants, make_qkx3_quants, make_qx_quants,
make_q3_quants and make_qp_quants (ggml-quants.c). The results are bit-identical if ggml was compiled without fused
multiply-adds (its x86 builds). All values are in one flat float32 array, `room`, with 16 lanes side by side: value i of the
values at x is room[x + 16 * i : x + 16 * i + 16].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .lanes import absolute, any_lane, bits, compiled, floats, ints, load, pick, root, store
from .plan import ABSOLUTE, AVERAGE_AND_ABSOLUTE, IMPORTANCE_AND_SPREAD, LANES, NOTHING, SQUARE

_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds a number to an integer, ties to even
_MANTISSA, _ROUND_BITS = np.int32(0x7FFFFF), np.int32(0x400000)
_ZERO, _ONE = np.float32(0), np.float32(1)
_INFINITY = np.float32(np.inf)
_PASSES = 5
Lanes = Any  # sixteen floats, ints or booleans; mypy cannot see into compiled code
Floats = Any  # a flat float32 array
Place = Any  # an index into it


@compiled
def nearest(value: Lanes) -> Lanes:
    """The nearest ints; for values beyond 2**22 the same wrong results as ggml's nearest_int."""
    return (bits(value + floats(_ROUND)) & ints(_MANTISSA)) - ints(_ROUND_BITS)


@compiled
def between(value: Lanes, low: Lanes, high: Lanes) -> Lanes:
    """The value, clamped. The order of the comparisons turns NaN into `low`."""
    value = pick(value > low, value, low)
    return pick(value < high, value, high)


@compiled
def level_of(value: Lanes, low: np.float32, high: np.float32) -> Lanes:
    """The nearest level, as floats, for values well within 2**22."""
    rounded = between(value + floats(_ROUND), floats(_ROUND + low), floats(_ROUND + high))
    return rounded - floats(_ROUND)


@compiled
def sum_of_squares(room: Floats, x: Place, n: int) -> Lanes:
    """The sum of the squares of the n values at x."""
    squares = floats(_ZERO)
    for i in range(n):
        value = load(room, x + i * LANES)
        squares = squares + value * value
    return squares


@compiled
def total(room: Floats, x: Place, n: int) -> Lanes:
    """The sum of the n values at x."""
    values = floats(_ZERO)
    for i in range(n):
        values = values + load(room, x + i * LANES)
    return values


@compiled
def weigh(kind: int, room: Floats, x: Place, importance: Place, w: Place, n: int, spread: Lanes) -> None:
    """Write the error weights of the n values at x to w. spread: the block's, for IMPORTANCE_AND_SPREAD."""
    average = floats(_ZERO)
    if kind == AVERAGE_AND_ABSOLUTE:
        average = root(sum_of_squares(room, x, n) / floats(np.float32(n)))
    for i in range(0, n * LANES, LANES):
        value = load(room, x + i)
        if kind == ABSOLUTE:
            weight = absolute(value)
        elif kind == AVERAGE_AND_ABSOLUTE:
            weight = average + absolute(value)
        elif kind == SQUARE:
            weight = value * value
        else:
            weight = load(room, importance + i)
            if kind == IMPORTANCE_AND_SPREAD:
                weight = weight * root(spread + value * value)
        store(room, w + i, weight)


@compiled
def _error(room: Floats, x: Place, w: Place, levels: Place, n: int, scale: Lanes, least: Lanes, plain: bool) -> Lanes:
    """The weighted sum of the errors of scale * level + least, absolute (plain) or squared."""
    error = floats(_ZERO)
    for i in range(0, n * LANES, LANES):
        off = scale * load(room, levels + i) + least - load(room, x + i)
        if plain:
            off = absolute(off)
        else:
            off = off * off
        error = error + load(room, w + i) * off
    return error


@compiled
def scale_and_minimum(
    room: Floats, x: Place, w: Place, levels: Place, n: int, top: np.float32, numerators: Floats, plain: bool
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """For levels 0 to top: (scale, minimum, inverse scale and base of the best levels).

    numerators: each, divided by the range of the values, is an inverse scale to try. levels: scratch space for n values. Follows
    ggml's make_qkx2_quants and make_qkx3_quants.
    """
    least = load(room, x)
    largest = least
    weights = load(room, w)
    weighted_x = weights * least
    for i in range(LANES, n * LANES, LANES):
        value, weight = load(room, x + i), load(room, w + i)
        least = pick(value < least, value, least)
        largest = pick(value > largest, value, largest)
        weights = weights + weight
        weighted_x = weighted_x + weight * value
    zero, one = floats(_ZERO), floats(_ONE)
    least = pick(least > zero, zero, least)
    flat, flat_least = largest <= least, least
    inverse = floats(top) / (largest - least)
    scale = one / inverse
    inverse = pick(inverse < floats(_INFINITY), inverse, zero)  # the range is too small to invert: levels are zero
    best_inverse, base = inverse, least
    for i in range(0, n * LANES, LANES):
        store(room, levels + i, level_of(inverse * (load(room, x + i) - least), _ZERO, top))
    best_error = _error(room, x, w, levels, n, scale, least, plain)
    for k in range(numerators.size):
        inverse = floats(numerators[k]) / (largest - least)
        sum_l, sum_ll, sum_xl = zero, zero, zero
        for i in range(0, n * LANES, LANES):
            value, weight = load(room, x + i), load(room, w + i)
            level = level_of(inverse * (value - least), _ZERO, top)
            store(room, levels + i, level)
            weighted = weight * level
            sum_l = sum_l + weighted
            sum_ll = sum_ll + weighted * level
            sum_xl = sum_xl + weighted * value
        determinant = weights * sum_ll - sum_l * sum_l
        new_scale = (weights * sum_xl - weighted_x * sum_l) / determinant
        new_least = (sum_ll * weighted_x - sum_l * sum_xl) / determinant
        positive = new_least > zero
        new_least = pick(positive, zero, new_least)
        new_scale = pick(positive, sum_xl / sum_ll, new_scale)
        error = _error(room, x, w, levels, n, new_scale, new_least, plain)
        better = (determinant > zero) & (error < best_error)
        best_error = pick(better, error, best_error)
        best_inverse, base = pick(better, inverse, best_inverse), pick(better, least, base)
        scale, least = pick(better, new_scale, scale), pick(better, new_least, least)
    minimum = zero - pick(flat, flat_least, least)
    return pick(flat, zero, scale), minimum, pick(flat, zero, best_inverse), base


@compiled
def largest_of(room: Floats, x: Place, n: int) -> tuple[Lanes, Lanes]:
    """(the value with the largest magnitude, the first if there are several; that magnitude)."""
    extreme, magnitude = floats(_ZERO), floats(_ZERO)
    for i in range(n):
        value = load(room, x + i * LANES)
        larger = absolute(value) > magnitude
        extreme, magnitude = pick(larger, value, extreme), pick(larger, absolute(value), magnitude)
    return extreme, magnitude


@compiled
def _products(room: Floats, x: Place, w: Place, n: int, inverse: Lanes, top: np.float32) -> tuple[Lanes, Lanes]:
    """Weighted sums of value * level and of level * level, for levels -top to top - 1."""
    sum_xl, sum_ll = floats(_ZERO), floats(_ZERO)
    for i in range(0, n * LANES, LANES):
        value, weight = load(room, x + i), load(room, w + i)
        level = level_of(inverse * value, -top, top - _ONE)
        sum_xl = sum_xl + weight * value * level
        sum_ll = sum_ll + weight * level * level
    return sum_xl, sum_ll


@compiled
def signed_scale(
    room: Floats, x: Place, w: Place, n: int, top: np.float32, numerators: Floats
) -> tuple[Lanes, Lanes, Lanes]:
    """For levels -top to top - 1: (scale, inverse scale of the best levels, where all values are treated as zero).

    numerators: each, divided by the value with the largest magnitude, is an inverse scale to try. Follows ggml's
    make_qx_quants.
    """
    zero = floats(_ZERO)
    extreme, magnitude = largest_of(room, x, n)
    nothing = magnitude < floats(NOTHING)
    extreme = pick(nothing, floats(_ONE), extreme)
    scale, best, best_inverse = zero, zero, zero
    for k in range(numerators.size):
        inverse = floats(numerators[k]) / extreme
        sum_xl, sum_ll = _products(room, x, w, n, inverse, top)
        fitted = pick(sum_ll != zero, sum_xl / sum_ll, zero)
        if k == 0:
            scale, best, best_inverse = fitted, fitted * sum_xl, inverse
        else:
            better = (sum_ll > zero) & (sum_xl * sum_xl > best * sum_ll)
            scale, best = pick(better, fitted, scale), pick(better, fitted * sum_xl, best)
            best_inverse = pick(better, inverse, best_inverse)
    return pick(nothing, zero, scale), best_inverse, nothing


@compiled
def _descend(
    room: Floats, x: Place, w: Place, levels: Place, n: int, low: np.int32, high: np.int32, sums: tuple[Lanes, Lanes]
) -> Lanes:
    """Move each level in turn to where the error is least, given all others. Returns the scale that fits the levels.

    sums: `_products` for the current levels. Follows the second halves of make_q3_quants and make_qp_quants.
    """
    zero = floats(_ZERO)
    sum_xl, sum_ll = sums
    for _ in range(_PASSES):
        changed = zero > zero
        for i in range(0, n * LANES, LANES):
            value, weight, level = load(room, x + i), load(room, w + i), load(room, levels + i)
            xl = sum_xl - weight * value * level
            ll = sum_ll - weight * level * level
            movable = xl > zero
            new = floats(between(nearest(value * ll / xl), ints(low), ints(high)))
            xl = xl + weight * value * new
            ll = ll + weight * new * new
            better = movable & (new != level) & (ll > zero) & (xl * xl * sum_ll > sum_xl * sum_xl * ll)
            store(room, levels + i, pick(better, new, level))
            sum_xl, sum_ll = pick(better, xl, sum_xl), pick(better, ll, sum_ll)
            changed = changed | better
        if not any_lane(changed):
            break
    return pick(sum_ll > zero, sum_xl / sum_ll, zero)


@compiled
def descended_scale(room: Floats, x: Place, w: Place, levels: Place, n: int, top: np.float32) -> Lanes:
    """Write levels 0 to 2 * top - 1 (top stands for zero) to `levels`. Returns the scale. Follows ggml's make_q3_quants."""
    zero = floats(_ZERO)
    extreme, magnitude = largest_of(room, x, n)
    nothing = magnitude < floats(NOTHING)
    inverse = floats(-top) / pick(nothing, floats(_ONE), extreme)
    for i in range(0, n * LANES, LANES):
        store(room, levels + i, level_of(inverse * load(room, x + i), -top, top - _ONE))
    sums = _products(room, x, w, n, inverse, top)
    scale = _descend(room, x, w, levels, n, np.int32(-top), np.int32(top - _ONE), sums)
    for i in range(0, n * LANES, LANES):
        store(room, levels + i, pick(nothing, zero, load(room, levels + i) + floats(top)))
    return pick(nothing, zero, scale)


@compiled
def positive_scale(
    room: Floats, x: Place, w: Place, levels: Place, n: int, top: np.float32, numerators: Floats
) -> Lanes:
    """Write levels 0 to top of non-negative values to `levels`. Returns the scale. Follows ggml's make_qp_quants."""
    zero, one = floats(_ZERO), floats(_ONE)
    largest = zero
    for i in range(0, n * LANES, LANES):
        value = load(room, x + i)
        largest = pick(largest > value, largest, value)
    nothing = largest < floats(NOTHING)
    largest = pick(nothing, one, largest)
    best_inverse, best_error = zero, floats(_INFINITY)
    for k in range(numerators.size):
        inverse = floats(numerators[k]) / largest
        scale, error = one / inverse, zero
        for i in range(0, n * LANES, LANES):
            value = load(room, x + i)
            off = value - scale * level_of(inverse * value, _ZERO, top)
            error = error + load(room, w + i) * off * off
        better = error < best_error
        if k == 0:
            better = zero == zero
        best_inverse, best_error = pick(better, inverse, best_inverse), pick(better, error, best_error)
    sum_xl, sum_ll = zero, zero
    for i in range(0, n * LANES, LANES):
        value, weight = load(room, x + i), load(room, w + i)
        level = level_of(best_inverse * value, _ZERO, top)
        store(room, levels + i, level)
        sum_xl = sum_xl + weight * value * level
        sum_ll = sum_ll + weight * level * level
    scale = _descend(room, x, w, levels, n, np.int32(0), np.int32(top), (sum_xl, sum_ll))
    for i in range(0, n * LANES, LANES):
        store(room, levels + i, pick(nothing, zero, load(room, levels + i)))
    return pick(nothing, zero, scale)
