"""Quantized values as float32: tables of whole bytes, packed integers, and rounding to the type that a library computes in.

Integers of up to 8 bits and 8-bit floats are exact in float32, and so is the product of one with a scale in half precision. So
one rounding of a float32 product is what a library gets that multiplies in half precision itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..stored import RowsOf, Tensor, made_tensor, to_float32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_PAIRS = 1 << 16
_SUBNORMAL = np.float32(2.0**-14)  # below it, the steps of half precision are 2^-24
_STEPS = np.float32(0.75)  # numbers near it have steps of 2^-24 in float32
_LARGEST_HALF = np.float32(65520.0)  # rounded to infinity from here on


@functools.cache
def e4m3_values() -> Floats:
    """The 256 values of float8_e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity, one NaN of each sign."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


def e8m0_values() -> Floats:
    """The 256 values of float8_e8m0fnu: powers of two; the last is NaN."""
    values = 2.0 ** (np.arange(256) - 127.0)
    values[255] = np.nan
    return values.astype(np.float32)


@functools.cache
def _of_pairs(values: bytes) -> npt.NDArray[np.uint64]:
    """The values of two bytes at once, which halves the time of looking them up."""
    one = np.frombuffer(values, np.float32)
    low, high = np.meshgrid(one, one)
    return np.stack((low, high), axis=-1).reshape(_PAIRS, 2).view(np.uint64).reshape(-1)


def by_byte(table: Floats, codes: Bytes) -> Floats:
    """table[codes] for a table of 256 values, shape of `codes`."""
    codes = np.ascontiguousarray(codes)
    out = np.empty(codes.shape, np.float32)
    if codes.size % 2:
        np.take(table, codes, out=out, mode="clip")
        return out
    pairs = codes.reshape(-1).view("<u2")
    np.take(_of_pairs(table.tobytes()), pairs, out=out.reshape(-1).view(np.uint64), mode="clip")
    return out


@functools.cache
def _inside_bytes(values: bytes, bits: int, high_first: bool) -> npt.NDArray[Any]:
    """For each byte the values of the codes of `bits` bits in it, as one number of their size."""
    table = np.frombuffer(values, np.float32)
    shifts = np.arange(0, 8, bits)
    codes = (np.arange(256)[:, None] >> (shifts[::-1] if high_first else shifts)) & ((1 << bits) - 1)
    items: npt.NDArray[Any] = table[codes].view(np.uint64 if bits == 4 else np.complex128)
    return items.reshape(-1)


def by_code(table: Floats, packed: Bytes, bits: int, high_first: bool = False) -> Floats:
    """The values of codes of 2 or 4 bits in flat bytes, flat. high_first: the upper bits of a byte come first."""
    items = _inside_bytes(table.tobytes(), bits, high_first)
    values: Floats = np.take(items, packed, mode="clip").view(np.float32)
    return values


def unpacked(words: npt.NDArray[np.uint32], bits: int, columns: int) -> Floats:
    """Unsigned integers of `bits` bits that lie one after another from the lowest bit of a row's first word on.

    words: (rows, words). Returns (rows, columns).
    """
    rows = len(words)
    if bits in (2, 4):
        packed = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(-1)
        return by_code(np.arange(1 << bits, dtype=np.float32), packed, bits).reshape(rows, -1)[:, :columns]
    if bits == 8:
        return np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(rows, -1)[:, :columns].astype(np.float32)
    groups = -(-columns // 32)
    padded = np.zeros((rows, groups * bits + 1), np.uint64)
    n = min(words.shape[1], groups * bits)
    padded[:, :n] = words[:, :n]
    out = np.empty((rows, groups, 32), np.float32)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        both = padded[:, word : groups * bits : bits] | padded[:, word + 1 :: bits][:, :groups] << np.uint64(32)
        out[:, :, lane] = (both >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
    return out.reshape(rows, -1)[:, :columns]


def rounded(values: Floats, dtype: str) -> Floats:
    """float32 rounded in place to what F32, F16 or BF16 can hold: to the nearest, of two to the even one."""
    if dtype == "F32":
        return values
    drop = 16 if dtype == "BF16" else 13
    sizes = np.abs(values) if dtype == "F16" else np.empty(0, np.float32)
    small, large = sizes < _SUBNORMAL, sizes >= _LARGEST_HALF
    tiny = values[small] if small.any() else sizes[:0]
    bits = values.view(np.uint32)
    odd = bits >> drop
    odd &= 1
    bits += odd
    bits += np.uint32((1 << (drop - 1)) - 1)
    bits &= np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)
    if tiny.size:
        steps = np.copysign(_STEPS, tiny)
        values[small] = np.copysign((tiny + steps) - steps, tiny)
    if large.any():
        values[large] = np.copysign(np.float32(np.inf), values[large])
    return values


def as_float32(raw: npt.NDArray[Any], dtype: str) -> Floats:
    """Scales or zero points of any type as float32; U8 are powers of two (E8M0)."""
    if dtype == "F8_E4M3":
        return e4m3_values()[raw.view(np.uint8)]
    if dtype in ("F8_E8M0", "U8"):
        return e8m0_values()[raw.view(np.uint8)]
    return to_float32(raw, dtype)


def dequantized_tensor(name: str, shape: Sequence[int], rows: RowsOf) -> Tensor:
    """A tensor of float32 whose rows, counted over all matrices, are made by rows(start, stop) when they are read."""
    return made_tensor(name, shape, int(shape[-1]), rows)
