"""Tiny checkpoints of every family, written by transformers. Their attention is not flat, so that wrong positions show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from support import depth, tiny

ORIGINAL = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
BY_LAYER = {"full_attention": {**YARN, "rope_theta": 500000.0}, "sliding_attention": PLAIN}
MINISTRAL = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
    "attention_bias": True,
}
DELTA = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {**YARN, "partial_rotary_factor": 0.25},
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 80}
COHERE = {"logit_scale": 2.0, "tie_word_embeddings": True, "layer_norm_eps": 1e-5}
MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24, "num_key_value_heads": 4}
DEEPSEEK_EXPERTS = {
    **MLA,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
DEEPSEEK = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}
GROUPS = {"q_lora_rank": 40, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
SIGMOIDS = {
    "head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}
LAGUNA = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
    "moe_routed_scaling_factor": 2.5,
}
# As in XS.2: an attention factor of its own, and betas other than llama.cpp's.
LAGUNA_YARN = {**YARN, "rope_theta": 100.0, "partial_rotary_factor": 0.5, "beta_fast": 4.0, "attention_factor": 1.0}
LAGUNA_PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_parameters": YARN,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
# name -> (model_type, what its config has beyond COMMON). Where a model card has YaRN, its parameters with a shorter origin.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "mixtral": ("mixtral", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "granitemoe": ("granitemoe", {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite", {**GRANITE, "mlp_bias": True}),
    "phi3": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**WINDOWS, "rope_parameters": BY_LAYER}),
    "mellum": ("mellum", {**EXPERTS, **WINDOWS, "head_dim": 32, "rope_parameters": BY_LAYER}),
    "smollm3": (
        "smollm3",
        {"rope_parameters": {**YARN, "factor": 2.0, "rope_theta": 5e6}, "max_position_embeddings": 128},
    ),
    "smollm3-tied": ("smollm3", {"tie_word_embeddings": True}),
    "arcee": ("arcee", {"head_dim": 32, "rope_parameters": {**YARN, "mscale": 1.0}}),
    "glm4": ("glm4", {"head_dim": 32, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    "ministral3": (
        "ministral3",
        {"head_dim": 32, "rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0.1, "rope_theta": 1e6}},
    ),
    "devstral2": (
        "ministral3",
        {
            "head_dim": 32,
            "rope_parameters": {**MINISTRAL, "beta_fast": 4.0, "mscale_all_dim": 0.0, "llama_4_scaling_beta": 0.0},
        },
    ),
    "ministral3-baked": (
        "ministral3",
        {"head_dim": 32, "rope_parameters": {**MINISTRAL, "beta_fast": 4.0, "llama_4_scaling_beta": 0.1}},
    ),
    "ministral3-mscale": (
        "ministral3",
        {"head_dim": 32, "rope_parameters": {**MINISTRAL, "mscale": 0.7, "llama_4_scaling_beta": 0.1}},
    ),
    "llama": ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "cohere": ("cohere", COHERE),
    "cohere2": ("cohere2", {**COHERE, **WINDOWS, "rotary_pct": 1.0}),  # as published
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **DEEPSEEK_EXPERTS,
            "q_lora_rank": 40,
            "first_k_dense_replace": 1,
            "rope_parameters": DEEPSEEK,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**DEEPSEEK_EXPERTS, **GROUPS, "rope_parameters": {**DEEPSEEK, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3-kimi": (
        "deepseek_v3",
        {
            **DEEPSEEK_EXPERTS,
            **GROUPS,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "rope_parameters": {**DEEPSEEK, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**DEEPSEEK_EXPERTS, "q_lora_rank": 40}),
    "youtu": ("youtu", {**MLA, "q_lora_rank": 40}),
    "laguna": (
        "laguna",
        {
            **LAGUNA,
            "num_attention_heads_per_layer": [4, 6, 6, 6],
            "sliding_window": 24,
            "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
            "rope_parameters": {"full_attention": LAGUNA_YARN, "sliding_attention": LAGUNA_PLAIN},
        },
    ),
    "laguna-m1": (
        "laguna",
        {
            **LAGUNA,
            "gating": "per-element",
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2,
            "rope_parameters": {"full_attention": {**YARN, "rope_theta": 500000.0, "partial_rotary_factor": 1.0}},
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {**SIGMOIDS, "attention_bias": True, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    ),
    "glm4_moe-groups": (
        "glm4_moe",
        {
            **SIGMOIDS,
            "n_group": 4,
            "topk_group": 2,
            "use_qk_norm": True,
            "norm_topk_prob": False,
            "first_k_dense_replace": 2,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
        },
    ),
    "solar_open": (
        "solar_open",
        {**SIGMOIDS, "rope_parameters": {**YARN, "factor": 2.0}, "max_position_embeddings": 128},
    ),
    "qwen3_next": ("qwen3_next", {**DELTA, **SHARED}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA, **SHARED}),
    "gemma3": (
        "gemma3_text",
        {
            "vocab_size": 302,  # tokens of the tokenizer as upstream's converter counts them
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            **WINDOWS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
if depth.full:  # Command R+ has 64 layers, DeepSeek V2 Lite 26
    PLUS = {**COHERE, "use_qk_norm": True, "num_hidden_layers": 64, "hidden_size": 32, "logit_scale": 16.0}
    FAMILIES["cohere-plus"] = ("cohere", PLUS)
    LITE = {**DEEPSEEK_EXPERTS, "q_lora_rank": None, "num_hidden_layers": 26, "first_k_dense_replace": 25}
    FAMILIES["deepseek_v2-lite"] = ("deepseek_v2", {**LITE, "rope_parameters": DEEPSEEK})


STEEP = ("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "q_b_proj.weight", "kv_a_proj", "kv_b_proj.weight")
FROM_ONE = ("gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")  # their norms are saved as w - 1


def model(name: str, **changes: Any) -> Any:
    """transformers' model with random weights: q and k of std 0.35, so that attention is not flat."""
    import transformers

    model_type, extra = FAMILIES[name]
    rng = np.random.default_rng(0)
    steepness = 0.25 if name.endswith("-lite") else 0.35  # in 26 layers, each of which enlarges what float32 rounds
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **extra, **changes})
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        biases = [(key, bias) for key, bias in made.named_buffers() if key.endswith("e_score_correction_bias")]
        for key, weight in (*made.named_parameters(), *biases):
            steep = any(part in key for part in STEEP)
            shift = 1.0 if "norm" in key and model_type not in FROM_ONE else -2.0 if "A_log" in key else 0.0
            noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape), np.float32))
            weight.copy_(noise * (steepness if steep else 0.12) + shift)
    return made


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The checkpoint as save_pretrained writes it, with a tokenizer."""
    model(name, **changes).to(dtype).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that `write` made."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, state: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Another config and other tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
