"""The reference: rotary position embeddings and their extensions in NumPy, float64.

Everything that runs elsewhere (transformers in float32, ggml's kernels) is checked against this. Formulas: Su et al.
arXiv 2104.09864 for RoPE; Peng et al. arXiv 2309.00071 for the extensions. The ramp is the one in pair indices that the
authors' code, transformers, ggml and every released model use; the ramp that the paper prints has the name "turns".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

Float64 = npt.NDArray[np.float64]
Pairing = Literal["half", "interleaved"]


def rope_inv_freq(dim: int, theta: float) -> Float64:
    """theta_d = b^(-2d/D) in radians per token, shape (D/2,)."""
    return np.asarray(float(theta) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))


def wavelengths(inv_freq: Float64) -> Float64:
    """lambda_d = 2 pi / theta_d in tokens, shape (D/2,)."""
    return 2 * np.pi / inv_freq


def pi_inv_freq(dim: int, theta: float, factor: float) -> Float64:
    """Position Interpolation (paper 2.2): every frequency divided by s."""
    return rope_inv_freq(dim, theta) / factor


def ntk_theta(dim: int, theta: float, factor: float) -> float:
    """NTK-aware base b' = b * s^(D/(D-2)) (paper 3.1, definition 1)."""
    if dim <= 2:
        raise YarnEdgeError(f"NTK-aware scaling needs more than 2 rotated dimensions, there are {dim}")
    return float(theta * factor ** (dim / (dim - 2)))


def llama3_factors(
    dim: int, theta: float, original_context: int, factor: float, low_freq_factor: float, high_freq_factor: float
) -> Float64:
    """Llama 3.1's rule: the divisor of each pair's frequency, shape (D/2,), as in transformers' `_compute_llama3_parameters`.

    It is 1 for pairs that turn more than high_freq_factor times within L, s for those that turn fewer than low_freq_factor
    times, and blended in between.
    """
    turns = original_context / wavelengths(rope_inv_freq(dim, theta))
    keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return np.asarray(1 / ((1 - keep) / factor + keep))


def correction_dim(n_rotations: float, dim: int, theta: float, original_context: int) -> float:
    """The (fractional) index of the pair that turns `n_rotations` times within the original context."""
    return dim * math.log(original_context / (n_rotations * 2 * math.pi)) / (2 * math.log(theta))


def correction_range(scaling: RopeScaling) -> tuple[float, float]:
    """The pair indices (low, high) between which the index ramp falls, rounded by floor and ceil unless `truncate` is false."""
    low, high = (
        correction_dim(beta, scaling.dim, scaling.rope_theta, scaling.original_context)
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The bound is D - 1 although the last pair index is D/2 - 1: the authors' code, ggml and transformers have it that way.
    return max(0.0, low), min(scaling.dim - 1.0, high)


def extrapolation_mix(scaling: RopeScaling) -> Float64:
    """The share of each pair that keeps its own frequency, shape (D/2,): 1 for fast pairs, 0 for slow ones, times ext_factor."""
    if scaling.ramp == "turns":
        turns = scaling.original_context / wavelengths(rope_inv_freq(scaling.dim, scaling.rope_theta))
        keep = np.clip((turns - scaling.beta_slow) / max(1e-9, scaling.beta_fast - scaling.beta_slow), 0, 1)
    else:
        low, high = correction_range(scaling)
        keep = 1 - np.clip((np.arange(scaling.dim // 2) - low) / max(0.001, high - low), 0, 1)
    return np.asarray(keep * scaling.ext_factor, dtype=np.float64)


def by_parts_inv_freq(scaling: RopeScaling, factor: float) -> Float64:
    """NTK-by-parts (paper 3.2, definition 2) at `factor`: theta/s * (1 - mix) + theta * mix."""
    plain = rope_inv_freq(scaling.dim, scaling.rope_theta)
    mix = extrapolation_mix(scaling)
    return plain / factor * (1 - mix) + plain * mix


def dynamic_factor(scaling: RopeScaling, length: int) -> float:
    """s for the current `length` in tokens: the paper's max(1, l/L) (3.3), which the Nous code uses for dynamic YaRN.

    For dynamic NTK with a factor f it is transformers' max(1, f*l/L - (f - 1)), which is the same for f = 1.
    """
    factor = scaling.factor if scaling.method == "dynamic-ntk" else 1.0
    return max(1.0, factor * length / scaling.original_context - (factor - 1))


_STATIC: dict[str, Callable[[RopeScaling], Float64]] = {
    "none": lambda s: rope_inv_freq(s.dim, s.rope_theta),
    "linear": lambda s: pi_inv_freq(s.dim, s.rope_theta, s.factor),
    "ntk": lambda s: rope_inv_freq(s.dim, ntk_theta(s.dim, s.rope_theta, s.factor)),
    "ntk-by-parts": lambda s: by_parts_inv_freq(s, s.factor),
    "yarn": lambda s: by_parts_inv_freq(s, s.factor),
    "llama3": lambda s: rope_inv_freq(s.dim, s.rope_theta),
    "longrope": lambda s: rope_inv_freq(s.dim, s.rope_theta),
}
_DYNAMIC: dict[str, Callable[[RopeScaling, float], Float64]] = {
    "dynamic-ntk": lambda s, factor: rope_inv_freq(s.dim, ntk_theta(s.dim, s.rope_theta, factor)),
    "dynamic-yarn": by_parts_inv_freq,
}


def inv_freq(scaling: RopeScaling, length: int | None = None) -> Float64:
    """theta'_d in radians per token, shape (D/2,). Dynamic methods need the current `length` in tokens."""
    if scaling.method in _STATIC:
        frequencies = _STATIC[scaling.method](scaling)
    elif length is None:
        raise YarnEdgeError(f"{scaling.method} has no fixed frequencies: pass the length in tokens")
    else:
        frequencies = _DYNAMIC[scaling.method](scaling, dynamic_factor(scaling, length))
    return frequencies if scaling.frequency_factors is None else frequencies / np.asarray(scaling.frequency_factors)


def attention_factor(scaling: RopeScaling, length: int | None = None) -> float:
    """A, the multiplier of cos and sin: 0.1 ln s(length) + 1 for dynamic YaRN, else the described value."""
    if scaling.method == "dynamic-yarn":
        if length is None:
            raise YarnEdgeError("dynamic-yarn has no fixed attention factor: pass the length in tokens")
        return yarn_attention_factor(dynamic_factor(scaling, length))
    return scaling.attention_factor


def cos_sin(scaling: RopeScaling, positions: npt.ArrayLike, length: int | None = None) -> tuple[Float64, Float64]:
    """A*cos and A*sin of every angle, each of shape (n_positions, D/2). positions: in tokens."""
    angles = np.outer(np.asarray(positions, dtype=np.float64), inv_freq(scaling, length))
    factor = attention_factor(scaling, length)
    return np.cos(angles) * factor, np.sin(angles) * factor


def rotate(x: npt.ArrayLike, cos: Float64, sin: Float64, pairing: Pairing) -> Float64:
    """Rotate queries or keys. x: (n_positions, n_heads, head_dim); cos, sin: (n_positions, D/2). Returns an array of x's shape.

    pairing: "half" makes pair d of (d, d + D/2), as in transformers and GGUF's NEOX; "interleaved" of (2d, 2d+1), as in GGUF's
    NORM. Dimensions beyond D (partial rotary) pass through unchanged.
    """
    values = np.array(x, dtype=np.float64)
    dim = 2 * cos.shape[-1]
    first, second = (
        (slice(0, dim // 2), slice(dim // 2, dim)) if pairing == "half" else (slice(0, dim, 2), slice(1, dim, 2))
    )
    a, b = values[..., first].copy(), values[..., second].copy()
    cos, sin = cos[:, None, :], sin[:, None, :]
    values[..., first] = a * cos - b * sin
    values[..., second] = a * sin + b * cos
    return values
