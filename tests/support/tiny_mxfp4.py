"""The tiny gpt-oss of `tiny_families` as OpenAI publishes it: experts in MXFP4, the rest in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from support import tiny_families

CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
BLOCKS = "model.layers.{}.mlp.experts.{}_proj_blocks"


def packed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with random codes and exponents in place of every matrix of experts: all codes, deviations about 0.1."""
    rng = torch.Generator().manual_seed(0)
    made = dict(state)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = made.pop(name).shape
        groups = (experts, out, into // 32)
        made[name + "_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=rng)
        made[name + "_scales"] = torch.randint(120, 124, groups, dtype=torch.uint8, generator=rng)
    return made


def write(folder: Path, **changes: Any) -> Path:
    """The checkpoint, with a tokenizer."""
    tiny_families.write(folder, "gpt_oss", torch.bfloat16, **changes)
    values = json.loads((folder / "config.json").read_text())
    tiny_families.rewrite(folder, packed(tiny_families.saved(folder)), {**values, "quantization_config": CONFIG})
    return folder
