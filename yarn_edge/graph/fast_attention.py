"""Attention in our own kernels: every FLASH_ATTN_EXT node that a kernel knows is given to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from yarn_edge.attention.compiled import callback, kernel_of, why_not_compiled
from yarn_edge.attention.group_table import group_table
from yarn_edge.attention.kernel_shapes import kernel_shapes, no_kernels, work_floats
from yarn_edge.attention.work import FEW, WorkArea, few_rooms
from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_rules.effective import LivePositions
from yarn_edge.progress import note
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.cells import CellMap
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml import op_number
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model


class FastAttention:
    """The edit of one context on a CPU. few, many: whether kernels take nodes of up to 16 queries, and of more.

    Raises YarnEdgeError where there are no kernels: without Numba, on a GPU, for this cache type or these heads.
    """

    live: LivePositions | None = None

    def __init__(self, model: Model, settings: ContextSettings, *, few: bool = True, many: bool = True) -> None:
        why = (
            "it runs on a GPU"
            if model.device is not None
            else no_kernels(model.gguf, settings.kv_type) or why_not_compiled()
        )
        if why is not None:
            raise YarnEdgeError(f"{model.path}: no fast attention: {why}")
        from yarn_edge.attention import takeover

        self._names, self.op = takeover, op_number(b"FLASH_ATTN_EXT")
        shapes = kernel_shapes(model.gguf, settings.kv_type)
        self._work = WorkArea(settings.threads or physical_threads(), *work_floats(model.gguf, settings))
        kernels = [(shape, kernel_of(shape)) for shape in sorted({shape for _, shape in shapes})]
        rows = [takeover.kernel_row(*shape, *(k.address if on else 0 for on in (few, many))) for shape, k in kernels]
        head = np.zeros(takeover.HEAD, np.int64)
        head[takeover.FLASH_OP], head[takeover.CUSTOM_OP] = self.op, op_number(b"CUSTOM")
        head[takeover.SET_ROWS_OP] = op_number(b"SET_ROWS")
        head[takeover.WORK], head[takeover.N_KERNELS] = self._work.address, len(rows)
        head[takeover.SCRATCH_ROOM], head[takeover.PARTIALS_ROOM] = self._work.scratch, self._work.partials
        self._state = np.concatenate([head, *rows])
        self.compiled: tuple[Any, int] | None = (callback(), self._state.ctypes.data)
        self._told, self._wants_all = False, few and many
        self._few = FEW * few_rooms(settings.n_seq)
        self._groups = self._cells = np.zeros(0, np.int64)

    @property
    def calls(self) -> int:
        """Nodes that kernels have computed."""
        return self._work.calls

    @property
    def taken(self) -> int:
        """Nodes that were given to kernels; a graph that llama.cpp uses again counts once."""
        return int(self._state[self._names.TAKEN])

    @property
    def left(self) -> int:
        """Nodes that no kernel knows, and that ggml computes."""
        return int(self._state[self._names.LEFT])

    def edit(self, address: int) -> bool:
        """See `GraphEdit`."""
        assert self.compiled is not None
        made, state = self.compiled
        made(address, True, state)
        return True

    @property
    def in_order(self) -> bool:
        """See `GraphHook`."""
        return self._wants_all

    def place(self, cells: CellMap, parts: Sequence[BatchPart]) -> None:
        """See `GraphHook`."""
        if sum(len(part.tokens) for part in parts if part.generated) > self._few:
            raise ValueError(f"more than {self._few} tokens of answers in a batch")
        self._groups, self._cells = group_table(cells, parts)
        self._work.place(self._groups)
        self._state[self._names.CELLS], self._state[self._names.N_CELLS] = self._cells.ctypes.data, len(self._cells)

    def begin(self) -> None:
        """See `GraphEdit`."""

    def check(self, complete: bool) -> None:
        """See `GraphEdit`. Says once what is left to ggml."""
        if self._state[self._names.MISPLACED]:
            self._state[self._names.MISPLACED] = 0
            raise YarnEdgeError("llama.cpp keeps tokens in other cells of the cache than expected: take --parallel 1")
        if self._told or not complete:
            return
        if self.left:
            self._told = True
            reason = self._names.REASONS[int(self._state[self._names.REASON])]
            note(f"note: ggml computes some of this model's attention, not the fast kernels: {reason}")
        elif not self.taken and self._wants_all:
            self._told = True
            note("note: ggml computes this model's attention: llama.cpp has no flash attention for its architecture")

    def close(self) -> None:
        """See `GraphEdit`."""
