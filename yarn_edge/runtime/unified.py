"""A context whose sequences share the cells of one cache: what several of them have in common is held once.

Sequences are evaluated together, a part of each in one batch. The map of the cells says what each of them holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.cells import CellMap, Cells
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.graph_hook import GraphHook
from yarn_edge.runtime.kv_cache import has_plain_cache
from yarn_edge.runtime.model import Model


class UnifiedContext(Context):
    """settings.n_seq sequences over settings.n_ctx cells. in_order: attention reads each one's cells by position, so that where
    they are changes nothing.
    """

    def __init__(self, model: Model, settings: ContextSettings, *, hook: GraphHook | None = None) -> None:
        super().__init__(model, settings, hook=hook)
        self.cells = CellMap(self.n_ctx, settings.n_seq)
        self._rows: dict[int, int] = {}  # of logits, by token
        self.in_order = hook is not None and hook.in_order and has_plain_cache(model.gguf)

    def evaluate_parts(self, parts: Sequence[BatchPart]) -> None:
        """Evaluate parts in one graph. Raises YarnEdgeError, KeyboardInterrupt; then the parts' sequences end where they began."""
        n_tokens = sum(len(part.tokens) for part in parts)
        if n_tokens > self.n_ubatch:
            raise ValueError(f"{n_tokens} tokens: a graph holds {self.n_ubatch}")
        cells = self.cells.find(n_tokens)
        if cells is None:
            raise YarnEdgeError(f"the context of {self.n_ctx} tokens is full")
        self._batch.fill(parts)
        self._rows = _rows(parts)
        self.cells.take(cells, [(part.sequence, part.start, len(part.tokens)) for part in parts])
        if self.in_order:
            assert self._hook is not None
            self._hook.place(self.cells, parts)
        try:
            self._decode()
        except BaseException:
            for part in parts:
                self.keep(part.start, part.sequence)
            raise

    def logits_of(self, output: int) -> npt.NDArray[np.float32]:
        """See `Context.logits_of`. output: index of a token in the last evaluation."""
        return super().logits_of(self._rows[output])

    def share(self, source: int, target: int, n_tokens: int) -> None:
        """Let `target` hold the first n_tokens tokens of `source`, in the same cells, and nothing else."""
        self.clear(target)
        self.api.llama_memory_seq_cp(self._memory, source, target, 0, n_tokens)
        self.cells.copy(source, target, n_tokens)

    def keep(self, n_tokens: int, sequence: int = 0) -> None:
        """See `Context.keep`."""
        super().keep(n_tokens, sequence)
        self.cells.keep(sequence, n_tokens)

    def clear(self, _sequence: int = 0) -> None:
        """Drop what a sequence holds."""
        self.keep(0, _sequence)

    def saved_order(self, sequence: int) -> Cells:
        """The positions of a sequence's tokens in the order in which `save_state` writes them."""
        return self.cells.saved_order(sequence)

    def load_state(self, path: Path, tokens: Sequence[int], sequence: int = 0, order: Cells | None = None) -> bool:
        """See `Context.load_state`. order: what `saved_order` was; None if it was that of the positions."""
        if self.cells.free + self.cells.lengths[sequence] < len(tokens):
            return False
        if not super().load_state(path, tokens, sequence):
            return False
        self.cells.restore(sequence, np.arange(len(tokens), dtype=np.int32) if order is None else order)
        return True


def _rows(parts: Sequence[BatchPart]) -> dict[int, int]:
    rows: dict[int, int] = {}
    end = 0
    for part in parts:
        end += len(part.tokens)
        for token in range(end - part.outputs, end):
            rows[token] = len(rows)
    return rows
