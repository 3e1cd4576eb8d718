"""SmolLM2 as other families: real weights, whose attention is real, with YaRN. Experts are the dense model, cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.evidence.smollm2 import CONTEXT, ROPE_THETA, write_checkpoint
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import depth
from support.made_once import Shelf

N_TOKENS = 160
TOKENS = [(7919 * i * i + 31 * i + 17) % 40000 + 100 for i in range(N_TOKENS)]
YARN = {"rope_type": "yarn", "rope_theta": ROPE_THETA, "factor": 4.0, "original_max_position_embeddings": CONTEXT}
MINISTRAL = {
    **YARN,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
BY_LAYER = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": ROPE_THETA}}


def windows() -> list[str]:
    return [("sliding_attention", "full_attention")[layer % 4 == 3] for layer in range(depth.smol_layers())]


def config_of(family: str) -> dict[str, Any]:
    return {
        "ministral3": {"rope_parameters": MINISTRAL, "max_position_embeddings": 256},
        "mellum": {"rope_parameters": BY_LAYER, "sliding_window": 48, "layer_types": windows()},
    }.get(family, {"rope_parameters": YARN})


def checkpoint(shelf: Shelf, family: str) -> Path:
    def make(folder: Path) -> None:
        write_checkpoint(folder / "ck", family=family, dtype="F32", n_layers=depth.smol_layers())
        path = folder / "ck" / "config.json"
        values = {"max_position_embeddings": 4 * CONTEXT, **config_of(family)}
        values = {**json.loads(path.read_text()), **values}
        del values["rope_theta"]
        path.write_text(json.dumps(values))

    return shelf.made_once(f"smol-as-{family}-{depth.smol_layers()}", make) / "ck"


def logits_of(path: Path) -> np.ndarray[Any, Any]:
    settings = ContextSettings(n_ctx=256, n_batch=N_TOKENS, kv_type="f32", attention="plain")
    with Model(path) as model, Context(model, settings) as context:
        context.evaluate(TOKENS, 0, "all")
        return context.logits()


# family -> the checkpoint that transformers runs. Qwen3-MoE is compared with the dense model that it was cut from.
TRUTHS = {"ministral3": "ministral3", "smollm3": "smollm3", "qwen3_moe": "qwen3", "mellum": "mellum"}


@pytest.mark.parametrize("family", TRUTHS if depth.full else ["smollm3", "mellum"])
def test_real_weights_are_exact(family: str, shelf: Shelf, tmp_path: Path) -> None:
    path = convert(checkpoint(shelf, family), str(tmp_path / "out.gguf"), "F32")[0]
    found = divergence(reference_logits(checkpoint(shelf, TRUTHS[family]), TOKENS), logits_of(path))
    assert found.kl_mean < 1e-7
    assert found.top1 > 0.98  # two equally probable tokens may swap places
