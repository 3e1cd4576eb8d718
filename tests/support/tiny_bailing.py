"""A tiny Ling 2.0, which transformers does not know: random weights, and its logits by the makers' formulas.

The formulas are those of inclusionAI's modeling_bailing_moe_v2.py, written anew in torch, without caches and fused kernels. Its
rotary embedding calls transformers' functions, and so does this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from support import tiny_families

State = dict[str, torch.Tensor]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": tiny_families.ORIGINAL}
# With the keys of the published configs.
CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
        "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
    },
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "partial_rotary_factor": 0.5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 0,
}


def weights(config: dict[str, Any]) -> State:
    """Random ones under the published names; queries and keys are large, so that attention is not flat."""
    rng = np.random.default_rng(0)

    def made(*shape: int, scale: float = 0.12, around: float = 0.0) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32) * scale + around)

    hidden, vocab, head, n_experts = (config[k] for k in ("hidden_size", "vocab_size", "head_dim", "num_experts"))
    n_q, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    state = {
        "model.word_embeddings.weight": made(vocab, hidden),
        "model.norm.weight": made(hidden, around=1.0),
        "lm_head.weight": made(vocab, hidden),
    }

    def mlp(prefix: str, width: int) -> None:
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            state[f"{prefix}.{name}_proj.weight"] = made(*shape)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        state[f"{at}.input_layernorm.weight"] = made(hidden, around=1.0)
        state[f"{at}.post_attention_layernorm.weight"] = made(hidden, around=1.0)
        state[f"{at}.attention.query_layernorm.weight"] = made(head, around=2.0)
        state[f"{at}.attention.key_layernorm.weight"] = made(head, around=2.0)
        state[f"{at}.attention.query_key_value.weight"] = made((n_q + 2 * n_kv) * head, hidden)
        state[f"{at}.attention.dense.weight"] = made(hidden, n_q * head)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        state[f"{at}.mlp.gate.weight"] = made(n_experts, hidden)
        state[f"{at}.mlp.gate.expert_bias"] = made(n_experts)
        for expert in range(n_experts):
            mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
        mlp(f"{at}.mlp.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return state


def write(folder: Path, dtype: torch.dtype = torch.float32, extra: State | None = None, **changes: Any) -> Path:
    """The checkpoint in the published form. extra: further tensors. changes: of the config; ... takes a key out."""
    config = {**CONFIG, **changes}
    state = {name: value.to(dtype) for name, value in {**weights(config), **(extra or {})}.items()}
    values = {key: value for key, value in config.items() if value is not ...}
    tiny_families.rewrite(folder, state, {**values, "torch_dtype": str(dtype).removeprefix("torch.")})
    return folder


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def _mlp(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    gate, up, down = (state[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _rotary(config: dict[str, Any], n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (n_tokens, rotated dimensions)."""
    block = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    sizes = {k: config[k] for k in ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")}
    made = LlamaConfig(**sizes, rope_parameters={**block, "partial_rotary_factor": config["partial_rotary_factor"]})
    inv_freq, attention = ROPE_INIT_FUNCTIONS["yarn"](made, "cpu")
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float32), inv_freq)
    angles = torch.cat((angles, angles), -1)
    return angles.cos() * attention, angles.sin() * attention


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: (heads, n_tokens, head_dim); its first dimensions are rotated in halves."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, other = part.chunk(2, -1)
    return torch.cat((part * cos + torch.cat((-other, one), -1) * sin, rest), -1)


def _attention(x: torch.Tensor, state: State, at: str, config: dict[str, Any]) -> torch.Tensor:
    n_tokens, n_q, n_kv = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    heads = (x @ state[f"{at}.query_key_value.weight"].T).view(n_tokens, n_q + 2 * n_kv, -1).transpose(0, 1)
    q, k, v = heads.split([n_q, n_kv, n_kv])
    epsilon, rotary = config["rms_norm_eps"], _rotary(config, n_tokens)
    q = _turned(_norm(q, state[f"{at}.query_layernorm.weight"], epsilon), *rotary)
    k = _turned(_norm(k, state[f"{at}.key_layernorm.weight"], epsilon), *rotary)
    k, v = (y.repeat_interleave(n_q // n_kv, 0) for y in (k, v))
    scores = q @ k.transpose(1, 2) / config["head_dim"] ** 0.5
    scores = scores + torch.full((n_tokens, n_tokens), -torch.inf).triu(1)
    out = scores.softmax(-1) @ v
    return out.transpose(0, 1).reshape(n_tokens, -1) @ state[f"{at}.dense.weight"].T


def _experts(x: torch.Tensor, state: State, at: str, config: dict[str, Any]) -> torch.Tensor:
    """Groups are ranked by the sum of their two best; the bias chooses, and does not weigh."""
    used, groups = config["num_experts_per_tok"], config["n_group"]
    scores = (x @ state[f"{at}.gate.weight"].T).sigmoid()
    routing = (scores + state[f"{at}.gate.expert_bias"]).view(len(x), groups, -1)
    best = routing.topk(2, -1).values.sum(-1).topk(config["topk_group"], -1).indices
    outside = torch.ones(len(x), groups, dtype=torch.bool).scatter(1, best, False)
    chosen = routing.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(used, -1).indices
    weight = scores.gather(1, chosen)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) if used > 1 else weight
    weights_of = torch.zeros_like(scores).scatter(1, chosen, weight * config["routed_scaling_factor"])
    out = _mlp(x, state, f"{at}.shared_experts")
    for expert, factor in enumerate(weights_of.T):
        out += factor[:, None] * _mlp(x, state, f"{at}.experts.{expert}")
    return out


def logits(folder: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Of every position, float32, (n_tokens, n_vocab)."""
    config, state = json.loads((folder / "config.json").read_text()), tiny_families.saved(folder)
    epsilon, embeddings = config["rms_norm_eps"], state["model.word_embeddings.weight"]
    with torch.inference_mode():
        x = embeddings[tokens]
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            x = x + _attention(
                _norm(x, state[f"{at}.input_layernorm.weight"], epsilon), state, f"{at}.attention", config
            )
            normed = _norm(x, state[f"{at}.post_attention_layernorm.weight"], epsilon)
            dense = layer < config["first_k_dense_replace"]
            x = x + (_mlp if dense else lambda *given: _experts(*given, config))(normed, state, f"{at}.mlp")
        head = embeddings if config["tie_word_embeddings"] else state["lm_head.weight"]
        return np.asarray((_norm(x, state["model.norm.weight"], epsilon) @ head.T).numpy(), np.float32)
