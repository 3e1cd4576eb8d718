"""ggml through ctypes: its rope kernel against the float64 reference, its row formats against other implementations."""

from __future__ import annotations

import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions import rope
from yarn_edge.positions.error_budget import budget, rotation_error
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor
from yarn_edge.runtime import ggml, rope_kernel

POSITIONS = np.unique(
    np.append(np.geomspace(1, 131071, 200).astype(np.int32), [0, 4095, 4096, 8191, 32767, 65535, 131071])
)


def yarn(theta: float, dim: int, origin: int, factor: float, **changes: float) -> RopeScaling:
    values = {"attention_factor": yarn_attention_factor(factor), **changes}
    return RopeScaling("yarn", theta, dim, origin, factor, **values)  # type: ignore[arg-type]


SCALINGS = {
    "plain": RopeScaling("none", 10000.0, 128, 4096),
    "linear": RopeScaling("linear", 10000.0, 128, 4096, 8.0),
    "llama-2-64k": yarn(10000.0, 128, 4096, 16.0),
    "llama-2-128k": yarn(10000.0, 128, 4096, 32.0),
    "mistral-128k-nous": yarn(10000.0, 128, 8192, 16.0, attention_factor=yarn_attention_factor(16, 0.07)),
    "qwen2.5": yarn(1000000.0, 128, 32768, 4.0),
    "smollm2": yarn(100000.0, 64, 8192, 4.0),
    "own-everything": yarn(100000.0, 64, 8192, 4.0, attention_factor=1.35, beta_fast=8.0, beta_slow=2.0),
    "ext-half": yarn(100000.0, 64, 8192, 4.0, ext_factor=0.5),
    "ext-zero": yarn(100000.0, 64, 8192, 4.0, ext_factor=0.0),
    "odd-factor": yarn(500000.0, 128, 8192, 3.7),
}


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_kernel_stays_in_the_budget_up_to_131071(name: str, pairing: rope.Pairing) -> None:
    scaling = SCALINGS[name]
    x = np.random.default_rng(1).standard_normal((len(POSITIONS), 3, scaling.dim)).astype(np.float32)
    y = rope_kernel.rope(x, POSITIONS, rope_kernel.rope_arguments(scaling, pairing))
    error = rotation_error(x, y, POSITIONS, scaling, pairing)
    assert error.of_budget <= 1, str(error)


# field, wrong value, does it change an angle? SmolLM2's ramp runs over pairs 10 to 20 (8192 tokens, base 1e5, 64 dims):
# corr(32) = 10.30 and corr(1) = 19.94, rounded outwards; beta_fast 31 (10.39) moves neither end, 40 (9.68) and 0.9 (20.23) do.
WRONG = [
    ("factor", 4.01, True),
    ("original_context", 7000, True),
    ("original_context", 8190, False),
    ("beta_fast", 31.0, False),
    ("beta_fast", 40.0, True),
    ("beta_slow", 1.1, False),
    ("beta_slow", 0.9, True),
    ("attention_factor", 1.14, True),
    ("ext_factor", 0.99, True),
    ("rope_theta", 100010.0, True),
]


@pytest.mark.parametrize("field, value, matters", WRONG)
def test_a_slightly_wrong_parameter_is_far_outside_the_budget(field: str, value: float, matters: bool) -> None:
    right = SCALINGS["smollm2"]
    wrong = right.with_overrides("test", **{field: value})
    x = np.random.default_rng(2).standard_normal((len(POSITIONS), 2, 64)).astype(np.float32)
    y = rope_kernel.rope(x, POSITIONS, rope_kernel.rope_arguments(wrong, "half"))
    ratio = rotation_error(x, y, POSITIONS, right, "half").of_budget
    assert (
        ratio > 5 if matters else ratio <= 1
    )  # what moves no correction dimension over a whole number changes nothing


def test_partial_rotation_passes_the_rest_through() -> None:
    scaling = yarn(10000.0, 32, 4096, 4.0)
    x = np.random.default_rng(3).standard_normal((len(POSITIONS), 2, 48)).astype(np.float32)
    y = rope_kernel.rope(x, POSITIONS, rope_kernel.rope_arguments(scaling, "half"))
    np.testing.assert_array_equal(y[..., 32:], x[..., 32:])
    assert rotation_error(x, y, POSITIONS, scaling, "half").of_budget <= 1


def test_the_budget_grows_with_the_position_and_has_a_floor() -> None:
    table = budget(SCALINGS["llama-2-128k"], [0, 1000, 131071])
    assert table.shape == (3, 64)
    np.testing.assert_allclose(table[0], 1e-6)
    assert table[2].max() < 0.07
    assert (table[2] > table[1]).all()


def test_nan_counts_as_infinitely_wrong() -> None:
    scaling = SCALINGS["plain"]
    x = np.ones((2, 1, 128), dtype=np.float32)
    y = rope.rotate(x, *rope.cos_sin(scaling, [0, 1]), "half")
    y[1, 0, 5] = np.nan
    assert rotation_error(x, y, [0, 1], scaling, "half").of_budget > 1e6


@pytest.mark.parametrize(
    "scaling",
    [
        SCALINGS["smollm2"].with_overrides("t", truncate=False),
        SCALINGS["smollm2"].with_overrides("t", ramp="turns"),
        RopeScaling("ntk", 10000.0, 128, 4096, 8.0),
    ],
    ids=["truncate", "turns", "ntk"],
)
def test_what_the_kernel_cannot_do_is_an_error(scaling: RopeScaling) -> None:
    with pytest.raises(YarnEdgeError, match="no arguments"):
        rope_kernel.rope_arguments(scaling, "half")


def test_there_is_a_cpu_device() -> None:
    assert "cpu" in {d.kind for d in ggml.devices()}
