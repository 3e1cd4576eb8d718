"""Vectors of float32 as wide as this processor's registers, at plain addresses: the instructions of the attention kernels.

Numba's own vectorization leaves half of the speed, and a loop over an array hides what is kept in registers. So each operation
of the kernels emits its LLVM instructions here; LLVM makes AVX-512, AVX2 or NEON of them. All arithmetic is float32, in the order
that is written. Addresses are int64, never unsigned: Numba adds an int64 and a uint64 as float64.
"""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

F32, F16, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.HalfType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)


_OLD = ("generic", "x86-64", "x86-64-v2", "nehalem", "westmere", "sandybridge", "ivybridge")  # without AVX2


def vector_width() -> int:
    """Floats in one register of this processor; 0 if it cannot convert half precision or fuse a product and a sum.

    YARN_EDGE_VECTOR_WIDTH (4, 8 or 16) overrides it, to try the code of other processors; narrower vectors run everywhere.
    """
    wanted = os.environ.get("YARN_EDGE_VECTOR_WIDTH")
    if wanted in ("4", "8", "16"):
        return int(wanted)
    if platform.machine().lower() in ("aarch64", "arm64"):
        return 4
    if numba.config.CPU_NAME:  # another processor than this one, as where a cache is shared
        given = numba.config.CPU_FEATURES or ""
        if numba.config.CPU_NAME in _OLD and not ("f16c" in given and "fma" in given):
            return 0
        return 16 if "avx512f" in given else 8
    features = llvmlite.binding.get_host_cpu_features()
    if not all(features.get(name, False) for name in ("avx2", "fma", "f16c")):
        return 0
    return 16 if features.get("avx512f", False) else 8


WIDTH = vector_width() or 8
# Registers that hold one block of sums: rows x vectors. AVX-512 and NEON have 32 of them, AVX2 has 16.
BLOCK_ROWS, BLOCK_VECTORS = 6, 2 if WIDTH == 8 else 4

FLOATS, HALVES = ir.VectorType(F32, WIDTH), ir.VectorType(F16, WIDTH)
BYTES, SHORTS, INTS = ir.VectorType(I8, WIDTH), ir.VectorType(I16, WIDTH), ir.VectorType(I32, WIDTH)

# exp(r) on |r| <= ln(2) / 2 and ln(2) in two parts: Cephes, expf (S. Moshier), error below 2 ulp.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2_E, _LN2_HIGH, _LN2_LOW, _LEAST_EXPONENT = 1.44269504, 0.693359375, -2.12194440e-4, -87.0


def number(value: int) -> Any:
    """An int64 constant."""
    return ir.Constant(I64, value)


def constant(value: float) -> Any:
    """A vector whose floats are all `value`, rounded to float32."""
    return ir.Constant(FLOATS, [value] * WIDTH)


class Emitter:
    """Emits instructions into the function that Numba is compiling. Offsets are in bytes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, address: Any, kind: Any, offset: int = 0, align: int = 1) -> Any:
        """A value of an LLVM type from memory."""
        return self.builder.load(self._pointer(address, offset, kind), align=align)

    def store(self, value: Any, address: Any, offset: int = 0, align: int = 1) -> None:
        """Write a value to memory."""
        self.builder.store(value, self._pointer(address, offset, value.type), align=align)

    def _pointer(self, address: Any, offset: int, kind: Any) -> Any:
        at = self.builder.add(address, number(offset)) if offset else address
        return self.builder.inttoptr(at, kind.as_pointer())

    def floats(self, address: Any, offset: int = 0) -> Any:
        """A vector of float32 from memory."""
        return self.load(address, FLOATS, offset, 4)

    def halves(self, address: Any, offset: int = 0) -> Any:
        """A vector of half precision from memory, as float32."""
        return self.builder.fpext(self.load(address, HALVES, offset, 2), FLOATS)

    def put(self, vector: Any, address: Any, offset: int = 0) -> None:
        """Write a vector of float32."""
        self.store(vector, address, offset, 4)

    def everywhere(self, scalar: Any) -> Any:
        """A vector whose floats are all `scalar`."""
        empty = ir.Constant(FLOATS, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, empty, ir.Constant(INTS, [0] * WIDTH))

    def everywhere_from(self, address: Any, offset: int = 0) -> Any:
        """A vector whose floats are all the one in memory."""
        return self.everywhere(self.load(address, F32, offset, 4))

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.v{WIDTH}f32", FLOATS, a, b, c)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Call one of LLVM's own functions."""
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of two vectors, float by float; `b` where `a` is not a number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def add(self, a: Any, b: Any) -> Any:
        """a + b."""
        return self.builder.fadd(a, b)

    def pick(self, a: Any, b: Any, places: Sequence[int]) -> Any:
        """The floats of two vectors at these places: 0 to WIDTH - 1 in a, the next WIDTH in b."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(places)), list(places)))

    def fold(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """One float of a vector's: halves are combined until one is left."""
        half = WIDTH
        while half > 1:
            half //= 2
            vector = combine(vector, self.pick(vector, vector, [(i + half) % WIDTH for i in range(WIDTH)]))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def sums(self, vectors: list[Any]) -> Any:
        """The sums of WIDTH vectors, as one vector: each is added up as `fold` does it.

        Each step keeps one half of every vector where it is, a blend, and only moves the other.
        """
        half = WIDTH
        while len(vectors) > 1:
            half //= 2
            place = range(WIDTH)
            stays = [i if i // half % 2 == 0 else WIDTH + i for i in place]
            moves = [i + half if i // half % 2 == 0 else WIDTH + i - half for i in place]
            count = len(vectors) // 2
            vectors = [
                self.add(self.pick(a, b, stays), self.pick(a, b, moves))
                for a, b in zip(vectors[:count], vectors[count:], strict=True)
            ]
        return vectors[0]

    def transposed(self, vectors: list[Any]) -> list[Any]:
        """WIDTH vectors as the rows of a square: its columns."""
        low = [place for i in range(WIDTH // 2) for place in (i, WIDTH + i)]
        high = [place + WIDTH // 2 for place in low]
        steps, count = WIDTH.bit_length() - 1, WIDTH // 2
        for _ in range(steps):
            pairs = zip(vectors[:count], vectors[count:], strict=True)
            vectors = [self.pick(a, b, places) for a, b in pairs for places in (low, high)]
        return vectors

    def exp(self, x: Any) -> Any:
        """e to the power of each float: 0 below e^-87, where float32 would be subnormal. x must not be above 88; NaN stays NaN."""
        b, least = self.builder, constant(_LEAST_EXPONENT)
        bounded = self.larger(x, least)
        power = self.call(f"llvm.nearbyint.v{WIDTH}f32", FLOATS, b.fmul(bounded, constant(_LOG2_E)))
        rest = self.fused(power, constant(-_LN2_HIGH), bounded)
        rest = self.fused(power, constant(-_LN2_LOW), rest)
        value = constant(_EXP[0])
        for coefficient in _EXP[1:]:
            value = self.fused(value, rest, constant(coefficient))
        value = self.fused(value, b.fmul(rest, rest), b.fadd(rest, constant(1.0)))
        exponent = b.shl(b.fptosi(power, INTS), ir.Constant(INTS, [23] * WIDTH))
        value = b.bitcast(b.add(b.bitcast(value, INTS), exponent), FLOATS)
        value = b.select(b.fcmp_ordered("<", x, least), constant(0.0), value)
        return b.select(b.fcmp_unordered("uno", x, x), x, value)

    def registers(self, count: int, kind: Any = FLOATS) -> list[Any]:
        """Variables for vectors, which LLVM keeps in registers."""
        return [cgutils.alloca_once(self.builder, kind) for _ in range(count)]

    def repeat(self, times: Any) -> Any:
        """`with repeat(n) as loop`: what is emitted inside runs n times; loop.index counts from 0."""
        return cgutils.for_range(self.builder, number(times) if isinstance(times, int) else times)

    def step(self, address: Any, index: Any, stride: int) -> Any:
        """address + index * stride."""
        return self.builder.add(address, self.builder.mul(index, number(stride)))

    def times(self, value: Any, factor: int) -> Any:
        """value * factor, of int64."""
        return self.builder.mul(value, number(factor))

    def fetch(self, address: Any, offset: int = 0) -> None:
        """Ask the memory for the line there, which is read soon. Any address will do: a wrong one is ignored."""
        pointer = self._pointer(address, offset, I8)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        read, keep_near, data = ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)
        self.builder.call(function, [pointer, read, keep_near, data])


# Functions of 1, 2, … arguments for Numba, which looks at their parameters; `made` is their signature and what emits them.
_TAKING: tuple[Callable[[Any], Callable[..., Any]], ...] = (
    lambda made: lambda _typing, _a: made,
    lambda made: lambda _typing, _a, _b: made,
    lambda made: lambda _typing, _a, _b, _c: made,
    lambda made: lambda _typing, _a, _b, _c, _d: made,
    lambda made: lambda _typing, _a, _b, _c, _d, _e: made,
)


def operation(body: Callable[..., Any], result: Any = types.int64, floats: Sequence[int] = ()) -> Any:
    """A function for compiled code. body: (Emitter, *arguments) emits its instructions and returns its value, or None.

    Arguments are int64, those at the places `floats` float32.
    """
    count = len(inspect.signature(body).parameters) - 1
    signature = result(*(types.float32 if i in floats else types.int64 for i in range(count)))

    def lower(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        value = body(Emitter(builder), *values)
        return number(0) if value is None else value

    return intrinsic(_TAKING[count - 1]((signature, lower)))


read_i64 = operation(lambda e, address: e.load(address, I64))
read_i32 = operation(lambda e, address: e.builder.sext(e.load(address, I32), I64))
read_f32 = operation(lambda e, address: e.load(address, F32), types.float32)
write_i64 = operation(lambda e, address, value: e.store(value, address))
write_i32 = operation(lambda e, address, value: e.store(e.builder.trunc(value, I32), address))
write_f32 = operation(lambda e, address, value: e.store(value, address), floats=(1,))
take_next = operation(lambda e, address: e.builder.atomic_rmw("add", e._pointer(address, 0, I64), number(1), "acq_rel"))
exponential = operation(
    lambda e, x: e.builder.extract_element(e.exp(e.everywhere(x)), ir.Constant(I32, 0)), types.float32, floats=(0,)
)
