"""LoRA adapters of a tiny base, made by peft: as it saves them, with the weights that it merges; and others written by hand."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support import tiny

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
WHOLE = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
# name -> what peft's LoraConfig gets
KINDS: dict[str, dict[str, Any]] = {
    "plain": WHOLE,
    "all linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora": {**WHOLE, "r": 9, "use_rslora": True},
    "dora": {**WHOLE, "use_dora": True, "target_modules": LINEAR},
    "dora and rslora": {**WHOLE, "use_dora": True, "use_rslora": True},
    "rank_pattern": {**WHOLE, "rank_pattern": {"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}},
    "alpha_pattern": {**WHOLE, "alpha_pattern": {"self_attn.v_proj": 32, "model.layers.1.self_attn.o_proj": 2}},
    "patterns and rslora": {
        **WHOLE,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"^model.layers.1.*": 40, "q_proj": 3},
    },
    "fan_in_fan_out": {**WHOLE, "fan_in_fan_out": True},
    "embeddings and head whole": {**WHOLE, "modules_to_save": ["embed_tokens", "lm_head"]},
    "norms whole": {**WHOLE, "modules_to_save": ["norm", "input_layernorm"]},
    "a block whole": {**WHOLE, "modules_to_save": ["layers.1.mlp"]},
    "embeddings": {**WHOLE, "target_modules": [*ATTENTION, "embed_tokens"]},
    "head": {**WHOLE, "target_modules": [*ATTENTION, "lm_head"]},
    "dora of embeddings": {**WHOLE, "use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {**WHOLE, "trainable_token_indices": [1, 2, 17, 299]},
    "biases": {**WHOLE, "bias": "lora_only"},
    "all biases": {**WHOLE, "bias": "all"},
    "lora_bias": {**WHOLE, "lora_bias": True},
    "some layers": {**WHOLE, "layers_to_transform": [1]},
    "half precision": WHOLE,
    "mica": {**WHOLE, "init_lora_weights": "mica"},
    "orthogonal": {**WHOLE, "init_lora_weights": "orthogonal"},
}


def write_base(folder: Path, tied: bool = False) -> Path:
    """A llama with biases of attention, in float32."""
    return tiny.write_checkpoint(folder, attention_bias=True, tie_word_embeddings=tied)


def with_peft(base: Path, folder: Path, name: str) -> None:
    """The adapter of a kind in `folder`/adapter, and in `folder`/merged.safetensors what peft's merge makes of it and the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        from transformers import AutoModelForCausalLM

        def loaded() -> Any:
            return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

        torch.manual_seed(len(name))
        model = peft.get_peft_model(loaded(), peft.LoraConfig(task_type="CAUSAL_LM", **KINDS[name]))
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.requires_grad:
                    fresh = "lora_" in key and "magnitude" not in key
                    weight.copy_(0.1 * torch.randn_like(weight) + (0 if fresh else weight))
        if name == "half precision":
            model = model.to(torch.bfloat16)
        model.save_pretrained(folder / "adapter")
        merged = peft.PeftModel.from_pretrained(loaded(), folder / "adapter").merge_and_unload()
    save_file({key: value.contiguous() for key, value in merged.state_dict().items()}, folder / "merged.safetensors")


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name})
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def pair(
    module: str, rows: int, columns: int, rank: int = 4, front: str = "base_model.model."
) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of a module, by its name."""
    made = torch.Generator().manual_seed(rows + columns + rank)
    return {
        f"{front}{module}.lora_A.weight": torch.randn(rank, columns, generator=made) / math.sqrt(columns),
        f"{front}{module}.lora_B.weight": torch.randn(rows, rank, generator=made) * 0.2,
    }


def renamed(source: Path, folder: Path, change: Any) -> Path:
    """A copy of an adapter with other names of its tensors."""
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder
