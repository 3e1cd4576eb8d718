"""Flash attention or plain attention, and how many tokens one graph has: one policy for every command that chooses.

On a CPU, llama.cpp's flash attention reads the cache token by token. Plain attention multiplies matrices, and holds the scores of a
graph: heads x tokens x context, in float32. A quantized cache needs flash attention, and GPUs have fast kernels for it. So a CPU
with a 16- or 32-bit cache gets plain attention, in graphs that are small enough to keep the scores within SCORE_BYTES.

The constants were measured with SmolLM2-135M Q4_1 on an EPYC with AVX-512, one thread, in CPU time; medians of 5 (depth 128: 7):

    depth   512 tokens read, s                                         one token generated, ms
            flash   plain, in graphs of 32     64    128    256    512   flash   plain
      128    2.17                 2.24   2.20   2.18      -   2.30     9.1     8.7
     2048    2.95                 3.08   3.15   3.22   3.26   3.33    16.5    14.9
     8192    8.45                 6.39   6.56   6.57   6.71   6.80    42.9    30.3

Plain attention generates faster at every depth and reads faster when there is much to read. Graphs of 32 tokens read as fast as
larger ones, so reading needs no larger minimum than generation; graphs of 16 and 8 tokens lose 7 and 14 % at depth 128. With
LEAST_TOKENS fixed, SCORE_BYTES decides how long a context with plain attention can be: 256 MiB reach 65,536 tokens with 32 heads,
192 and 128 MiB would reach 49,152 and 32,768, and read no faster.

Where our kernels do not run, three commands leave the choice to llama.cpp. `bench` and `imatrix` are compared with llama-bench and
llama-imatrix, which do so.
The adapter for lm-evaluation-harness reuses cached beginnings in batches of any size, which must not change a result: on quantized
weights plain attention, whose rounding depends on the batch, did so by up to 0.3 nats, flash attention by less than 0.001.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from yarn_edge.attention.choose import LEAST_CONTEXT, fastest_attention
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import CTX_STEP, UNQUANTIZED, kv_types, undivided_key

SCORE_BYTES = 256 << 20
LEAST_TOKENS = 32  # of one graph


def choose_attention(settings: ContextSettings, file: GGUFFile, *, on_cpu: bool) -> ContextSettings:
    """The settings with attention and n_ubatch chosen; settings.n_ubatch, or n_batch, is the largest graph.

    settings.attention: "auto" for the fastest on this machine; "ggml" for plain or flash by the rule above; others are kept.
    """
    if settings.attention == "auto":
        fastest = fastest_attention(settings, file) if on_cpu else "ggml"
        return choose_attention(replace(settings, attention=fastest), file, on_cpu=on_cpu)
    most, wanted = settings.n_ubatch or settings.n_batch, settings.attention
    if wanted not in ("ggml", "plain") or (wanted == "ggml" and not on_cpu):
        return settings
    n_ctx, least = settings.n_ctx or int(file.number("context_length") or 0), min(most, LEAST_TOKENS)
    plain = plain_tokens(file, n_ctx, settings.kv_type, most, least)
    if plain is None and wanted == "ggml":
        return settings
    return replace(settings, n_ubatch=plain or least, attention="plain")


def plain_tokens(file: GGUFFile, n_ctx: int, kv_type: str, most: int, least: int) -> int | None:
    """Tokens of a graph: `most`, halved down to `least` until the scores take at most SCORE_BYTES.

    None if they take more even then, or if plain attention is not possible: V is quantized, or the number of heads is unknown.
    """
    heads = n_heads(file)
    if kv_types(kv_type)[1] not in UNQUANTIZED or undivided_key(file, kv_type) is not None or not heads:
        return None
    cells, tokens = -(-n_ctx // CTX_STEP) * CTX_STEP, most
    while tokens > least and heads * tokens * cells * 4 > SCORE_BYTES:
        tokens = max(least, tokens // 2)
    return tokens if heads * tokens * cells * 4 <= SCORE_BYTES else None


def last_contexts(file: GGUFFile, limit: int, n_batch: int = 512) -> list[int]:
    """The context lengths, ascending, after which `choose_attention` changes its answer; the last one is `limit`."""
    heads, ends, tokens = n_heads(file), {LEAST_CONTEXT - CTX_STEP}, n_batch
    while heads and tokens >= LEAST_TOKENS:
        ends.add(SCORE_BYTES // (heads * tokens * 4) // CTX_STEP * CTX_STEP)
        tokens //= 2
    return sorted({end for end in ends if 0 < end < limit} | {limit})


def n_heads(file: GGUFFile) -> int:
    """The number of query heads: the largest one if it differs by layer, 0 if the file has none."""
    count = file.metadata.get(f"{file.architecture}.attention.head_count", 0)
    return int(np.max(count)) if isinstance(count, (int, float, np.ndarray)) else 0
