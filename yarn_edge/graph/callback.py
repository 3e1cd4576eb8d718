"""One callback for a context's edits and its tap.

ggml calls `cb_eval` (llama_context_params) before each node, asking whether its result is wanted, and calls it again for wanted
nodes once they are computed. Nodes that are not wanted are computed together, up to the next wanted one. Returning False from
the second call abandons the graph (ggml-backend.cpp, ggml_backend_sched_compute_splits). A node may be changed in the asking
call; the change stays as long as llama.cpp reuses the graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.fast_attention import FastAttention
from yarn_edge.graph.tap import GraphTap
from yarn_edge.llama_rules.effective import LivePositions
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.cells import CellMap
from yarn_edge.runtime.ggml import TensorStruct, check_struct
from yarn_edge.runtime.llama_api import llama

_OP = TensorStruct.op.offset


class GraphEdit(Protocol):
    """Changes the nodes of one operation. compiled: (callback, user data) that does so without Python, None if it needs Python."""

    op: int
    compiled: tuple[Any, int] | None
    live: LivePositions | None

    def edit(self, address: int) -> bool:
        """Change the node at `address`, which is of operation `op`. False if it is not as expected."""

    def begin(self) -> None:
        """Before an evaluation."""

    def check(self, complete: bool) -> None:
        """After an evaluation: raises YarnEdgeError if a graph was not as expected. complete: whether it was computed to its end."""

    def close(self) -> None:
        """After the context was freed."""


class GraphCallback:
    """What a context calls before and after each node (`GraphHook`): the edits first, then the tap."""

    def __init__(self, edits: Sequence[GraphEdit], tap: GraphTap | None = None) -> None:
        check_struct()
        self.edits, self.tap = tuple(edits), tap
        self.error: BaseException | None = None
        compiled = self._compiled()
        if compiled is not None:
            self.callback, self.user_data = compiled
        else:
            kind = llama().ggml_backend_sched_eval_callback
            self.callback, self.user_data = kind(self._called), 0
        self.in_python, self._failed = compiled is None, False
        self._by_op = {edit.op: edit for edit in edits}
        self.live = next((edit.live for edit in edits if edit.live is not None), None)

    def _compiled(self) -> tuple[Any, int] | None:
        """The callback and its user data, if Python need not be called."""
        compiled = [edit.compiled for edit in self.edits if edit.compiled is not None]
        if self.tap is not None or not compiled or len(compiled) != len(self.edits):
            return None
        if len(compiled) == 1:
            return compiled[0]
        from yarn_edge.graph.chain import chain_callback, chain_state

        self._state = chain_state(compiled)
        return chain_callback(), self._state.ctypes.data

    @property
    def in_order(self) -> bool:
        """See `GraphHook`."""
        return any(isinstance(edit, FastAttention) and edit.in_order for edit in self.edits)

    def place(self, cells: CellMap, parts: Sequence[BatchPart]) -> None:
        """See `GraphHook`."""
        for edit in self.edits:
            if isinstance(edit, FastAttention):
                edit.place(cells, parts)

    def begin(self) -> None:
        """Before an evaluation."""
        self._failed = False
        for edit in self.edits:
            edit.begin()

    def check(self, complete: bool) -> None:
        """After an evaluation: raises what the callback could not."""
        error, self.error = self.error, None
        if isinstance(error, YarnEdgeError) or (error is not None and not isinstance(error, Exception)):
            raise error
        if error is not None:
            raise YarnEdgeError(f"the graph tap failed: {type(error).__name__}: {error}") from error
        for edit in self.edits:
            edit.check(complete)

    def close(self) -> None:
        """After the context was freed."""
        for edit in self.edits:
            edit.close()

    def _called(self, address: int, asking: bool, _user_data: object) -> bool:
        """Called by ggml, so it must not raise. After a failure every graph is abandoned at its first node."""
        if self.error is None and not self._failed:
            try:
                return self._answer(address, asking)
            except BaseException as error:  # raised by `check`
                self.error = error
        return asking

    def _answer(self, address: int, asking: bool) -> bool:
        if asking:
            edit = self._by_op.get(ctypes.c_int32.from_address(address + _OP).value)
            if edit is not None and not edit.edit(address):
                self._failed = True  # its `check` says why
                return True
        return self.tap.see(address, asking) if self.tap is not None else False
