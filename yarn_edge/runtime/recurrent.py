"""The state of linear attention (recurrent memories): it cannot go back to an earlier token, but to a copy that was taken there.

llama.cpp keeps keys and values only of layers with full attention, and can drop those from any position on. The state of the other
layers has one size for every context; `llama_memory_seq_rm` refuses to cut it. So a copy is taken now and then, and put back before
the rest is cut.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import Context
from yarn_edge.signals import deferred_ctrl_c

COPIES = 2  # that are held: of the last prompt and of the one before
_RECURRENT_PART = 1  # llama.h: LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

State = npt.NDArray[np.uint8]


class EarlierStates:
    """Copies of a sequence's recurrent state, by the number of tokens that it had read. A model without such a state needs none."""

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self.context, self.sequence = context, sequence
        self._states: dict[int, State] = {}

    def reachable(self, n_tokens: int, cached: int) -> int:
        """The largest number of tokens, up to `n_tokens`, that a cache of `cached` tokens can be cut to."""
        if not self.context.model.recurrent or n_tokens == cached:
            return n_tokens
        return max((n for n in self._states if n <= n_tokens), default=0)

    def take(self, n_tokens: int) -> None:
        """Copy the state, which has read `n_tokens`."""
        if self.context.model.recurrent:
            self._states[n_tokens] = _copied(self.context)
            for n in sorted(self._states)[:-COPIES]:
                del self._states[n]

    def cut(self, n_tokens: int) -> int:
        """Drop everything from position `n_tokens` on, or from an earlier one that can be reached. Returns how many tokens are kept."""
        self._states = {n: state for n, state in self._states.items() if n <= n_tokens}
        if self._keeps(n_tokens):
            return n_tokens
        for n in sorted(self._states, reverse=True):
            _put(self.context, self._states[n])
            if self._keeps(n):
                return n
        self.context.clear(self.sequence)
        return 0

    @contextmanager
    def at(self, n_tokens: int) -> Iterator[None]:
        """Inside the block the state is the copy taken after `n_tokens`, if there is one. Keys and values are all there."""
        if n_tokens not in self._states:
            yield
            return
        now = _copied(self.context)
        _put(self.context, self._states[n_tokens])
        try:
            yield
        finally:
            _put(self.context, now)

    def forget(self) -> None:
        """Drop all copies."""
        self._states = {}

    def _keeps(self, n_tokens: int) -> bool:
        try:
            self.context.keep(n_tokens, self.sequence)
        except YarnEdgeError:
            return False
        return True


def _copied(context: Context) -> State:
    api, handle = context.api, context.handle
    state = np.empty(api.llama_state_seq_get_size_ext(handle, 0, _RECURRENT_PART), np.uint8)
    with deferred_ctrl_c():
        written = api.llama_state_seq_get_data_ext(handle, _pointer(state), len(state), 0, _RECURRENT_PART)
    if written != len(state):
        raise YarnEdgeError(f"{context.model.path}: llama.cpp cannot copy its recurrent state")
    return state


def _put(context: Context, state: State) -> None:
    with deferred_ctrl_c():
        read = context.api.llama_state_seq_set_data_ext(context.handle, _pointer(state), len(state), 0, _RECURRENT_PART)
    if read != len(state):
        raise YarnEdgeError(f"{context.model.path}: llama.cpp cannot put a copy of its recurrent state back")


def _pointer(state: State) -> ctypes._Pointer[ctypes.c_ubyte]:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte))
