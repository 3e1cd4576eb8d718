"""A backward pass through a streamed model: what a layer computes is not kept, but computed again, with its weights read again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from yarn_edge.verify.streamed_layers import StreamedLayers


def run_layers_again(layers: StreamedLayers) -> None:
    """Let each layer run a second time in a backward pass. transformers' own way leaves out hooks then, so that it found no weights."""
    layers.model.train()  # only so does transformers let them run again
    layers.model.activation_checkpointing_enable({"use_reentrant": False})
    for prefix, module in layers.modules.items():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = partial(_run_twice, layers, prefix)


def _run_twice(layers: StreamedLayers, prefix: str, function: Callable[..., Any], *arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    runs: list[str] = []

    def run(*given: Any) -> Any:
        runs.append(prefix)
        if len(runs) == 1:
            return function(*given)
        with layers.weights_of(prefix):
            return function(*given)

    return checkpoint(run, *arguments, use_reentrant=False)
