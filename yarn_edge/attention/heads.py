"""The heads of a model's attention, as its file describes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from yarn_edge.gguf.file import GGUFFile


class HeadShape(NamedTuple):
    """Heads of one kind of layer: their numbers, and the floats of one of K and of V."""

    query: int
    kv: int
    d_k: int
    d_v: int


def head_shapes(file: GGUFFile) -> list[HeadShape]:
    """The kinds of heads that layers have; none if the file does not say, or if keys are compressed (MLA)."""
    if file.number("attention.kv_lora_rank", 0):
        return []
    queries = _per_layer(file, "attention.head_count")
    keys = _per_layer(file, "attention.head_count_kv") or queries
    if not queries or not keys:
        return []
    default = int(file.number("embedding_length", 0) or 0) // max(queries)
    sizes = {_sizes(file, default, "")} | ({_sizes(file, default, "_swa")} if _has(file, "_swa") else set())
    layers = max(len(queries), len(keys))
    pairs = {(queries[i % len(queries)], keys[i % len(keys)]) for i in range(layers)}
    return sorted(
        HeadShape(q, kv, *size) for q, kv in pairs for size in sizes if q > 0 and kv > 0 and q % kv == 0 and all(size)
    )


def _sizes(file: GGUFFile, default: int, which: str) -> tuple[int, int]:
    k, v = (file.number(f"attention.{name}_length{which}", default) for name in ("key", "value"))
    return int(k or 0), int(v or 0)


def _has(file: GGUFFile, which: str) -> bool:
    return f"{file.architecture}.attention.key_length{which}" in file.metadata


def _per_layer(file: GGUFFile, key: str) -> list[int]:
    value = file.metadata.get(f"{file.architecture}.{key}")
    return [] if value is None or isinstance(value, (str, list)) else [int(v) for v in np.atleast_1d(np.asarray(value))]
