"""A tiny Mistral 3 around the tiny Ministral 3, written by transformers, under every spelling of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from support import tiny, tiny_families

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
