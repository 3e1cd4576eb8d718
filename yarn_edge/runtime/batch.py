"""llama_batch: the tokens of one llama_decode call, each with its position, its sequence, and whether it is an output.

The C arrays are filled through NumPy views: assigning one token through ctypes costs as much as assigning all of them this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class BatchPart(NamedTuple):
    """Tokens of one sequence in a batch, from position `start` on. outputs: how many of the last ones get logits.

    generated: whether the model chose these tokens itself, one by one, rather than reading them as a prompt.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    outputs: int
    generated: bool = False


class LlamaBatch:
    """Room for `n_tokens` tokens, each in one sequence. `struct` is the llama_batch. Call `free` when done.

    n_outputs: number of tokens that are outputs.
    """

    def __init__(self, api: Any, n_tokens: int) -> None:
        self._api = api
        self.struct = api.llama_batch_init(n_tokens, 0, 1)
        self.n_outputs = 0
        views = (np.ctypeslib.as_array(data, (n_tokens,)) for data in self._arrays())
        self._token, self._pos, self._n_seq_id, self._logits = views
        self._n_seq_id[:] = 1
        self._sequence = np.full(n_tokens, -1)  # of each token: assigning it in the C arrays is slow

    def _arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.struct.token, self.struct.pos, self.struct.n_seq_id, self.struct.logits

    def fill(self, parts: Sequence[BatchPart]) -> None:
        """Replace the contents with parts of sequences."""
        at = self.n_outputs = 0
        for sequence, tokens, start, outputs, _generated in parts:
            end = at + len(tokens)
            self._token[at:end] = tokens
            self._pos[at:end] = np.arange(start, start + len(tokens))
            self._logits[at:end] = False
            self._logits[end - outputs : end] = True
            self._put_into(sequence, at, end)
            self.n_outputs += outputs
            at = end
        self.struct.n_tokens = at

    def fill_one(self, token: int, position: int) -> None:
        """Replace the contents with one token of sequence 0, as an output: the fast path of generation."""
        self._token[0], self._pos[0], self._logits[0] = token, position, True
        if self._sequence[0]:
            self._put_into(0, 0, 1)
        self.n_outputs = self.struct.n_tokens = 1

    def _put_into(self, number: int, at: int, end: int) -> None:
        """Assign tokens at … end - 1 to sequence `number`. Each token has its own array for that; most are set already."""
        for i in np.flatnonzero(self._sequence[at:end] != number) + at:
            self.struct.seq_id[i][0] = number
        self._sequence[at:end] = number

    def free(self) -> None:
        """Free the C arrays."""
        self._api.llama_batch_free(self.struct)
