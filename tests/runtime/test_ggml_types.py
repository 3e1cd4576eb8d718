"""ggml's tensor types: sizes as gguf-py has them, kernels against gguf-py and torch, refusals where ggml would abort."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from yarn_edge.convert.kernels.choose import Kernels
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.tensor_types import TENSOR_TYPES
from yarn_edge.runtime.ggml_types import (
    QUANTIZABLE,
    GGMLType,
    dequantize_into,
    is_valid,
    largest_magnitude,
    requires_weights,
    type_named,
    types,
)

from support import depth

ROWS = np.random.default_rng(4).standard_normal((8, 512)).astype(np.float32)


def quantize_rows(values: np.ndarray, kind: GGMLType, weights: np.ndarray | None = None) -> np.ndarray:
    """By ggml's kernels."""
    return Kernels().quantize_rows(kind, np.ascontiguousarray(values), weights)


def test_sizes_are_those_of_gguf_py() -> None:
    theirs = {k.name: (int(k), *gguf.GGML_QUANT_SIZES[k]) for k in gguf.GGMLQuantizationType}
    ours = {t.name: (t.number, t.block, t.block_bytes) for t in types().values()}
    del theirs["Q8_1"], ours["Q8_1"]  # never in a file; gguf-py has an older layout of it
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() == {"Q2_0"}


def test_the_reader_has_the_same_types() -> None:
    theirs = {int(k): (k.name, *gguf.GGML_QUANT_SIZES[k]) for k in gguf.GGMLQuantizationType}
    assert {number: row for number, row in TENSOR_TYPES.items() if row[0] != "Q2_0"} == theirs
    library = {t.number: (t.name, t.block, t.block_bytes) for t in types().values() if t.name != "Q8_1"}
    assert {number: row for number, row in TENSOR_TYPES.items() if row[0] != "Q8_1"} == library


SLOW = () if depth.full else ("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS")


# gguf-py cannot read Q1_0 and Q2_0.
@pytest.mark.parametrize("name", [n for n in QUANTIZABLE if n not in ("F32", "Q1_0", "Q2_0", *SLOW)])
def test_what_is_made_is_read_back_alike_by_gguf_py(name: str) -> None:
    kind = type_named(name)
    weights = np.ones(512, np.float32) if requires_weights(kind) else None
    made = quantize_rows(ROWS, kind, weights)
    ours = np.empty(ROWS.size, np.float32)
    dequantize_into(kind, made.reshape(-1), ours)
    held = {"F16": made.view(np.float16), "BF16": made}.get(name, made)
    theirs = dequantize(held, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(ours.reshape(ROWS.shape), theirs.reshape(ROWS.shape), rtol=1e-5, atol=1e-6)
    assert is_valid(kind, made)


def test_q8_0_rows_equal_gguf_pys() -> None:
    ours = quantize_rows(ROWS, type_named("Q8_0"))
    theirs = quantize(ROWS, gguf.GGMLQuantizationType.Q8_0)
    assert (ours != theirs).mean() < 1e-3  # they round ties differently
    step = np.abs(ROWS).max() / 127
    assert np.abs(dequantize(ours, gguf.GGMLQuantizationType.Q8_0) - ROWS).max() <= 0.51 * step


@pytest.mark.parametrize("name, dtype", [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_halves_are_rounded_as_torch_does(name: str, dtype: torch.dtype) -> None:
    values = np.random.default_rng(5).standard_normal((1, 10000)).astype(np.float32) * 1000
    values[0, :4] = [0.0, -0.0, np.inf, 1 + 2**-8]
    wanted = torch.from_numpy(values).to(dtype)
    made = quantize_rows(values, type_named(name))
    np.testing.assert_array_equal(made.view(np.uint16), wanted.view(torch.uint16).numpy())
    back = np.empty(values.size, np.float32)
    dequantize_into(type_named(name), made.reshape(-1), back)
    np.testing.assert_array_equal(back, wanted.float().numpy().ravel())


@pytest.mark.parametrize(
    "name, rows, weights, told",
    [
        ("Q8_0", ROWS[:, :33], None, "whole blocks"),
        ("Q8_K", ROWS, None, "do not fit into"),
        ("I32", ROWS, None, "do not fit into"),
        ("IQ2_XXS", ROWS, None, "needs importance weights"),
        ("Q4_K", ROWS, np.ones(511, np.float32), "do not fit into"),
    ],
)
def test_what_would_end_the_process_is_an_error(
    name: str, rows: np.ndarray, weights: np.ndarray | None, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        quantize_rows(rows, type_named(name), weights)


def test_an_unknown_type() -> None:
    with pytest.raises(YarnEdgeError, match="no tensor type 'q9'"):
        type_named("q9")


def test_types_that_cannot_be_dequantized() -> None:
    with pytest.raises(YarnEdgeError, match="cannot convert I32 to float"):
        dequantize_into(type_named("I32"), np.zeros(4, np.uint8), np.empty(1, np.float32))


def test_a_damaged_scale_is_seen() -> None:
    made = quantize_rows(ROWS, type_named("Q8_0"))
    made[3, 1] = 0x7C  # the high byte of the first block's scale: infinity
    made[3, 0] = 0
    assert not is_valid(type_named("Q8_0"), made)


@pytest.mark.parametrize(
    "values",
    [[1.5, -3.0, 0.25], [-0.5], [2.0, 3.0], [-0.0], [1.0, -np.inf], [np.nan, 1.0], [-np.nan, -1.0], [3e38, -1.0]],
)
def test_the_largest_magnitude_of_bfloat16(values: list[float]) -> None:
    bits = (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    floats = (bits.astype(np.uint32) << 16).view(np.float32)
    found = largest_magnitude(type_named("BF16"), bits.view(np.uint8), floats)
    np.testing.assert_equal(found, float(np.abs(floats).max()))
