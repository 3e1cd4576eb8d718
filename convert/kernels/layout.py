"""The K-quants' format as data: how levels, scales and minima of 256 weights are packed into a block's bytes.

A weight is scale * level - minimum (Q2_K, Q4_K, Q5_K) or scale * (level - offset) (Q3_K, Q6_K). Its sub-block's scale and
minimum are small integers times the block's `d` and `dmin` (half precision). Source: block_q2_K … block_q6_K in ggml-common.h,
dequantize_row_q2_K … dequantize_row_q6_K and get_scale_min_k4 in ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = 256  # weights of a block (QK_K)
GROUP = 32  # levels that are stored in 32 consecutive bytes

# A plane: 32 bytes from `at` on, each holding parts of the levels of several groups of 32. A part is `width` bits of a level,
# starting at bit `bit`. Group `first` fills the lowest bits, group `first + step` the next ones, until the byte is full.
# (at, bit, width, first, step)
Plane = tuple[int, int, int, int, int]
# Some bits of a scale or minimum: ((value >> shift) & mask) << left is or-ed into byte `at`. Minima are counted after scales.
# (at, value, shift, mask, left)
Field = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class KQuantLayout:
    """The parts of a block of `block_bytes`. d_at, dmin_at: where its half-precision factors are (-1: there is none).

    sub_block: weights that share a scale. levels: a weight's level is 0 to levels - 1; signed types are shifted by half of
    that. scale_levels: the same for scales; signed scales of 6 bits (Q3_K) are shifted too, those of 8 bits are not.
    """

    block_bytes: int
    sub_block: int
    levels: int
    scale_levels: int
    signed: bool
    d_at: int
    dmin_at: int
    planes: tuple[Plane, ...]
    fields: tuple[Field, ...]


def _six_bit_pairs(at: int) -> tuple[Field, ...]:
    """Eight scales and eight minima of 6 bits in 12 bytes: the upper bits of the last four of each fill the first 8 bytes."""
    low = [field for j in range(4) for field in ((at + j, j, 0, 63, 0), (at + 4 + j, 8 + j, 0, 63, 0))]
    high = [
        field
        for j in range(4, 8)
        for field in (
            (at + 4 + j, j, 0, 15, 0),
            (at + 4 + j, 8 + j, 0, 15, 4),
            (at + j - 4, j, 4, 3, 6),
            (at + j, 8 + j, 4, 3, 6),
        )
    ]
    return (*low, *high)


def _six_bit_scales(at: int) -> tuple[Field, ...]:
    """Sixteen scales of 6 bits in 12 bytes: the low nibbles in 8 bytes, the upper two bits in 4."""
    low = [(at + j % 8, j, 0, 15, 4 * (j // 8)) for j in range(16)]
    return (*low, *((at + 8 + j % 4, j, 4, 3, 2 * (j // 4)) for j in range(16)))


def _two_bit_planes(at: int) -> tuple[Plane, ...]:
    return tuple((at + 32 * half, 0, 2, 4 * half, 1) for half in range(2))


def _four_bit_planes(at: int) -> tuple[Plane, ...]:
    return tuple((at + 32 * pair, 0, 4, 2 * pair, 1) for pair in range(4))


LAYOUTS: dict[str, KQuantLayout] = {
    "Q2_K": KQuantLayout(
        84, 16, 4, 16, False, 80, 82,
        _two_bit_planes(16),
        tuple((j, j + 16 * m, 0, 15, 4 * m) for j in range(16) for m in range(2)),
    ),
    "Q3_K": KQuantLayout(110, 16, 8, 64, True, 108, -1, (*_two_bit_planes(32), (0, 2, 1, 0, 1)), _six_bit_scales(96)),
    "Q4_K": KQuantLayout(144, 32, 16, 64, False, 0, 2, _four_bit_planes(16), _six_bit_pairs(4)),
    "Q5_K": KQuantLayout(176, 32, 32, 64, False, 0, 2, (*_four_bit_planes(48), (16, 4, 1, 0, 1)), _six_bit_pairs(4)),
    "Q6_K": KQuantLayout(
        210, 16, 64, 256, True, 208, -1,
        tuple(
            plane
            for half in range(2)
            for plane in (
                (64 * half, 0, 4, 4 * half, 2), (64 * half + 32, 0, 4, 4 * half + 1, 2), (128 + 32 * half, 4, 2, 4 * half, 1),
            )
        ),
        tuple((192 + j, j, 0, 255, 0) for j in range(16)),
    ),
}  # fmt: skip
