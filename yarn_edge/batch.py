"""llama_batch: the tokens of one call of llama_decode, each with its position, its sequence, and whether it is an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Batch:
    """Room for `n_tokens` tokens, each in one sequence. `struct` is the llama_batch; call `free` at the end."""

    def __init__(self, api: Any, n_tokens: int) -> None:
        self._api = api
        self.struct = api.llama_batch_init(n_tokens, 0, 1)

    def fill(self, sequences: Sequence[Sequence[int]], start: int, all_outputs: bool = False) -> None:
        """Hold these tokens alone: sequence 0, 1, …, each at the positions start, start + 1, …"""
        batch, at = self.struct, 0
        for number, tokens in enumerate(sequences):
            for position, token in enumerate(tokens, start):
                batch.token[at] = token
                batch.pos[at] = position
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = number
                batch.logits[at] = all_outputs
                at += 1
        batch.n_tokens = at

    def mark_last(self, n_tokens: int) -> None:
        """The last `n_tokens` tokens are outputs."""
        for at in range(max(0, self.struct.n_tokens - n_tokens), self.struct.n_tokens):
            self.struct.logits[at] = True

    @property
    def n_outputs(self) -> int:
        """Tokens that are outputs."""
        return sum(self.struct.logits[i] for i in range(self.struct.n_tokens))

    def free(self) -> None:
        """Give its memory back."""
        self._api.llama_batch_free(self.struct)
