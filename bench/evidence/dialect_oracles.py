"""The positions of a checkpoint as its authors define them, written without yarn_edge's own parser and formulas.

If transformers knows the dialect, the truth is its own rotary embedding, made from config.json. If it does not (the Nous code), the
authors' formulas are repeated here as in their modeling files (github.com/jquesnelle/yarn).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
# config.json -> (frequencies (D/2,) in radians per token, factor of cos and sin)
Formula = Callable[[dict[str, Any]], tuple[Array, float]]


def _shape(config: dict[str, Any]) -> tuple[int, float]:
    return config["hidden_size"] // config["num_attention_heads"], float(config["rope_theta"])


def _yarn(
    dim: int,
    base: float,
    scale: float,
    original: int,
    log_multiplier: float,
    *,
    ext: float,
    beta_fast: float,
    beta_slow: float,
) -> tuple[Array, float]:
    """LlamaYaRNScaledRotaryEmbedding.yarn: a mask between two correction dimensions, and the magnitude."""

    def find(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = max(math.floor(find(beta_fast)), 0), min(math.ceil(find(beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # type: ignore[assignment]
    extrapolation = np.array([1.0 / base ** (2 * d / dim) for d in range(dim // 2)])
    interpolation = extrapolation / scale
    mask = np.array([(1 - min(1.0, max(0.0, (d - low) / (high - low)))) * ext for d in range(dim // 2)])
    magnitude = 1.0 if scale <= 1 else log_multiplier * math.log(scale) + 1.0
    return interpolation * (1 - mask) + extrapolation * mask, magnitude


def nous(log_multiplier: float, betas: tuple[float, float] = (32, 1), length: int | None = None) -> Formula:
    """The Nous code for Llama (0.1, betas 32 and 1) or Mistral (0.07, betas 128 and 2). length: dynamic YaRN at that length."""

    def formula(config: dict[str, Any]) -> tuple[Array, float]:
        dim, base = _shape(config)
        block = config["rope_scaling"]
        original = block["original_max_position_embeddings"]
        scale = float(block["factor"]) if length is None else max(1.0, length / original)
        ext = block.get("extrapolation_factor", 1.0)
        fast, slow = (block.get(name, beta) for name, beta in zip(("beta_fast", "beta_slow"), betas, strict=True))
        frequencies, magnitude = _yarn(
            dim, base, scale, original, log_multiplier, ext=ext, beta_fast=fast, beta_slow=slow
        )
        return frequencies, magnitude * block.get("attn_factor", 1.0)

    return formula


def dynamic_ntk(length: int) -> Formula:
    """transformers' dynamic NTK, frozen at the base that it has after `length` tokens."""

    def formula(config: dict[str, Any]) -> tuple[Array, float]:
        dim, base = _shape(config)
        factor, longest = config["rope_scaling"]["factor"], config["max_position_embeddings"]
        length_now = max(length, longest)
        base *= ((factor * length_now / longest) - (factor - 1)) ** (dim / (dim - 2))
        return np.array([1.0 / base ** (2 * d / dim) for d in range(dim // 2)]), 1.0

    return formula


@dataclass
class Truth:
    """A checkpoint's weights in transformers, float32, with a rotary embedding that can be replaced."""

    model: Any

    @classmethod
    def load(cls, folder: Path) -> Truth:
        """Load a folder. Raises whatever transformers raises."""
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
        )
        return cls(model.eval())

    def as_transformers_reads(self, folder: Path) -> None:
        """Use the rotary embedding that transformers makes from this folder's config.json."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config=config)
        self.model.config.rope_parameters = config.rope_parameters  # Ministral 3 scales queries by it

    def by_formula(self, frequencies: Array, magnitude: float) -> None:
        """Use these frequencies and this magnitude."""
        import torch

        rotary = self.model.model.rotary_emb
        rotary.rope_type = "default"
        rotary.inv_freq = torch.from_numpy(frequencies.astype(np.float32))
        rotary.attention_scaling = magnitude

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """(n_tokens, n_vocab)."""
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        return np.asarray(logits.numpy(), dtype=np.float32)
