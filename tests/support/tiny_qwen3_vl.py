"""A tiny Qwen3-VL, dense or with experts, written by transformers. Its attention is not flat, so that wrong positions show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support import tiny, tiny_families
from support.tiny_families import ORIGINAL

# Under a small base the last pairs turn within these tokens too: 4 rad for pair 61.
PLAIN = {"rope_type": "default", "rope_theta": 60.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "head_dim": 128,
    "max_position_embeddings": ORIGINAL,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}


def model(rope: dict[str, Any], tied: bool = False, experts: bool = False) -> Any:
    """transformers' model with random weights: q and k of std 0.35, so that attention is not flat."""
    import transformers

    text = {**SIZES, "rope_parameters": rope, "tie_word_embeddings": tied, **(EXPERTS if experts else {})}
    kind = "Qwen3VLMoe" if experts else "Qwen3VL"
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, tie_word_embeddings=tied)
    config.text_config.bos_token_id, config.text_config.eos_token_id = 0, 1
    config._attn_implementation = "eager"
    made = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape), np.float32))
            steep = "q_proj.weight" in key or "k_proj.weight" in key
            weight.copy_(noise * (0.35 if steep else 0.12) + (1.0 if "norm" in key else 0.0))
    return made


def write(folder: Path, made: Any) -> Path:
    """The checkpoint as save_pretrained writes it, with a tokenizer."""
    made.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def write_bfloat16(folder: Path, experts: bool) -> Path:
    """The checkpoint in bfloat16, experts as published."""
    write(folder, model(PLAIN, experts=experts).bfloat16())
    return as_published(folder) if experts else folder


def as_published(folder: Path) -> Path:
    """The same checkpoint with the matrices of its experts transposed, [experts, in, out], as in Qwen's own repositories."""
    state = {
        name: value.transpose(1, 2) if ".mlp.experts." in name else value
        for name, value in tiny_families.saved(folder).items()
    }
    tiny_families.rewrite(folder, state, json.loads((folder / "config.json").read_text()))
    return folder
