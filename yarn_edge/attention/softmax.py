"""The softmax of a tile's scores, and what the mask says of a tile."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from yarn_edge.attention.vectors import I16, I64, WIDTH, Emitter, number, operation
from yarn_edge.attention.work import TILE

SOME_BIAS, SOME_SEEN = 1, 2  # bits of `mask_of`
_MINUS_INFINITY = -1024  # half precision, as an int16
_SHORTS = 32  # of one vector
_VECTOR, _HALF_VECTOR = 4 * WIDTH, 2 * WIDTH
_OFFSETS = range(0, 4 * TILE, _VECTOR)


def _largest(emit: Emitter, scores: Any) -> Any:
    found = emit.floats(scores)
    for offset in _OFFSETS[1:]:
        found = emit.larger(found, emit.floats(scores, offset))
    return emit.fold(found, emit.larger)


def _exponentials(emit: Emitter, scores: Any, largest: Any) -> Any:
    from_each, total = emit.everywhere(largest), None
    for offset in _OFFSETS:
        value = emit.exp(emit.builder.fsub(emit.floats(scores, offset), from_each))
        emit.put(value, scores, offset)
        total = value if total is None else emit.add(total, value)
    return emit.fold(total, emit.add)


def _add_mask(emit: Emitter, scores: Any, mask: Any) -> None:
    for i, offset in enumerate(_OFFSETS):
        emit.put(emit.add(emit.floats(scores, offset), emit.halves(mask, _HALF_VECTOR * i)), scores, offset)


def _mask_of(emit: Emitter, mask: Any, rows: Any, stride: Any) -> Any:
    kind, whole = ir.VectorType(I16, _SHORTS), ir.IntType(16 * _SHORTS)
    b, nothing = emit.builder, ir.Constant(ir.VectorType(I16, _SHORTS), [0] * _SHORTS)
    hidden = ir.Constant(kind, [_MINUS_INFINITY] * _SHORTS)
    bias, seen = emit.registers(2, kind)
    b.store(nothing, bias)
    b.store(nothing, seen)
    with emit.repeat(rows) as loop:
        row = b.add(mask, b.mul(loop.index, stride))
        for offset in range(0, 2 * TILE, 2 * _SHORTS):
            part = emit.load(row, kind, offset, 2)
            b.store(b.or_(b.load(bias), part), bias)
            b.store(b.or_(b.load(seen), b.xor(part, hidden)), seen)
    bits = [b.icmp_unsigned("!=", b.bitcast(b.load(kept), whole), ir.Constant(whole, 0)) for kept in (bias, seen)]
    return b.or_(b.zext(bits[0], I64), b.shl(b.zext(bits[1], I64), number(1)))


largest_of = operation(_largest, types.float32)
largest_of.__doc__ = "(scores): the largest of a tile's scores in one row."
exponentials = operation(_exponentials, types.float32, floats=(1,))
exponentials.__doc__ = "(scores, largest): replaces the scores by e^(score - largest), and returns their sum."
add_mask = operation(_add_mask)
add_mask.__doc__ = "(scores, mask): adds the mask, in half precision."
mask_of = operation(_mask_of)
mask_of.__doc__ = (
    "(mask, rows, stride): SOME_BIAS if a value of the tile is not 0, SOME_SEEN if one is not minus infinity."
)
