"""Families quantized: the types and bytes of llama.cpp's own quantizer, whose rules know experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.gguf.read import read_gguf

from support import tiny_families
from support.llama_quantize import assert_same_file, upstream

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "head_dim": 64,
}
TWO_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
# llama.cpp has a rule of its own for models of eight experts.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 256}),
    "qwen2_moe": ("qwen2_moe", {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}),
    "eight experts": ("mixtral", {"num_local_experts": 8}),
    "granitemoe": ("granitemoe", {"num_local_experts": 3}),
    "mellum": ("mellum", {"moe_intermediate_size": 256, **TWO_WINDOWS}),
    "gpt_oss": ("gpt_oss", {}),
    "laguna": (
        "laguna",
        {
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "num_attention_heads_per_layer": [4, 8],
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "glm4_moe": ("glm4_moe", {"moe_intermediate_size": 256}),
    "qwen3_5": ("qwen3_5", {"num_hidden_layers": 4, "layer_types": None}),
    "gemma3": ("gemma3", {**TWO_WINDOWS, "query_pre_attn_scalar": 64}),
    "deepseek_v3": ("deepseek_v3", {"moe_intermediate_size": 256, "kv_lora_rank": 256, "v_head_dim": 64}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", TWO_WINDOWS),
    "phi3": ("phi3", {}),
    "glm4": ("glm4", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_types_and_bytes_are_llama_cpps(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    wide = {
        key: value
        for key, value in WIDE.items()
        if key != "head_dim" or name not in ("qwen2_moe", "phi3", "deepseek_v3")
    }
    folder = tiny_families.write(tmp_path / "ck", name, torch.bfloat16, **{**wide, **changes})
    names = ("Q4_K_M", "Q2_K")
    base, *ours = convert(folder, str(tmp_path / "{quant}.gguf"), "BF16," + ",".join(names))
    for quant, path in zip(names, ours, strict=True):
        assert_same_file(path, upstream(base, tmp_path / f"theirs-{quant}.gguf", quant))


def test_eight_experts_get_more_bits_for_v(tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "ck", "mixtral", torch.bfloat16, **{**WIDE, "num_local_experts": 8})
    tensors = read_gguf(convert(folder, str(tmp_path / "o.gguf"), "Q4_K_M")[0]).tensors
    assert {name: tensors[f"blk.0.{name}.weight"].type_name for name in ("attn_v", "ffn_gate_inp", "ffn_up_exps")} == {
        "attn_v": "Q8_0",
        "ffn_gate_inp": "F32",
        "ffn_up_exps": "Q4_K",
    }
