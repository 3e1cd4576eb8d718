"""Bytes: of the KV cache by context and cache type, of what the machine has to give, and of what this process holds."""

from __future__ import annotations

from pathlib import Path

import psutil

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf_file import GGUFFile

# Types of the KV cache by llama.cpp's names: (enum ggml_type, bytes of one element = block bytes / block elements).
KV_TYPES: dict[str, tuple[int, float]] = {
    "f32": (0, 4.0), "f16": (1, 2.0), "bf16": (30, 2.0), "q8_0": (8, 34 / 32), "q5_1": (7, 24 / 32),
    "q5_0": (6, 22 / 32), "q4_1": (3, 20 / 32), "q4_0": (2, 18 / 32), "iq4_nl": (20, 18 / 32),
}  # fmt: skip


STATUS = Path("/proc/self/status")
RESERVED_BYTES = 1 << 30  # for the rest of the system; llama-fit-params leaves as much on each device

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


def available_bytes() -> int:
    """Memory that a new program can have without swapping, in bytes."""
    return int(psutil.virtual_memory().available)


def total_bytes() -> int:
    """Memory of the machine, in bytes."""
    return int(psutil.virtual_memory().total)


def spare_bytes(free: int | None = None) -> int:
    """What a model may take of the free memory (the machine's, or a device's) so that the rest of the system goes on.

    That is all but 1 GiB, or but an eighth where that is less.
    """
    free = available_bytes() if free is None else free
    return free - min(RESERVED_BYTES, free // 8)


def resident_bytes() -> int:
    """Bytes of memory that this process holds now, its own pages and those of mapped files."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most that `resident_bytes` ever was."""
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024


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
