"""Watching the nodes of the live graph: the base class of the taps that read ropes and activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from yarn_edge.runtime.context import Context
from yarn_edge.signals import deferred_ctrl_c


class GraphTap:
    """Sees every node of a context that `open_context` made with it. Subclasses implement `see`."""

    def see(self, address: int, asking: bool) -> bool:
        """Handle one call for the ggml_tensor at `address`; the return value is the one that `callback` describes."""
        raise NotImplementedError

    @contextmanager
    def watching(self, context: Context) -> Iterator[None]:
        """Wrap evaluations in `context`: Ctrl-C and SIGTERM end them."""
        with context.interruptible() as interrupt, deferred_ctrl_c(interrupt):
            yield
