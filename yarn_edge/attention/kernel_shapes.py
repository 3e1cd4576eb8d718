"""Which kernels a model's attention needs, and whether there can be any. Needs no Numba."""

from __future__ import annotations

from yarn_edge.attention.heads import HeadShape, head_shapes
from yarn_edge.attention.node import KernelShape
from yarn_edge.gguf.file import GGUFFile

# Cache types with kernels -> floats of a block, of which a head must hold whole ones.
KERNEL_TYPES = {"f16": 16, "bf16": 16, "q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_1": 32, "q4_0": 32}
MOST_WIDTH = 256  # floats of a head: a tile of larger ones would not stay in the processor's caches


def kernel_shapes(file: GGUFFile, kv_type: str) -> list[tuple[HeadShape, KernelShape]]:
    """The kinds of heads of a file with their kernels; `no_kernels` must be None."""
    return [(heads, KernelShape(kv_type, kv_type, heads.d_k, heads.d_v)) for heads in head_shapes(file)]


def no_kernels(file: GGUFFile, kv_type: str) -> str | None:
    """Why there are no kernels for this file and this cache; None if there are."""
    if kv_type == "f32":
        return "llama.cpp rounds a cache of type f32 to f16 before it gets to attention: take f16"
    if kv_type not in KERNEL_TYPES:
        return f"there is no kernel for a cache of type {kv_type} (there is for {', '.join(KERNEL_TYPES)})"
    shapes = head_shapes(file)
    if not shapes:
        return "its file does not describe plain heads"
    block = KERNEL_TYPES[kv_type]
    for heads in shapes:
        if any(width % block or width > MOST_WIDTH for width in (heads.d_k, heads.d_v)):
            return f"there is no kernel for heads of {heads.d_k} and {heads.d_v} floats with a cache of type {kv_type}"
    return None
