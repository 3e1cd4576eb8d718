"""Which layers are of a kind, by a checkpoint's config: for tensors that only some layers have."""

from __future__ import annotations

from collections.abc import Callable

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole, shown

from .sizes import ModelSizes

LayersOf = Callable[[ConfigFile, ModelSizes], list[bool]]


def leading(key: str, default: int = 0) -> LayersOf:
    """The first layers, as many as the config's `key` says, or `default` without it."""

    def layers(config: ConfigFile, sizes: ModelSizes) -> list[bool]:
        n = config.values.get(key, default)
        if not is_whole(n) or not 0 <= n <= sizes.n_layer:
            raise config.error(
                key, f"is {shown(n)}, expected a whole number from 0 to num_hidden_layers, {sizes.n_layer}"
            )
        return [layer < n for layer in range(sizes.n_layer)]

    return layers


def layers_called(key: str, name: str) -> LayersOf:
    """The layers that a list of the config, as layer_types, calls `name`."""

    def layers(config: ConfigFile, sizes: ModelSizes) -> list[bool]:
        names = config.values.get(key)
        if not isinstance(names, list) or len(names) != sizes.n_layer:
            raise config.error(key, f"is {shown(names)}, expected a list of {sizes.n_layer} names, one for each layer")
        return [found == name for found in names]

    return layers
