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

# Architectures whose cache is one key and one value of every position in every layer.
PLAIN_CACHE = frozenset({"llama", "qwen2", "qwen3"})


def kv_bytes(file: GGUFFile, n_ctx: int, kv_type: str) -> int:
    """Bytes of the KV cache for `n_ctx` tokens: keys and values of every layer (full attention, grouped heads)."""
    heads = file.required_int("attention.head_count")
    kv_heads = int(file.number("attention.head_count_kv", heads) or heads)
    default = file.required_int("embedding_length") // heads
    widths = sum(int(file.number(f"attention.{n}_length", default) or 0) for n in ("key", "value"))
    return int(file.required_int("block_count") * kv_heads * widths * n_ctx * KV_TYPES[kv_type][1])


def known_kv_bytes(file: GGUFFile, n_ctx: int, kv_type: str) -> int | None:
    """`kv_bytes` where the architecture's cache is of the plain form, None where it may be another."""
    return kv_bytes(file, n_ctx, kv_type) if file.architecture in PLAIN_CACHE else None


def check_memory(file: GGUFFile, n_ctx: int, kv_type: str) -> None:
    """Refuse a KV cache for `n_ctx` tokens that the machine cannot hold, before it is asked to try: YarnEdgeError."""
    if file.architecture not in PLAIN_CACHE:  # its cache may be of another form
        return
    needed, free = kv_bytes(file, n_ctx, kv_type), available_bytes()
    if needed > free:
        raise YarnEdgeError(
            f"{file.path}: a context of {n_ctx} tokens with a {kv_type} cache needs {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free: ask for a smaller context or cache type"
        )
