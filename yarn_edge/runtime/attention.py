"""Flash attention or not, and the tokens of one graph: what is faster here without taking more memory than it is worth.

llama.cpp's flash attention on a CPU reads the cache token by token: at a depth of 12288 it generates at a fifth of the speed of
plain attention (docs/bench.md), which multiplies matrices and holds the scores of a batch: heads x tokens x context, in float32.
So plain attention is taken on a CPU with a cache in 16 or 32 bits, with as many tokens in one graph as these scores allow.
A quantized cache needs flash attention, and GPUs have fast kernels for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.ggml import Device

FlashAttention = Literal["auto", "on", "off"]

SCORE_BYTES = 256 << 20
MOST_TOKENS, LEAST_TOKENS = 512, 32  # of one graph


@dataclass(frozen=True)
class Attention:
    """Arguments of a context. n_ubatch: tokens of one graph."""

    flash: FlashAttention
    n_ubatch: int


def attention_for(
    file: GGUFFile,
    n_ctx: int,
    kv_type: str,
    device: Device | None,
    wanted: FlashAttention = "auto",
    n_batch: int = MOST_TOKENS,
) -> Attention:
    """The rule of this module. device: None for the CPU; n_batch: tokens of one call."""
    if wanted == "on" or (device is not None and device.kind != "cpu"):
        return Attention(wanted, n_batch)
    plain = plain_batch(file, n_ctx, kv_type, most=n_batch, least=min(LEAST_TOKENS, n_batch))
    if wanted == "off":
        return Attention("off", plain or min(LEAST_TOKENS, n_batch))
    return Attention("auto", n_batch) if plain is None else Attention("off", plain)


def plain_batch(
    file: GGUFFile, n_ctx: int, kv_type: str, *, most: int, least: int, score_bytes: int = SCORE_BYTES
) -> int | None:
    """The most tokens of one graph, halved from `most` down to `least`, whose scores take at most `score_bytes`.

    None where there are none, or the cache needs flash attention.
    """
    if not can_be_plain(file, kv_type):
        return None
    heads, tokens = n_heads(file), most
    while tokens > least and heads * tokens * n_ctx * 4 > score_bytes:
        tokens = max(least, tokens // 2)
    return tokens if heads * tokens * n_ctx * 4 <= score_bytes else None


def can_be_plain(file: GGUFFile, kv_type: str) -> bool:
    """Whether a cache of this type can do without flash attention, and the scores of this model can be counted."""
    return kv_type in ("f32", "f16", "bf16") and n_heads(file) > 0


def last_contexts(file: GGUFFile, limit: int, most: int = MOST_TOKENS) -> list[int]:
    """The longest contexts, ascending, up to which `plain_batch` has the same answer; `limit` is the last."""
    heads, ends, tokens = n_heads(file), [], most
    while heads and tokens >= LEAST_TOKENS:
        ends.append(SCORE_BYTES // (heads * tokens * 4))
        tokens //= 2
    return sorted({end for end in ends if 0 < end < limit} | {limit})


def n_heads(file: GGUFFile) -> int:
    """Query heads; of a number for each layer the greatest, 0 where the file has none."""
    told = file.metadata.get(f"{file.architecture}.attention.head_count", 0)
    return int(np.max(told)) if isinstance(told, (int, float, np.ndarray)) else 0
