"""How far a float32 rotation is from the reference, and how far it may be: the error budget in radians by position.

Angles in float32 are not exact. ggml makes theta_d by d multiplications with one rounded constant and transformers by a
power and a product; both then multiply by the position. Each of these steps may be off by one rounding (2^-24), so the
angle of pair d at position m may be off by m * theta'_d * (2d + 4) * 2^-24 radians; where frequencies are mixed, the
mix in float32 adds 2 * m * (theta_d - theta_d / s) * 2^-24. An honest float32 rotation stays inside this budget, and a
wrong parameter does not (docs/precision.md has the measured table).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yarn_edge import rope
from yarn_edge.scaling import RAMPED_METHODS, RopeScaling

ROUNDING = 2.0**-24
# Rounding of cos, sin, A and the products, relative to the rotated pair, whatever the position.
FLOOR = 1e-6


def budget(scaling: RopeScaling, positions: npt.ArrayLike) -> rope.Float64:
    """Allowed error in radians by position and pair, shape (n_positions, D/2)."""
    pairs = np.arange(scaling.dim // 2)
    per_token = rope.inv_freq(scaling) * (2 * pairs + 4) * ROUNDING
    if scaling.method in RAMPED_METHODS:
        plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
        per_token += 2 * (plain - plain / scaling.factor) * ROUNDING
    return np.outer(np.abs(np.asarray(positions, dtype=np.float64)), per_token) + FLOOR


@dataclass(frozen=True)
class RotationError:
    """The worst pair of a comparison. `of_budget`: error / budget (at most 1 is honest); `radians`: the error itself."""

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


def rotation_error(
    x: npt.ArrayLike, y: npt.ArrayLike, positions: npt.ArrayLike, scaling: RopeScaling, pairing: rope.Pairing
) -> RotationError:
    """Compare `y`, somebody's rotation of `x` (both (n_positions, n_heads, head_dim)), with the reference.

    The error of a pair is |y - reference| / (A |x|): its phase error in radians, or the relative error of A, whichever
    shows. Not-a-number counts as infinite.
    """
    where = np.asarray(positions)
    cos, sin = rope.cos_sin(scaling, where)
    before = _pairs(x, scaling.dim, pairing)
    wanted = before * (cos + 1j * sin)[:, None, :]
    size = np.abs(before) * scaling.attention_factor
    size = np.where(size > 0, size, np.inf)
    error = np.nan_to_num(np.abs(_pairs(y, scaling.dim, pairing) - wanted) / size, nan=np.inf).max(axis=1)
    ratio = error / budget(scaling, where)
    n, pair = np.unravel_index(int(ratio.argmax()), ratio.shape)
    return RotationError(float(ratio[n, pair]), float(error[n, pair]), int(where[n]), int(pair))
