"""The rows of a KV cache as vectors of float32, type by type (ggml-common.h: block_q8_0 and its like; ggml-quants.c)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from yarn_edge.attention.vectors import BYTES, F16, FLOATS, HALVES, I32, INTS, SHORTS, WIDTH, Emitter, number

_BLOCK = 32  # floats of a quantized block


@dataclass(frozen=True)
class CacheType:
    """How a type is read. number: in enum ggml_type; floats, size: of a block, size in bytes; read: one block's vectors.

    ggml_bytes: of what ggml calls a block, which is one float if it is not quantized.
    """

    number: int
    floats: int
    size: int
    read: Callable[[Emitter, Any], list[Any]]

    @property
    def ggml_bytes(self) -> int:
        return self.size if self.quantized else self.size // self.floats

    @property
    def quantized(self) -> bool:
        """Whether a block has a scale."""
        return self.floats == _BLOCK

    def row_bytes(self, length: int) -> int:
        """Bytes of `length` floats."""
        return length // self.floats * self.size

    def row(self, emit: Emitter, address: Any, length: int) -> list[Any]:
        """The length / WIDTH vectors of the row at `address`; length: a multiple of `floats`."""
        return self.part(emit, address, 0, length // WIDTH)

    def part(self, emit: Emitter, address: Any, first: int, count: int) -> list[Any]:
        """`count` vectors of the row at `address`, from the vector `first` on."""
        each, vectors = self.floats // WIDTH, []
        for block in range(first // each, -(-(first + count) // each)):
            at = emit.builder.add(address, number(block * self.size)) if block else address
            vectors += self.read(emit, at)  # what is not used is not read: LLVM removes it
        skipped = first - first // each * each
        return vectors[skipped : skipped + count]


def _f16(emit: Emitter, address: Any) -> list[Any]:
    return [emit.halves(address, offset) for offset in range(0, 32, 2 * WIDTH)]


def _f32(emit: Emitter, address: Any) -> list[Any]:
    return [emit.floats(address, offset) for offset in range(0, 64, 4 * WIDTH)]


def _bf16(emit: Emitter, address: Any) -> list[Any]:
    b, high = emit.builder, ir.Constant(INTS, [16] * WIDTH)
    parts = [b.zext(emit.load(address, SHORTS, offset, 2), INTS) for offset in range(0, 32, 2 * WIDTH)]
    return [b.bitcast(b.shl(part, high), FLOATS) for part in parts]


def _scale(emit: Emitter, address: Any, offset: int = 0) -> Any:
    b, empty = emit.builder, ir.Constant(HALVES, ir.Undefined)
    first = b.insert_element(empty, emit.load(address, F16, offset), ir.Constant(I32, 0))
    return b.fpext(b.shuffle_vector(first, empty, ir.Constant(INTS, [0] * WIDTH)), FLOATS)  # widened after it is spread


def _q8_0(emit: Emitter, address: Any) -> list[Any]:
    b, scale = emit.builder, _scale(emit, address)
    parts = [b.sext(emit.load(address, BYTES, 2 + offset), INTS) for offset in range(0, _BLOCK, WIDTH)]
    return [b.fmul(scale, b.sitofp(part, FLOATS)) for part in parts]


def _nibbles(emit: Emitter, address: Any, fifth: int | None, nibbles: int) -> list[Any]:
    """The block's 32 levels. fifth: offset of their fifth bits, if there are any; nibbles: of the other four."""
    b, parts = emit.builder, []
    bits = None if fifth is None else emit.load(address, I32, fifth)
    for first in (0, 16):
        for offset in range(0, 16, WIDTH):
            part = b.zext(emit.load(address, BYTES, nibbles + offset), INTS)
            level = b.lshr(part, _ints(4)) if first else b.and_(part, _ints(15))
            if bits is not None:
                places = ir.Constant(INTS, [first + offset + i for i in range(WIDTH)])
                one = b.and_(b.lshr(_same(emit, bits), places), _ints(1))
                level = b.or_(level, b.shl(one, _ints(4)))
            parts.append(level)
    return parts


def _ints(value: int) -> Any:
    return ir.Constant(INTS, [value] * WIDTH)


def _same(emit: Emitter, value: Any) -> Any:
    empty = ir.Constant(INTS, ir.Undefined)
    first = emit.builder.insert_element(empty, value, ir.Constant(I32, 0))
    return emit.builder.shuffle_vector(first, empty, _ints(0))


def _centred(fifth: int | None, nibbles: int, middle: int) -> Callable[[Emitter, Any], list[Any]]:
    """scale x (level - middle)."""

    def read(emit: Emitter, address: Any) -> list[Any]:
        b, scale, levels = emit.builder, _scale(emit, address), _nibbles(emit, address, fifth, nibbles)
        return [b.fmul(scale, b.sitofp(b.sub(level, _ints(middle)), FLOATS)) for level in levels]

    return read


def _from_minimum(fifth: int | None, nibbles: int) -> Callable[[Emitter, Any], list[Any]]:
    """scale x level + minimum."""

    def read(emit: Emitter, address: Any) -> list[Any]:
        b, scale, minimum = emit.builder, _scale(emit, address), _scale(emit, address, 2)
        levels = _nibbles(emit, address, fifth, nibbles)
        return [emit.fused(scale, b.sitofp(level, FLOATS), minimum) for level in levels]

    return read


PLAIN_FLOATS = CacheType(0, 16, 64, _f32)  # of a buffer
# llama.cpp's flash attention casts a cache of type f32 to f16 before it gets here (llama-graph.cpp, build_attn_mha).
CACHE_TYPES = {
    "f16": CacheType(1, 16, 32, _f16),
    "bf16": CacheType(30, 16, 32, _bf16),
    "q8_0": CacheType(8, _BLOCK, 34, _q8_0),
    "q5_1": CacheType(7, _BLOCK, 24, _from_minimum(4, 8)),
    "q5_0": CacheType(6, _BLOCK, 22, _centred(2, 6, 16)),
    "q4_1": CacheType(3, _BLOCK, 20, _from_minimum(None, 4)),
    "q4_0": CacheType(2, _BLOCK, 18, _centred(None, 2, 8)),
}
