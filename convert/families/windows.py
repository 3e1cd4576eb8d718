"""Layers with a sliding window, by a checkpoint's config and llama.cpp's rules for the family."""

from __future__ import annotations

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole
from yarn_edge.checkpoint.layers import sliding_layers
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.positions.scaling import RopeScaling

from .rows import Architecture, value_of
from .sizes import ModelSizes


def windowed_layers(row: Architecture, config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    """Which layers have a sliding window, in a family that has such layers; [] if none has. Raises YarnEdgeError if all have."""
    windows = row.windows
    if windows is None:
        return []
    sliding = sliding_layers(config, windows, sizes.n_layer)
    rule = honoured(row.gguf).sliding
    if rule is not None and rule.always and not any(sliding):
        raise config.error(
            "layer_types", f"gives no layer a sliding window: llama.cpp runs {row.gguf} only if some have one"
        )
    if all(sliding):
        raise config.error("layer_types", "gives every layer a sliding window: their positions are then in no key")
    if rule is not None and rule.own_dims and sliding[0]:
        raise config.error(
            "layer_types",
            f"gives the first layer a sliding window: llama.cpp would turn as much of a head in every layer of {row.gguf} as there",
        )
    return sliding if any(sliding) else []


def window_of(row: Architecture, config: ConfigFile) -> int:
    """How many tokens back layers with a sliding window attend, in a family that has such layers."""
    assert row.windows is not None
    return config.required_integer("sliding_window") if "sliding_window" in config.values else row.windows.default


def check_sliding_window(row: Architecture, config: ConfigFile, scaling: RopeScaling) -> None:
    """Refuse a sliding window that is shorter than the context: llama.cpp attends to the whole context in these families."""
    window = value_of(row, config, "sliding_window") if row.window_ignored else None
    if window is None:
        return
    context = scaling.extended_context
    if not is_whole(window) or window < context:
        value = (
            "is absent, which transformers reads as 4096" if "sliding_window" not in config.values else f"is {window!r}"
        )
        raise config.error(
            "sliding_window",
            f"{value}, shorter than the context of {context}: llama.cpp would attend to all of it. "
            "If the model was trained with full attention, set sliding_window to null",
        )
