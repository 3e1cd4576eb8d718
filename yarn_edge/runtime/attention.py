"""Flash attention or plain attention, and how many tokens one graph has: the one policy of every command.

llama.cpp's flash attention on a CPU reads the cache token by token: at a depth of 12288 it generates at a fifth of the speed of
plain attention (docs/bench.md). Plain attention multiplies matrices and holds the scores of a graph: heads x tokens x context,
in float32. So a CPU with a 16- or 32-bit cache gets plain attention, with graphs as small as it takes to keep the scores
within SCORE_BYTES. A quantized cache needs flash attention, and GPUs have fast kernels for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import CTX_STEP

SCORE_BYTES = 256 << 20
LEAST_TOKENS = 32  # of one graph
LEAST_READING = 128


def choose_attention(
    settings: ContextSettings, file: GGUFFile, *, on_cpu: bool, least: int = LEAST_TOKENS
) -> ContextSettings:
    """The settings with flash_attention and n_ubatch chosen. settings.flash_attention: "auto" to choose, else what must run.

    least: tokens of a graph below which flash attention is chosen instead, because small graphs read slowly.
    """
    most, wanted = settings.n_ubatch or settings.n_batch, settings.flash_attention
    if wanted == "on" or (wanted == "auto" and not on_cpu):
        return settings
    n_ctx = settings.n_ctx or int(file.number("context_length") or 0)
    fewest = min(most, least if wanted == "auto" else LEAST_TOKENS)
    plain = plain_tokens(file, n_ctx, settings.kv_type, most, fewest)
    if plain is None and wanted == "auto":
        return settings
    return replace(settings, n_ubatch=plain or fewest, flash_attention="off")


def plain_tokens(file: GGUFFile, n_ctx: int, kv_type: str, most: int, least: int) -> int | None:
    """Tokens of a graph, `most` halved down to `least` at the lowest, whose scores take at most SCORE_BYTES.

    None if there is no such number, or if plain attention is not possible: a quantized cache, or an unknown number of heads.
    """
    heads = n_heads(file)
    if kv_type not in ("f32", "f16", "bf16") or not heads:
        return None
    cells, tokens = -(-n_ctx // CTX_STEP) * CTX_STEP, most
    while tokens > least and heads * tokens * cells * 4 > SCORE_BYTES:
        tokens = max(least, tokens // 2)
    return tokens if heads * tokens * cells * 4 <= SCORE_BYTES else None


def last_contexts(file: GGUFFile, limit: int, n_batch: int = 512) -> list[int]:
    """The longest contexts, ascending, up to which `choose_attention` has the same answer; `limit` is the last."""
    heads, ends, tokens = n_heads(file), set(), n_batch
    while heads and tokens >= LEAST_TOKENS:
        ends.add(SCORE_BYTES // (heads * tokens * 4) // CTX_STEP * CTX_STEP)
        tokens //= 2
    return sorted({end for end in ends if 0 < end < limit} | {limit})


def n_heads(file: GGUFFile) -> int:
    """Query heads; the largest number if it differs by layer, 0 if the file has none."""
    count = file.metadata.get(f"{file.architecture}.attention.head_count", 0)
    return int(np.max(count)) if isinstance(count, (int, float, np.ndarray)) else 0
