"""Tiny GGUFs whose positions are put into the live graph."""

from __future__ import annotations

from pathlib import Path

from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.description import canonical_keys
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

from . import tiny_gguf
from .tiny_gguf import HEAD_DIM

LIVE_YARN = RopeScaling(
    "yarn", 10000.0, HEAD_DIM, 256, 4.0, attention_factor=yarn_attention_factor(4.0), truncate=False, beta_fast=8.0
)


def live_file(
    path: Path, architecture: str, scaling: RopeScaling = LIVE_YARN, sliding: RopeScaling | None = None
) -> Path:
    """The file; the same one without scaling is beside it, as .plain.gguf."""
    plain = tiny_gguf.write(path.with_suffix(".plain.gguf"), architecture)
    plan = plan_rope(scaling, architecture, sliding=sliding)
    assert plan.form == "live"
    keys = {**plan.keys, **canonical_keys(scaling, plan.form, plan.sliding)}
    keys[f"{architecture}.context_length"] = scaling.extended_context
    edit_gguf_files(read_gguf(plain), [path], set_keys=keys, flush=False)
    return path
