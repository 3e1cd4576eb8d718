"""The callback of live positions as compiled code (Numba, `yarn-edge[fast]`): a thousand nodes a token cost it next to nothing.

What is done to a node is `rope_edit`, the same functions that Python runs. It is compiled once, and then read from Numba's cache.
"""

from __future__ import annotations

import ctypes
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import carray, types

from yarn_edge.graph import rope_edit
from yarn_edge.graph.rope_edit import HEAD, N_ROWS, OP, ROW_WIDTH
from yarn_edge.runtime.compiled_code import as_callback, from_cache, named_by
from yarn_edge.runtime.ggml import TensorStruct

_BYTES = ctypes.sizeof(TensorStruct)
_OP = TensorStruct.op.offset // 4
_PARTS = {name: numba.njit(getattr(rope_edit, name)) for name in ("_layer_of", "_fault")}
_edit_node = numba.njit(FunctionType(rope_edit.edit_node.__code__, {**vars(rope_edit), **_PARTS}))


def compiled_callback() -> Any:
    """The callback as llama.cpp takes it; its user data is the address of the state of `rope_edit`."""
    sources = __file__, str(rope_edit.__file__)
    return as_callback(from_cache(_compiled, sources=sources, name="the positions callback", takes="2 s"))


def _compiled(version: int, keep: bool) -> Any:
    def before_node(address: Any, asking: int, user_data: Any) -> int:
        if not asking:
            return 0
        words, head = carray(address, _BYTES // 4, np.int32), carray(user_data, HEAD, np.int64)
        if words[_OP] != head[OP]:
            return 0
        state = carray(user_data, HEAD + head[N_ROWS] * ROW_WIDTH, np.int64)
        longs, characters = carray(address, _BYTES // 8, np.int64), carray(address, _BYTES, np.int8)
        return 0 if _edit_node(words, longs, characters, state, False) else 1

    return numba.cfunc(types.uint8(types.voidptr, types.uint8, types.voidptr), cache=keep)(
        named_by(version, before_node)
    )
