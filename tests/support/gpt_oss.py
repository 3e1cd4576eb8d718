"""A random gpt-oss checkpoint of transformers' own class, with the positions as published, and the GGUF written from it by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from yarn_edge.llama_rules.description import canonical_keys
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

from support.gguf_files import BYTE_TOKENIZER, write_gguf
from support.tiny_gguf import N_WORDS

HEAD_DIM, HEADS, KV_HEADS, HIDDEN, FFN, EXPERTS, LAYERS, WINDOW = 64, 4, 2, 64, 32, 4, 4, 48
PUBLISHED = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "rope_theta": 150000.0,
}
SCALING = RopeScaling(
    "yarn", 150000.0, HEAD_DIM, 4096, 32.0, attention_factor=yarn_attention_factor(32.0), truncate=False
)


def model() -> Any:
    """In float32, its weights on bfloat16's grid."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=N_WORDS,
        sliding_window=WINDOW,
        max_position_embeddings=131072,
        rope_parameters=PUBLISHED,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    made = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            deviation = 0.35 if "q_proj.weight" in name or "k_proj.weight" in name else 0.12
            values = torch.randn_like(weight) * deviation + ("norm" in name)
            weight.copy_(values.to(torch.bfloat16).float())
    return made


# our name -> transformers', in a layer
_ROWS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
    **{
        f"attn_{ours}.{kind}": f"self_attn.{theirs}_proj.{kind}"
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
        for kind in ("weight", "bias")
    },
}


def write(path: Path, made: Any) -> Path:
    """The GGUF, with live positions."""
    state = {name: value.numpy() for name, value in made.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        own = {name: state[f"model.layers.{layer}.{theirs}"] for name, theirs in _ROWS.items()}
        experts = f"model.layers.{layer}.mlp.experts."
        both, bias = state[experts + "gate_up_proj"], state[experts + "gate_up_proj_bias"]
        for at, name in enumerate(("gate", "up")):  # their columns alternate
            own[f"ffn_{name}_exps.weight"] = both[..., at::2].swapaxes(1, 2)
            own[f"ffn_{name}_exps.bias"] = bias[..., at::2]
        own["ffn_down_exps.weight"] = state[experts + "down_proj"].swapaxes(1, 2)
        own["ffn_down_exps.bias"] = state[experts + "down_proj_bias"]
        tensors |= {f"blk.{layer}.{name}": value for name, value in own.items()}
    plan = plan_rope(SCALING, "gpt-oss")
    keys = {
        "context_length": SCALING.extended_context,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "vocab_size": N_WORDS,
        "feed_forward_length": FFN,
        "expert_feed_forward_length": FFN,
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.sliding_window": WINDOW,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    prefixed = {f"gpt-oss.{key}": value for key, value in keys.items()}
    described = {**plan.keys, **canonical_keys(SCALING, plan.form, plan.sliding)}
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return write_gguf(path, "gpt-oss", BYTE_TOKENIZER | prefixed | described, arrays)
