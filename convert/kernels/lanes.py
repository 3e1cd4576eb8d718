"""Sixteen numbers side by side as one value in compiled code, so that a search runs for sixteen blocks at once.

A loop over an array becomes SIMD code only if the compiler sees how. A value of this type is an LLVM vector on every processor
(one register of AVX-512, two of AVX2, four of SSE or NEON). Its arithmetic is IEEE single precision, operation by operation,
so results are the same everywhere. Needs Numba; imported only to build kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .plan import LANES

_F32, _I32, _I8, _I1 = ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.IntType(1)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class LanesType(types.Type):
    """Numba's type for sixteen numbers. item: LLVM's type of one of them."""

    def __init__(self, name: str, item: Any) -> None:
        super().__init__(name=f"lanes of {name}")
        self.item = item
        self.vector = ir.VectorType(item, LANES)


FLOATS, INTS, MASK = LanesType("float32", _F32), LanesType("int32", _I32), LanesType("bool", _I1)


@register_model(LanesType)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: LanesType) -> None:
        super().__init__(manager, kind, kind.vector)


def compiled(function: _Function) -> _Function:
    """Mark a part of a kernel, which is compiled with it; Python cannot call it."""
    options = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    made: _Function = numba.njit(**options)(function)
    return made


def _operation(typed: Callable[..., Any]) -> Any:
    """A function for compiled code. typed: returns its signature, and a function that emits LLVM's instructions."""
    return intrinsic(typed)


# operator -> the builder's methods for floats, ints and masks; None if there is none.
_ARITHMETIC: dict[Any, tuple[str | None, str | None, str | None]] = {
    operator.add: ("fadd", "add", None),
    operator.sub: ("fsub", "sub", None),
    operator.mul: ("fmul", None, None),
    operator.truediv: ("fdiv", None, None),
    operator.and_: (None, "and_", "and_"),
    operator.or_: (None, "or_", "or_"),
    operator.lshift: (None, "shl", None),
    operator.rshift: (None, "lshr", None),
}
_COMPARISONS = {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}


def _define(op: Any, kind: LanesType, result: LanesType, lower: Callable[[Any, Any, Any], Any]) -> Any:
    """Let compiled code apply `op` to two values of `kind`."""

    def body(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return lower(builder, *args)

    lower_builtin(op, kind, kind)(body)
    return signature(result, kind, kind)


def _comparison(kind: LanesType, sign: str) -> Callable[[Any, Any, Any], Any]:
    if kind is INTS:
        return lambda builder, a, b: builder.icmp_signed(sign, a, b)
    compare = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
    return lambda builder, a, b: getattr(builder, compare)(sign, a, b)


def _arithmetic(method: str) -> Callable[[Any, Any, Any], Any]:
    return lambda builder, a, b: getattr(builder, method)(a, b)


for _op, _methods in _ARITHMETIC.items():
    _cases = [
        _define(_op, _kind, _kind, _arithmetic(_method))
        for _kind, _method in zip((FLOATS, INTS, MASK), _methods, strict=True)
        if _method
    ]
    infer_global(_op)(type("Lanes_" + _op.__name__, (ConcreteTemplate,), {"cases": _cases}))
for _op, _sign in _COMPARISONS.items():
    _cases = [_define(_op, _kind, MASK, _comparison(_kind, _sign)) for _kind in (FLOATS, INTS)]
    infer_global(_op)(type("Lanes_" + _op.__name__, (ConcreteTemplate,), {"cases": _cases}))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, vector: Any) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


@_operation
def load(_typing: Any, array: Any, _at: Any) -> Any:
    """(array, at): array[at : at + 16] of a contiguous array, float32 as floats, uint8 as ints. Bounds are not checked."""
    narrow = array.dtype == types.uint8
    kind = INTS if narrow else FLOATS

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(_I8, LANES) if narrow else kind.vector
        place = _pointer(context, builder, sig.args[0], args[0], args[1], vector)
        loaded = builder.load(place, align=1 if narrow else 4)
        return builder.zext(loaded, kind.vector) if narrow else loaded

    return kind(array, types.intp), lower


@_operation
def store(_typing: Any, array: Any, _at: Any, value: Any) -> Any:
    """(array, at, value): array[at : at + 16] = value, floats to float32, the low bytes of ints to uint8. Bounds are not checked."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        held, align = args[2], 4
        if value is INTS:
            held, align = builder.trunc(held, ir.VectorType(_I8, LANES)), 1
        place = _pointer(context, builder, sig.args[0], args[0], args[1], held.type)
        builder.store(held, place, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), lower


def _spread(builder: Any, item: Any, kind: LanesType) -> Any:
    first = builder.insert_element(ir.Constant(kind.vector, ir.Undefined), item, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(kind.vector, ir.Undefined), zeros)


@_operation
def floats(_typing: Any, item: Any) -> Any:
    """One number in all lanes, or sixteen ints as floats."""
    if item is INTS:
        return FLOATS(INTS), lambda _c, builder, _s, args: builder.sitofp(args[0], FLOATS.vector)
    return FLOATS(types.float32), lambda _c, builder, _s, args: _spread(builder, args[0], FLOATS)


@_operation
def ints(_typing: Any, _item: Any) -> Any:
    """One int in all lanes."""
    return INTS(types.int32), lambda _c, builder, _s, args: _spread(builder, args[0], INTS)


@_operation
def bits(_typing: Any, value: Any) -> Any:
    """The bits of floats as ints, or of ints as floats."""
    other = INTS if value is FLOATS else FLOATS
    return other(value), lambda _c, builder, _s, args: builder.bitcast(args[0], other.vector)


@_operation
def pick(_typing: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Lane by lane: `yes` if the mask is set, else `no`."""
    return yes(mask, yes, no), lambda _c, builder, _s, args: builder.select(*args)


@_operation
def any_lane(_typing: Any, mask: Any) -> Any:
    """Whether the mask is set in any lane."""

    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        together = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", together, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(mask), lower


def _unary(name: str) -> Any:
    def typed(_typing: Any, value: Any) -> Any:
        def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(FLOATS.vector, [FLOATS.vector])
            return builder.call(builder.module.declare_intrinsic(f"llvm.{name}.v{LANES}f32", (), kind), args)

        return FLOATS(value), lower

    typed.__name__ = name
    return intrinsic(typed)


absolute, root = _unary("fabs"), _unary("sqrt")


@_operation
def turn(_typing: Any, rows: Any, starts: Any, room: Any, _x: Any) -> Any:
    """(rows, starts, room, x): room[x + 16 * i + lane] = rows[starts[lane] + i], for sixteen numbers of each of sixteen rows.

    Each of four rounds interleaves the first half of the vectors with the second.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = cgutils.create_struct_proxy(sig.args[1])(context, builder, value=args[1]).data
        vectors = []
        for lane in range(LANES):
            start = builder.load(builder.gep(places, [ir.Constant(args[3].type, lane)]))
            vectors.append(
                builder.load(_pointer(context, builder, sig.args[0], args[0], start, FLOATS.vector), align=4)
            )
        half = LANES // 2
        masks = [[i // 2 + LANES * (i % 2) + half * part for i in range(LANES)] for part in range(2)]
        low, high = (ir.Constant(ir.VectorType(_I32, LANES), mask) for mask in masks)
        for _ in range(4):
            pairs = list(zip(vectors[:half], vectors[half:], strict=True))
            vectors = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in (low, high)]
        for i, vector in enumerate(vectors):
            at = builder.add(args[3], ir.Constant(args[3].type, i * LANES))
            builder.store(vector, _pointer(context, builder, sig.args[2], args[2], at, FLOATS.vector), align=4)
        return context.get_dummy_value()

    return types.void(rows, starts, room, types.intp), lower
