"""How far a float32 rotation is from the reference, and how far it may be: an error budget in radians by position.

Angles in float32 are not exact. ggml computes theta_d by d multiplications with one rounded constant, transformers by a
power and a product; both then multiply by the position. Each step may be off by one rounding (2^-24), so the angle of
pair d at position m may be off by m * theta'_d * (2d + 4) * 2^-24 radians. Mixing frequencies in float32 adds
2 * m * (theta_d - theta_d / s) * 2^-24. A correct float32 rotation stays within this budget, and a wrong parameter
exceeds it (docs/precision.md has the measured table).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RAMPED_METHODS, RopeScaling

ROUNDING = 2.0**-24
# Rounding of cos, sin, A and the products, relative to the rotated pair; it does not depend on the position.
FLOOR = 1e-6
EDGES = (512, 4096, 8192, 16384, 32768, 65536, 131072)


def budget(scaling: RopeScaling, positions: npt.ArrayLike) -> rope.Float64:
    """The allowed error in radians by position and pair, shape (n_positions, D/2)."""
    pairs = np.arange(scaling.dim // 2)
    per_token = rope.inv_freq(scaling) * (2 * pairs + 4) * ROUNDING
    if scaling.method in RAMPED_METHODS:
        plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
        per_token += 2 * (plain - plain / scaling.factor) * ROUNDING
    return np.outer(np.abs(np.asarray(positions, dtype=np.float64)), per_token) + FLOOR


@dataclass(frozen=True)
class RotationError:
    """The worst pair of a comparison. of_budget: error / budget, at most 1 for a correct rotation; radians: the error itself."""

    of_budget: float
    radians: float
    position: int
    pair: int

    def __str__(self) -> str:
        return f"{self.radians:.2e} rad at position {self.position}, pair {self.pair}"


def _pairs(values: npt.ArrayLike, dim: int, pairing: rope.Pairing) -> npt.NDArray[np.complex128]:
    v = np.asarray(values, dtype=np.float64)[..., :dim]
    a, b = (v[..., : dim // 2], v[..., dim // 2 :]) if pairing == "half" else (v[..., 0::2], v[..., 1::2])
    return np.asarray(a + 1j * b)


def rotation_errors(
    x: npt.ArrayLike, y: npt.ArrayLike, positions: npt.ArrayLike, scaling: RopeScaling, pairing: rope.Pairing
) -> rope.Float64:
    """Compare `y`, a rotation of `x` (both (n_positions, n_heads, head_dim)), with the reference. Returns (n_positions, D/2).

    The error of a pair is |y - reference| / (A |x|), which shows its phase error in radians and the relative error of A. The
    worst head counts. NaN counts as infinite.
    """
    cos, sin = rope.cos_sin(scaling, positions)
    before = _pairs(x, scaling.dim, pairing)
    wanted = before * (cos + 1j * sin)[:, None, :]
    size = np.abs(before) * scaling.attention_factor
    size = np.where(size > 0, size, np.inf)
    error = np.nan_to_num(np.abs(_pairs(y, scaling.dim, pairing) - wanted) / size, nan=np.inf)
    return np.asarray(error.max(axis=1))


def worst(errors: rope.Float64, positions: npt.ArrayLike, scaling: RopeScaling) -> RotationError:
    """The entry of `rotation_errors` that uses the largest part of its budget."""
    where = np.asarray(positions)
    ratio = errors / budget(scaling, where)
    n, pair = np.unravel_index(int(ratio.argmax()), ratio.shape)
    return RotationError(float(ratio[n, pair]), float(errors[n, pair]), int(where[n]), int(pair))


def rotation_error(
    x: npt.ArrayLike, y: npt.ArrayLike, positions: npt.ArrayLike, scaling: RopeScaling, pairing: rope.Pairing
) -> RotationError:
    """`worst` of `rotation_errors`."""
    return worst(rotation_errors(x, y, positions, scaling, pairing), positions, scaling)


def sample_positions(end: int, original_context: int) -> npt.NDArray[np.int32]:
    """About 1,500 positions below `end`: EDGES, the original context, `end` and their neighbors, and a grid."""
    edges = [e for e in (*EDGES, original_context, end) if e <= end]
    near = np.concatenate([np.asarray(edges) + step for step in (-2, -1, 0, 1)])
    grid = np.concatenate([np.arange(0, min(end, 64)), np.linspace(0, end - 1, 1024), np.geomspace(1, end, 256)])
    return np.unique(np.clip(np.concatenate([near, grid]), 0, end - 1)).astype(np.int32)


def float32_cos_sin(scaling: RopeScaling, positions: npt.ArrayLike) -> tuple[rope.Float64, rope.Float64]:
    """A cos and A sin in float32, step by step as transformers computes them (modeling_rope_utils, LlamaRotaryEmbedding).

    This holds for none, linear and yarn. Other methods use their exact frequencies, rounded once.
    """
    f32 = np.float32
    half = np.arange(0, scaling.dim, 2, dtype=f32) / f32(scaling.dim)
    # NumPy's float32 power is off by up to 1.5 roundings, torch's by half of one.
    powers = np.power(float(scaling.rope_theta), half.astype(np.float64)).astype(f32)
    if scaling.method == "yarn" and scaling.frequency_factors is None:
        mix = _float32_mix(scaling)
        frequencies = 1 / (f32(scaling.factor) * powers) * (1 - mix) + 1 / powers * mix
    elif scaling.method in ("none", "linear") and scaling.frequency_factors is None:
        frequencies = 1 / powers / f32(scaling.factor)
    else:
        frequencies = rope.inv_freq(scaling).astype(f32)
    angles = np.outer(np.asarray(positions, dtype=f32), frequencies)
    a = f32(scaling.attention_factor)
    return (np.cos(angles) * a).astype(np.float64), (np.sin(angles) * a).astype(np.float64)


def _float32_mix(scaling: RopeScaling) -> npt.NDArray[np.float32]:
    if scaling.ramp != "index":
        return rope.extrapolation_mix(scaling).astype(np.float32)
    low, high = rope.correction_range(scaling)
    width = np.float32(max(0.001, high - low))
    ramp = (np.arange(scaling.dim // 2, dtype=np.float32) - np.float32(low)) / width
    return np.asarray((1 - np.clip(ramp, 0, 1)) * np.float32(scaling.ext_factor), np.float32)


def error_by_position(
    errors: rope.Float64, positions: npt.NDArray[np.int32], scaling: RopeScaling
) -> list[dict[str, float]]:
    """The phase-error table: the worst error in radians up to each edge, for `errors` (n_positions,) and for float32."""
    cos, sin = rope.cos_sin(scaling, positions)
    c, s = float32_cos_sin(scaling, positions)
    theirs = np.hypot(c - cos, s - sin).max(axis=1) / scaling.attention_factor
    allowed = budget(scaling, positions).max(axis=1)
    rows = []
    for edge in EDGES:
        inside = positions < edge
        sides = {"ggml": errors, "transformers": theirs, "budget": allowed}
        rows.append({"up_to": edge - 1} | {name: float(v[inside].max()) for name, v in sides.items()})
    return rows
