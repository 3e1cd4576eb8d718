"""Which FLASH_ATTN_EXT nodes a kernel takes over, and how (ggml.h: struct ggml_tensor; ggml.c, ggml_flash_attn_ext).

The node becomes a GGML_OP_CUSTOM: its op_params hold a function, the number of tasks and a pointer, and ggml's threads call the
function. The scale moves to a place after them. Other nodes stay as they are, and ggml computes them.
"""

from __future__ import annotations

from typing import NamedTuple

from yarn_edge.runtime.ggml import TensorStruct

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
