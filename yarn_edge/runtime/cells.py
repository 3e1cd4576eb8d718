"""Which cells of a unified cache hold which tokens: llama.cpp's own placement, followed step by step.

llama.cpp does not say where it puts a token, but it decides by simple rules (llama-kv-cache.cpp: find_slot, seq_rm, seq_cp,
apply_ubatch). Attention that must not depend on neighbors reads a sequence's cells in the order of their positions; the fast
attention compares each batch's cells with those that the graph uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Cells = npt.NDArray[np.int32]


class CellMap:
    """The cells of `n_seq` sequences. places[s, p]: the cell of position p of sequence s, for p < lengths[s]."""

    def __init__(self, n_cells: int, n_seq: int) -> None:
        self.size = n_cells
        self.places = np.zeros((n_seq, n_cells), np.int32)
        self.lengths = [0] * n_seq
        self._uses = np.zeros(n_cells, np.int32)  # sequences that hold each cell
        self.used = 0
        self._head = 0

    @property
    def free(self) -> int:
        """Cells that hold nothing."""
        return self.size - self.used

    def of(self, sequence: int) -> Cells:
        """The cells of a sequence, by position."""
        return self.places[sequence, : self.lengths[sequence]]

    def held_by(self, parts: Iterable[tuple[int, int]]) -> int:
        """The number of cells that these sequences hold together, of each the first so many tokens."""
        held = np.zeros(self.size, np.bool_)
        for sequence, n_tokens in parts:
            held[self.of(sequence)[:n_tokens]] = True
        return int(np.count_nonzero(held))

    def find(self, n_tokens: int) -> Cells | None:
        """The cells that the next n_tokens will take, in their order; None if there are too few."""
        start = 0 if self._head > self.used + 2 * n_tokens else self._head
        if n_tokens == 1 and start < self.size and not self._uses[start]:
            return np.array([start], np.int32)
        if n_tokens > self.free:
            return None
        empty = np.flatnonzero(self._uses == 0).astype(np.int32)
        first = int(np.searchsorted(empty, start))
        return np.concatenate([empty[first:], empty[:first]])[:n_tokens]

    def take(self, cells: Cells, sequences: Sequence[tuple[int, int, int]]) -> None:
        """Give cells to (sequence, start, number of tokens), one after the other."""
        at = 0
        for sequence, start, count in sequences:
            self.places[sequence, start : start + count] = cells[at : at + count]
            self.lengths[sequence] = start + count
            at += count
        self._uses[cells] += 1
        self.used += len(cells)
        self._head = int(cells[-1]) + 1

    def keep(self, sequence: int, n_tokens: int) -> None:
        """Free what a sequence holds from position n_tokens on."""
        dropped = self.of(sequence)[n_tokens:]
        if not len(dropped):
            return
        self._uses[dropped] -= 1
        emptied = dropped[self._uses[dropped] == 0]
        self.used -= len(emptied)
        if len(emptied):
            self._head = min(self._head, int(emptied.min()))
        self.lengths[sequence] = n_tokens

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Share the first n_tokens cells of `source` with `target`, which is empty."""
        cells = self.places[source, :n_tokens]
        self.places[target, :n_tokens] = cells
        self._uses[cells] += 1
        self.lengths[target] = n_tokens

    def clear(self) -> None:
        """Free everything."""
        self._uses[:] = 0
        self.lengths = [0] * len(self.lengths)
        self.used = self._head = 0

    def saved_order(self, sequence: int) -> Cells:
        """The positions of a sequence's tokens in the order in which llama.cpp saves them: that of the cells."""
        return np.argsort(self.of(sequence), kind="stable").astype(np.int32)

    def restore(self, sequence: int, order: Cells) -> None:
        """Note that a saved state of len(order) tokens was loaded, whose positions come in this order."""
        self.keep(sequence, 0)
        cells = self.find(len(order))
        assert cells is not None
        self.take(cells, [(sequence, 0, len(order))])
        self.places[sequence, order] = cells
