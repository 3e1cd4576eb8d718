"""Error feedback: blocks are read and written as ggml does, and the error of a matrix's results becomes smaller, not that of its weights."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.convert.kernels.choose import Kernels, _checked_kernel
from yarn_edge.convert.kernels.feedback import DAMPING, Factors, quantize_with_feedback
from yarn_edge.convert.kernels.layout import LAYOUTS, WEIGHTS
from yarn_edge.convert.kernels.packing import level_limits, levels_of, put_levels, scales_of
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml_types import dequantize_into, quantize_into, type_named

WIDTH, ROWS = 512, 24
RANDOM = np.random.default_rng(3)
WEIGHT = (0.02 * RANDOM.standard_normal((ROWS, WIDTH))).astype(np.float32)
MIXED = RANDOM.standard_normal((WIDTH, WIDTH)) * np.exp(RANDOM.standard_normal(WIDTH))
INPUTS = (RANDOM.standard_normal((2000, WIDTH)) @ MIXED).astype(np.float32)
MOMENTS = (INPUTS.T @ INPUTS / len(INPUTS)).astype(np.float32)


def read(name: str, made: np.ndarray) -> np.ndarray:
    out = np.empty(made.nbytes // LAYOUTS[name].block_bytes * WEIGHTS, np.float32)
    dequantize_into(type_named(name), made.reshape(-1), out)
    return out.reshape(len(made), -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_of_blocks_are_what_ggml_reads(name: str) -> None:
    kind, rows = type_named(name), np.random.default_rng(0).standard_normal((40, WEIGHTS)).astype(np.float32)
    rows[:3] = 0
    blocks = np.empty((40, kind.row_bytes(WEIGHTS)), np.uint8)
    quantize_into(kind, rows, blocks)
    (scales, minima), levels, (offset, top) = scales_of(name, blocks), levels_of(name, blocks), level_limits(name)
    each = LAYOUTS[name].sub_block
    np.testing.assert_array_equal(
        np.repeat(scales, each, 1) * (levels.astype(np.float32) - np.float32(offset)) - np.repeat(minima, each, 1),
        read(name, blocks),
    )
    again = blocks.copy()
    put_levels(name, top - levels, again)
    assert (again != blocks).any()
    np.testing.assert_array_equal(levels_of(name, again), top - levels)
    put_levels(name, levels, again)
    np.testing.assert_array_equal(again, blocks)


def test_factors_multiply_to_the_damped_moments() -> None:
    factors = Factors.of(MOMENTS)
    upper = factors.carried.astype(np.float64)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_array_equal(np.diagonal(upper), 1)
    damped = MOMENTS + np.eye(WIDTH) * DAMPING * np.diagonal(MOMENTS).mean()
    np.testing.assert_allclose(upper * factors.importance @ upper.T, damped, atol=1e-5 * MOMENTS.max())


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), -np.eye(4)], ids=["zero", "nan", "negative"]
)
def test_what_are_no_moments(bad: np.ndarray) -> None:
    with pytest.raises(YarnEdgeError, match="second moments"):
        Factors.of(bad.astype(np.float32))


@pytest.mark.parametrize("name", LAYOUTS)
def test_results_become_better_and_weights_do_not(name: str) -> None:
    kernels, kind = Kernels(_checked_kernel()), type_named(name)
    plain = read(name, kernels.quantize_rows(kind, WEIGHT, np.ascontiguousarray(np.diagonal(MOMENTS))))
    made = np.empty((ROWS, kind.row_bytes(WIDTH)), np.uint8)
    quantize_with_feedback(kernels, kind, WEIGHT, Factors.of(MOMENTS), made)
    errors = [rows - WEIGHT for rows in (read(name, made), plain)]
    ours, theirs = (float(np.square(INPUTS @ e.T).sum()) for e in errors)
    assert ours < 0.85 * theirs
    assert np.square(errors[0]).sum() > np.square(errors[1]).sum()


def test_each_level_is_the_nearest_to_its_target() -> None:
    """By the definition, in float64, for one type."""
    kernels, kind, factors = Kernels(_checked_kernel()), type_named("Q4_K"), Factors.of(MOMENTS)
    made = np.empty((ROWS, kind.row_bytes(WIDTH)), np.uint8)
    quantize_with_feedback(kernels, kind, WEIGHT, factors, made)
    blocks = made.reshape(-1, kind.block_bytes)
    (scales, minima), each = scales_of("Q4_K", blocks), LAYOUTS["Q4_K"].sub_block
    scales, minima = (np.repeat(x, each, 1).reshape(ROWS, WIDTH).astype(np.float64) for x in (scales, minima))
    levels, errors = levels_of("Q4_K", blocks).reshape(ROWS, WIDTH), read("Q4_K", made).astype(np.float64) - WEIGHT
    targets = WEIGHT - errors @ np.triu(factors.carried.astype(np.float64), 1)
    live = scales != 0
    wanted = np.clip((targets + minima)[live] / scales[live], 0, 15)
    assert np.abs(levels[live] - wanted).max() < 0.5 + 1e-3
