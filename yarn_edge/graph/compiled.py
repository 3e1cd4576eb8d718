"""The callback of live positions as compiled code (Numba, `yarn-edge[fast]`): a thousand nodes a token cost it next to nothing.

What is done to a node is `rope_edit`, the same functions that Python runs.
"""

from __future__ import annotations

import ctypes
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import carray, types

from yarn_edge.graph import rope_edit
from yarn_edge.runtime.ggml import TensorStruct
from yarn_edge.runtime.llama_api import llama

_BYTES = ctypes.sizeof(TensorStruct)
_OP = TensorStruct.op.offset // 4


def compiled_callback() -> Any:
    """The callback as llama.cpp takes it; its user data is the address of the state of `rope_edit`. Compiles for a second."""
    layer_of, fault = (numba.njit(function) for function in (rope_edit._layer_of, rope_edit._fault))
    names = {**vars(rope_edit), "_layer_of": layer_of, "_fault": fault}
    edit_node = numba.njit(FunctionType(rope_edit.edit_node.__code__, names))
    op, n_rows, head, width = rope_edit.OP, rope_edit.N_ROWS, rope_edit.HEAD, rope_edit.ROW_WIDTH

    def before_node(address: Any, asking: int, user_data: Any) -> int:
        if not asking:
            return 0
        words = carray(address, _BYTES // 4, np.int32)
        values = carray(user_data, head, np.int64)
        if words[_OP] != values[op]:
            return 0
        state = carray(user_data, head + values[n_rows] * width, np.int64)
        longs, characters = carray(address, _BYTES // 8, np.int64), carray(address, _BYTES, np.int8)
        return 0 if edit_node(words, longs, characters, state, False) else 1

    made = numba.cfunc(types.uint8(types.voidptr, types.uint8, types.voidptr))(before_node)
    callback = ctypes.cast(made.address, llama().ggml_backend_sched_eval_callback)
    callback.compiled = made  # keeps its code
    return callback
