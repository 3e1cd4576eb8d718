"""The error of float32 rotations against the float64 reference, in radians by position, for ggml and transformers.

`python -m yarn_edge.bench.evidence.phase_error` prints the table of docs/precision.md. It compares every pair at every 64th position
and at the positions next to it, for YaRN models as they were released.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt

from yarn_edge.positions import rope
from yarn_edge.positions.error_budget import EDGES, budget
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor
from yarn_edge.runtime import rope_kernel
from yarn_edge.stdout import write_text
from yarn_edge.verify.transformers_reference import rope_parameters

from ..standalone import run_module

MODELS: dict[str, RopeScaling] = {
    "Yarn-Llama-2 (1e4, 128, 4096 x 32)": RopeScaling(
        "yarn", 1e4, 128, 4096, 32.0, attention_factor=yarn_attention_factor(32)
    ),
    "Yarn-Mistral (1e4, 128, 8192 x 16)": RopeScaling(
        "yarn", 1e4, 128, 8192, 16.0, attention_factor=yarn_attention_factor(16, 0.07)
    ),
    "Qwen2.5 (1e6, 128, 32768 x 4)": RopeScaling(
        "yarn", 1e6, 128, 32768, 4.0, attention_factor=yarn_attention_factor(4)
    ),
    "SmolLM2 (1e5, 64, 8192 x 4)": RopeScaling("yarn", 1e5, 64, 8192, 4.0, attention_factor=yarn_attention_factor(4)),
}
Angles = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def ggml_cos_sin(scaling: RopeScaling, positions: npt.NDArray[np.int32]) -> Angles:
    """A cos and A sin of ggml's CPU kernel, (n_positions, D/2) each: the rotation of (1, 0) in every pair."""
    x = np.zeros((len(positions), 1, scaling.dim), np.float32)
    x[..., : scaling.dim // 2] = 1
    y = rope_kernel.rope(x, positions, rope_kernel.rope_arguments(scaling, "half"))[:, 0].astype(np.float64)
    return y[:, : scaling.dim // 2], y[:, scaling.dim // 2 :]


def transformers_cos_sin(scaling: RopeScaling, positions: npt.NDArray[np.int32]) -> Angles:
    """A cos and A sin of transformers' LlamaRotaryEmbedding in float32, (n_positions, D/2) each."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=scaling.dim,
        num_attention_heads=1,
        head_dim=scaling.dim,
        max_position_embeddings=scaling.extended_context,
        rope_parameters=rope_parameters(scaling),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions.astype(np.int64))[None])
    half = scaling.dim // 2
    return cos[0, :, :half].double().numpy(), sin[0, :, :half].double().numpy()


def phase_errors(scaling: RopeScaling, positions: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.float64]]:
    """The error of the worst pair in radians at each position, for each side, and the budget."""
    cos, sin = rope.cos_sin(scaling, positions)
    sides = {"ggml": ggml_cos_sin(scaling, positions), "transformers": transformers_cos_sin(scaling, positions)}
    errors = {name: np.hypot(c - cos, s - sin).max(axis=1) / scaling.attention_factor for name, (c, s) in sides.items()}
    return errors | {"budget": budget(scaling, positions).max(axis=1)}


def run(_args: argparse.Namespace) -> int:
    """Print the table as Markdown."""
    near = np.arange(0, EDGES[-1], 64)
    positions = np.unique(np.clip(np.concatenate([near, near - 1, near + 1]), 0, EDGES[-1] - 1)).astype(np.int32)
    out = write_text
    out("| model (base, dims, context x factor) | side | " + " | ".join(f"to {e - 1}" for e in EDGES) + " |\n")
    out("|---|---|" + "---|" * len(EDGES) + "\n")
    for model, scaling in MODELS.items():
        for side, errors in phase_errors(scaling, positions).items():
            worst = [errors[positions < edge].max() for edge in EDGES]
            out(f"| {model} | {side} | " + " | ".join(f"{w:.1e}" for w in worst) + " |\n")
    return 0


def main() -> int:
    """Returns 2 for bad input."""
    what = "The error of float32 rotations in ggml and transformers, by position."
    return run_module("evidence.phase_error", what, lambda _parser: None, run)


if __name__ == "__main__":
    raise SystemExit(main())
