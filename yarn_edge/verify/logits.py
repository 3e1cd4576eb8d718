"""The check of `verify --against`: next-token distributions of the GGUF against transformers in float32, by position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.adapter import MERGED, model_name
from yarn_edge.checkpoint.config_file import find_adapter, read_config
from yarn_edge.checkpoint.dialects import recognise, text_section
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import one_line
from yarn_edge.flags import NO_OVERRIDES, ScalingOverrides
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.graph.opening import open_context
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import bar, note
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import UNQUANTIZED, kv_types
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.checks import Check, judge, on_backend, skipped
from yarn_edge.verify.transformers_reference import Divergence, divergence, merge, reference_logits

LOGIT_TOKENS = 768
LOGIT_BATCH = 128
# general.file_type (llama.h: enum llama_ftype) -> the largest mean KL in nats that the type itself explains: rounding for
# F32, at least twice the value of SmolLM2-135M for the others (docs/verify.md). Larger models lose less.
KL_LIMITS = {0: 1e-8, 1: 1e-4, 32: 1e-3, 7: 1.5e-2, 18: 4e-2, 8: 0.35, 9: 0.35, 14: 0.35, 15: 0.35, 16: 0.35, 17: 0.35}
KL_LIMIT_OTHERS = 1.3
# What the cache adds to that: SmolLM2-135M in F32 shows 2e-6, 1e-4, 7e-4, 3e-2 and 1e-1; a large attention factor adds more.
CACHE_LIMITS = {"f32": 0.0, "f16": 5e-4, "bf16": 5e-3, "q8_0": 1.5e-2, "q5_1": 0.15, "q5_0": 0.15}
CACHE_LIMIT_OTHERS = 0.5
# What a GPU adds: float32 products in TF32 (10 bits of mantissa). An H200 shows 8e-6, and 4e-5 with attention factor 1.35.
GPU_LIMIT = 2e-4
# What an architecture adds: ggml's GELU of float32 is a table in half precision on the CPU (ggml-cpu/vec.h, ggml_vec_gelu_f32).
# SmolLM2-135M with such a GELU shows 8.9e-6, the tiny Gemma 3 of the tests 4.5e-8, of which 9e-10 are left if the reference rounds so.
GELU_LIMITS = {"gemma3": 2e-5}
# Rope types that only checkpoints' own code computes, not transformers.
NOT_IN_TRANSFORMERS = frozenset({"deepseek_yarn", "telechat3-yarn", "dynamic-yarn"})


def check_logits(
    model: Model,
    checkpoint: Path,
    replaced: RopeScaling | None,
    n_tokens: int,
    threads: int | None = None,
    *,
    kv_type: str = "f32",
    backend: str = "cpu",
) -> Check:
    """Mean KL divergence from transformers in float32 over `n_tokens` of English, in total and by buckets of position.

    replaced: a scaling for transformers to use instead of the checkpoint's own (see `checkpoint_scaling`).
    """
    name = on_backend("logits", backend)
    merged, same_base = _merged(model.gguf, checkpoint)
    if same_base:
        return skipped(name, f"the file has adapters merged in ({merged}): {checkpoint} is without them")
    tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)[:n_tokens]
    n_embeddings = text_section(read_config(checkpoint)).required_integer("vocab_size")
    if n_embeddings != model.n_vocab:
        detail = f"the file has {model.n_vocab} tokens, the checkpoint {n_embeddings} embeddings"
        return Check(name, "fail", float("inf"), 0.0, detail)
    adapter = find_adapter(checkpoint)
    if adapter is not None:
        files = ", ".join(adapter.files)
        detail = f"the checkpoint holds {adapter.what} ({files}), which is not in the file: {adapter.remedy}"
        return Check(name, "fail", float("inf"), 0.0, detail)
    truth = reference_logits(checkpoint, tokens, replaced)
    parts: list[Divergence] = []
    types = kv_types(kv_type)
    settings = ContextSettings(
        n_ctx=len(tokens),
        n_batch=LOGIT_BATCH,
        kv_type=kv_type,
        threads=threads,
        attention="plain" if all(kind in UNQUANTIZED for kind in types) else "flash",
    )
    with open_context(model, settings) as c, bar("Comparing logits", len(tokens), "tokens") as advance:
        for start in range(0, len(tokens), LOGIT_BATCH):
            c.evaluate(tokens[start : start + LOGIT_BATCH], start, "all", advance)
            parts.append(divergence(truth[start : start + LOGIT_BATCH], c.logits()))
    whole = merge(parts)
    ftype = model.gguf.metadata.get("general.file_type")
    limit = KL_LIMITS.get(ftype, KL_LIMIT_OTHERS) if isinstance(ftype, int) else KL_LIMIT_OTHERS
    limit += max(CACHE_LIMITS.get(kind, CACHE_LIMIT_OTHERS) for kind in types)
    limit += 0.0 if backend == "cpu" else GPU_LIMIT
    gelu = GELU_LIMITS.get(model.gguf.architecture, 0.0)
    limit += gelu
    detail = (
        f"mean KL (nats) over {whole.n_tokens} tokens, {kv_type} cache; max {whole.kl_max:.2e}, top-1 {whole.top1:.2%}"
    )
    if gelu:
        detail += f"; {gelu:g} of the limit are for ggml's GELU, which is in half precision on the CPU"
    if replaced is not None:
        detail += "; transformers used the scaling as yarn-edge reads it"
    if merged:
        detail += f"; the file has adapters merged in ({merged}), which the checkpoint must have, too"
    return judge(name, whole.kl_mean, limit, detail, _data(whole, parts, kv_type))


def _merged(file: GGUFFile, checkpoint: Path) -> tuple[str, bool]:
    """(the adapters in a file's weights, "" without any; whether the checkpoint has the name of the base that they were put on)."""
    names, name = (file.metadata.get(key) for key in (MERGED, "general.name"))
    if not isinstance(names, str) or not isinstance(name, str):
        return "", False
    return one_line(names, 200), name.startswith(f"{model_name(checkpoint)} + ")


def _data(whole: Divergence, parts: list[Divergence], kv_type: str) -> dict[str, Any]:
    buckets = [
        {
            "start": i * LOGIT_BATCH,
            "end": i * LOGIT_BATCH + p.n_tokens,
            "kl_mean": p.kl_mean,
            "kl_max": p.kl_max,
            "top1": p.top1,
        }
        for i, p in enumerate(parts)
    ]
    return {
        "n_tokens": whole.n_tokens,
        "kv_type": kv_type,
        "kl_max": whole.kl_max,
        "top1": whole.top1,
        "buckets": buckets,
    }


def checkpoint_scaling(
    folder: Path, overrides: ScalingOverrides = NO_OVERRIDES
) -> tuple[RopeScaling, RopeScaling | None, RopeScaling | None]:
    """(scaling, that of layers with a sliding window if it differs, the scaling that transformers must be given, if any).

    transformers ignores the flags and --freeze-at, and it ignores what the Nous code has beyond transformers' own YaRN (0.07,
    attn_factor, other betas). It then gets our reading of the config, and its logits prove everything except that reading.
    """
    config = read_config(folder)
    positions = read_positions(config, overrides)
    for text in positions.assumptions:
        note(f"note: {text}")
    parts = positions.parts
    sliding = parts.get("sliding_attention") if len(parts) > 1 else None
    scaling = parts["full_attention"] if sliding and "full_attention" in parts else read_scaling(config, overrides)
    dialect = recognise(config)
    block = text_section(config).section(dialect.block)
    kind = (block.values.get("rope_type") or block.values.get("type")) if block else None
    theirs = replace(
        scaling, attention_factor=scaling.default_attention_factor, ext_factor=1.0, beta_fast=32.0, beta_slow=1.0
    )
    own_code = dialect.attn_factor_multiplies and bool(scaling.differences(theirs))
    foreign = bool(overrides) or own_code or kind in NOT_IN_TRANSFORMERS
    return scaling, sliding, scaling if foreign else None
