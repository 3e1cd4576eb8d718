"""Seeing the nodes of the live graph: what the callbacks of `tap` and `activation_tap` have in common.

ggml calls a `cb_eval` (llama_context_params) for every node twice. Asking: is its result wanted? Then, for wanted ones, when it
is computed; nodes that nobody wants are computed together up to the next wanted one. False in that second call leaves the
graph (ggml-backend.cpp, ggml_backend_sched_compute_splits).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.ggml import check_struct, function
from yarn_edge.runtime.llama_api import deferred_ctrl_c, llama


@cache
def op_number(name: bytes) -> int:
    """enum ggml_op of an operation by its name, such as b"ROPE"."""
    return next(op for op in range(128) if function("ggml_op_name")(op) == name)


class GraphTap:
    """`callback` is for `Context(eval_callback=…)`; it must outlive the context. Subclasses say what they `see`."""

    def __init__(self) -> None:
        check_struct()
        self.error: BaseException | None = None
        self.callback = llama().ggml_backend_sched_eval_callback(self._seen)

    def see(self, address: int, asking: bool) -> bool:
        """One call for the ggml_tensor at `address`; the answers as above."""
        raise NotImplementedError

    def _seen(self, address: int, asking: bool, _user_data: object) -> bool:
        """Called by ggml; must not raise through C. After an error every graph is left at its first node."""
        if self.error is None:
            try:
                return self.see(address, asking)
            except BaseException as error:  # raised by watching
                self.error = error
        return asking

    @contextmanager
    def watching(self, context: Context) -> Iterator[None]:
        """Around evaluations in `context`: Ctrl-C and SIGTERM end them, and what went wrong in `see` is raised."""
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
