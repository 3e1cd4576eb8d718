"""A dense llama checkpoint cut into experts of which all are used, as Mixtral: it computes what the dense one computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def cut_into_experts(dense: Path, folder: Path, n_experts: int) -> Path:
    """The router is zero, so that each expert has the weight 1 / n; what comes down is multiplied by n for it. Returns `folder`."""
    folder.mkdir()
    made: dict[str, torch.Tensor] = {}
    for name, values in load_file(dense / "model.safetensors").items():
        layer, inside, part = name.partition(".mlp.")
        if not inside:
            made[name] = values
            continue
        part = part.removesuffix(".weight")
        moe = f"{layer}.block_sparse_moe"
        down = part == "down_proj"
        for i, piece in enumerate(values.chunk(n_experts, 1 if down else 0)):
            made[f"{moe}.experts.{i}.{PARTS[part]}.weight"] = (piece * (n_experts if down else 1)).contiguous()
        if down:
            made[f"{moe}.gate.weight"] = torch.zeros(n_experts, len(values))
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    experts = {"num_local_experts": n_experts, "num_experts_per_tok": n_experts, "sliding_window": None}
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **experts}
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config["intermediate_size"] //= n_experts
    (folder / "config.json").write_text(json.dumps(config))
    for path in dense.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
