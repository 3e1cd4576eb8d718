"""Which kernels a model's attention needs, and whether there can be any. Needs no Numba."""

from __future__ import annotations

from yarn_edge.attention.heads import HeadShape, head_shapes
from yarn_edge.attention.node import KernelShape
from yarn_edge.attention.work import few_rooms, partials_floats, scratch_floats
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import CTX_STEP, kv_types
from yarn_edge.runtime.llama_api import physical_threads

# Cache types with kernels -> floats of a block, of which a head must hold whole ones.
KERNEL_TYPES = {"f16": 16, "bf16": 16, "q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_1": 32, "q4_0": 32}
MOST_WIDTH = 256  # floats of a head: a tile of larger ones would not stay in the processor's caches


def kernel_shapes(file: GGUFFile, kv_type: str) -> list[tuple[HeadShape, KernelShape]]:
    """The kinds of heads of a file with their kernels; `no_kernels` must be None."""
    return [(heads, KernelShape(*kv_types(kv_type), heads.d_k, heads.d_v)) for heads in head_shapes(file)]


def no_kernels(file: GGUFFile, kv_type: str) -> str | None:
    """Why there are no kernels for this file and this cache; None if there are."""
    types = kv_types(kv_type)
    if "f32" in types:
        return "llama.cpp rounds a cache of type f32 to f16 before it gets to attention: take f16"
    if not all(kind in KERNEL_TYPES for kind in types):
        return f"there is no kernel for a cache of type {kv_type} (there is for {', '.join(KERNEL_TYPES)})"
    shapes = head_shapes(file)
    if not shapes:
        return "its file does not describe plain heads"
    for heads in shapes:
        widths = zip((heads.d_k, heads.d_v), types, strict=True)
        if any(width % KERNEL_TYPES[kind] or width > MOST_WIDTH for width, kind in widths):
            return f"there is no kernel for heads of {heads.d_k} and {heads.d_v} floats with a cache of type {kv_type}"
    return None


def work_floats(file: GGUFFile, settings: ContextSettings) -> tuple[int, int]:
    """Floats that kernels work in: of one thread, and of the results of all spans. settings.n_ctx: 0 for the file's own."""
    shapes = head_shapes(file)
    sequences = few_rooms(settings.n_seq) if settings.unified else settings.n_seq
    n_ctx = settings.n_ctx or int(file.number("context_length") or 0)
    cells = -(-n_ctx // CTX_STEP) * CTX_STEP
    return (
        max(scratch_floats(s.d_k, s.d_v, s.query, s.kv) for s in shapes),
        max(partials_floats(s.d_v, s.query, sequences, cells) for s in shapes),
    )


def work_bytes(file: GGUFFile, settings: ContextSettings) -> int:
    """Bytes of the memory that kernels work in."""
    scratch, partials = work_floats(file, settings)
    return 4 * ((settings.threads or physical_threads()) * scratch + partials)
