"""Watching the nodes of the live graph: the base class of the taps that read ropes and activations.

ggml calls `cb_eval` (llama_context_params) before each node, asking whether its result is wanted, and calls it again for wanted
nodes once they are computed. Nodes that are not wanted are computed together, up to the next wanted one. Returning False from
the second call abandons the graph (ggml-backend.cpp, ggml_backend_sched_compute_splits).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.ggml import check_struct, function
from yarn_edge.runtime.llama_api import llama
from yarn_edge.signals import deferred_ctrl_c


@cache
def op_number(name: bytes) -> int:
    """The number (enum ggml_op) of an operation by its name, such as b"ROPE"."""
    return next(op for op in range(128) if function("ggml_op_name")(op) == name)


class GraphTap:
    """`callback` goes to `Context(eval_callback=…)` and must outlive the context. Subclasses implement `see`."""

    def __init__(self) -> None:
        check_struct()
        self.error: BaseException | None = None
        self.callback = llama().ggml_backend_sched_eval_callback(self._seen)

    def see(self, address: int, asking: bool) -> bool:
        """Handle one call for the ggml_tensor at `address`; the return value is the one that the module describes."""
        raise NotImplementedError

    def _seen(self, address: int, asking: bool, _user_data: object) -> bool:
        """Called by ggml, so it must not raise. After an error every graph is abandoned at its first node."""
        if self.error is None:
            try:
                return self.see(address, asking)
            except BaseException as error:  # raised by watching
                self.error = error
        return asking

    @contextmanager
    def watching(self, context: Context) -> Iterator[None]:
        """Wrap evaluations in `context`: Ctrl-C and SIGTERM end them, and errors in `see` are raised."""
        with context.interruptible() as interrupt, deferred_ctrl_c(interrupt):
            try:
                yield
            finally:
                self._raise()

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is None:
            return
        if isinstance(error, YarnEdgeError) or not isinstance(error, Exception):
            raise error
        raise YarnEdgeError(f"the graph tap failed: {type(error).__name__}: {error}") from error
