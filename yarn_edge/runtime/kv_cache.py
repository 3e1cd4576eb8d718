"""The KV cache: its types, and its size in bytes by context length."""

from __future__ import annotations

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.machine import available_bytes

# Types of the KV cache by llama.cpp's names: (enum ggml_type, bytes of one element = block bytes / block elements).
KV_TYPES: dict[str, tuple[int, float]] = {
    "f32": (0, 4.0), "f16": (1, 2.0), "bf16": (30, 2.0), "q8_0": (8, 34 / 32), "q5_1": (7, 24 / 32),
    "q5_0": (6, 22 / 32), "q4_1": (3, 20 / 32), "q4_0": (2, 18 / 32), "iq4_nl": (20, 18 / 32),
}  # fmt: skip
CTX_STEP = 256  # llama.cpp rounds contexts up to a multiple of this many tokens

# Architectures whose cache is one key and one value of every position in every layer.
PLAIN_CACHE = frozenset({"llama", "qwen2", "qwen3"})


def has_plain_cache(file: GGUFFile) -> bool:
    """Whether the cache holds one key and one value for every position in every layer, so that its size has a closed form."""
    return file.architecture in PLAIN_CACHE


def kv_bytes(file: GGUFFile, n_ctx: int, kv_type: str) -> int | None:
    """Bytes of the KV cache for `n_ctx` tokens; None if the architecture's cache may have another form than `has_plain_cache`.

    This is the closed form; `yarn_edge.memory.plan` asks llama.cpp, for every architecture and for everything else that a
    context takes.
    """
    if not has_plain_cache(file):
        return None
    heads = file.required_int("attention.head_count")
    kv_heads = int(file.number("attention.head_count_kv", heads) or heads)
    default = file.required_int("embedding_length") // heads
    widths = sum(int(file.number(f"attention.{n}_length", default) or 0) for n in ("key", "value"))
    return int(file.required_int("block_count") * kv_heads * widths * n_ctx * KV_TYPES[kv_type][1])


def check_room(file: GGUFFile, n_ctx: int, kv_type: str) -> None:
    """Raise YarnEdgeError if the KV cache for `n_ctx` tokens alone is larger than the free memory.

    A system that overcommits memory would end the process while the cache is filled. This is the last guard before the
    allocation, not a prediction: `yarn_edge.memory` has that.
    """
    needed, free = kv_bytes(file, n_ctx, kv_type), available_bytes()
    if needed is not None and needed > free:
        raise YarnEdgeError(
            f"{file.path}: a context of {n_ctx} tokens with a cache of type {kv_type} needs {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free: choose a smaller context or cache type"
        )
