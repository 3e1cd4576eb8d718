"""Which FLASH_ATTN_EXT nodes a kernel takes over, and how (ggml.h: struct ggml_tensor; ggml.c, ggml_flash_attn_ext).

The node becomes a GGML_OP_CUSTOM: its op_params hold a function, the number of tasks and a pointer, and ggml's threads call the
function. The scale moves to a place after them. Other nodes stay as they are, and ggml computes them.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from yarn_edge.runtime.ggml import TensorStruct, op_number

NE, NB, SRC, DATA, OP = (getattr(TensorStruct, name).offset for name in ("ne", "nb", "src", "data", "op"))
PARAMS = TensorStruct.op_params.offset
# struct ggml_custom_op_params: the function, the number of tasks (-1: every thread), the pointer.
FUNCTION_AT, TASKS_AT, WORK_AT, SCALE_AT = PARAMS, PARAMS + 8, PARAMS + 16, PARAMS + 32


class KernelShape(NamedTuple):
    """What a kernel is compiled for: the cache types of K and V, and the floats of one head of each."""

    k_type: str
    v_type: str
    d_k: int
    d_v: int


def give_to_kernel(address: int, kernel: int, work: int) -> None:
    """Make the node at `address` one that ggml's threads give to the kernel with this address (`takeover` does so in a graph)."""
    node = np.ctypeslib.as_array((ctypes.c_uint8 * ctypes.sizeof(TensorStruct)).from_address(address))
    node[SCALE_AT : SCALE_AT + 4] = node[PARAMS : PARAMS + 4]
    node[FUNCTION_AT : FUNCTION_AT + 8].view(np.int64)[0] = kernel
    node[TASKS_AT : TASKS_AT + 4].view(np.int32)[0] = -1
    node[WORK_AT : WORK_AT + 8].view(np.int64)[0] = work
    node[OP : OP + 4].view(np.int32)[0] = op_number(b"CUSTOM")
