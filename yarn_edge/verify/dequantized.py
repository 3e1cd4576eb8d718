"""How transformers is to load weights that are quantized in the checkpoint, or that only its config calls so."""

from __future__ import annotations

from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.quantized import declared_method, left_over


def dequantize_in(config: Any, file: ConfigFile) -> None:
    """Let a config of transformers dequantize what `convert` reads as it is, and forget a leftover. file: config.json."""
    method = declared_method(file)
    if method is None or not hasattr(config, "quantization_config"):
        return
    if method.read_as:  # whether the weights are floats or not
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    elif left_over(file):
        del config.quantization_config


def computes_in_floats(quantization: Any) -> bool:
    """Whether a model with this quantization_config, an object or a dict or None, has all weights as floats."""
    if quantization is None:
        return True
    return bool(
        quantization.get("dequantize") if isinstance(quantization, dict) else getattr(quantization, "dequantize", False)
    )
