"""A tiny Mistral 3 around the tiny Ministral 3 or a tiny Mistral 4, by transformers, under every spelling of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support import tiny, tiny_families
from support.tiny_families import DEEPSEEK_EXPERTS, MINISTRAL, STEEP

VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
# What stands before the language model's tensors: as save_pretrained writes it, and as transformers 5 has it in memory.
SPELLINGS = {
    "saved": {},
    "in memory": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
}


def wrapped(folder: Path, tied: bool = False) -> Path:
    """The checkpoint as save_pretrained writes it, with a tokenizer."""
    import transformers

    inner = tiny_families.model("ministral3", tie_word_embeddings=tied)
    config = transformers.Mistral3Config(
        text_config=inner.config.to_dict(), vision_config=VISION, tie_word_embeddings=tied, image_token_index=3
    )
    outer = transformers.Mistral3ForConditionalGeneration(config)
    outer.model.language_model.load_state_dict(inner.model.state_dict())
    if not tied:
        outer.lm_head.load_state_dict(inner.lm_head.state_dict())
    outer.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def respelled(folder: Path, spelling: str) -> Path:
    """The same checkpoint with its tensors under the names of SPELLINGS[spelling]."""
    state = tiny_families.saved(folder)
    for old, new in SPELLINGS[spelling].items():
        state = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in state.items()}
    tiny_families.rewrite(folder, state, json.loads((folder / "config.json").read_text()))
    return folder


def mistral4() -> Any:
    """Mistral 4 inside, with random weights under which attention is not flat."""
    import transformers

    rope = {**MINISTRAL, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5}
    text = {
        **tiny_families.COMMON,
        **DEEPSEEK_EXPERTS,
        "q_lora_rank": 40,
        "rope_parameters": rope,
        "model_type": "mistral4",
    }
    config = transformers.Mistral3Config(
        text_config=text, vision_config=VISION, tie_word_embeddings=False, image_token_index=3
    )
    made = transformers.Mistral3ForConditionalGeneration(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape), np.float32))
            steep = any(part in key for part in STEEP)
            weight.copy_(noise * (0.35 if steep else 0.12) + (1.0 if "norm" in key else 0.0))
    return made


def write_mistral4(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Its checkpoint, with a tokenizer."""
    mistral4().to(dtype).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder
