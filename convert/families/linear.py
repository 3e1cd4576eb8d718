"""Families with linear attention (the gated delta net) in most layers: one row each.

Heads of linear attention's values are in groups, one group for each head of its keys. The rows of Qwen 3.5 take them by turns, the
first of each group and then the second, as ggml repeats keys; Qwen3-Next's graph repeats each key in place, and they stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.families import FULL, LINEAR
from yarn_edge.checkpoint.layers import linear_layers

from .experts import EVERY_LAYER, GATED_SHARED_EXPERT, NORMALIZED, QWEN_EXPERTS, QWEN_SIZES, router
from .orders import Order, after, by_turns, joined, segment
from .rows import (
    DEFAULTS,
    EMBEDDINGS,
    GATED,
    SILU,
    Architecture,
    Constant,
    Impossible,
    TensorRow,
    Wrapper,
    matrix,
    minus_exp,
    norm,
    plus_one,
)
from .sizes import ModelSizes, Size

_KEYS, _VALUES = "key_heads*key_dim", "value_heads*value_dim"
_GROUP = "value_heads/key_heads"  # heads of values for each head of keys
_QKV = f"2*{_KEYS}+{_VALUES}"
_QKVZ = ("key_dim", "key_dim", f"{_GROUP}*value_dim", f"{_GROUP}*value_dim")  # of each head of keys
_LINEAR: dict[str, Any] = {"layers": "linear"}


def _delta_net(order: Order | None) -> tuple[TensorRow, ...]:
    """What both forms of the gated delta net have. order: of heads of values."""
    layer, block = "model.layers.{i}.linear_attn.", "blk.{i}."
    channels = None if order is None else after(f"2*{_KEYS}", order)
    return (
        TensorRow(
            layer + "conv1d.weight",
            block + "ssm_conv1d.weight",
            (_QKV, "1", "kernel"),
            channels,
            float32=True,
            **_LINEAR,
        ),
        TensorRow(layer + "A_log", block + "ssm_a", ("value_heads",), order, values=minus_exp, **_LINEAR),
        TensorRow(layer + "dt_bias", block + "ssm_dt.bias", ("value_heads",), order, **_LINEAR),
        norm("linear_attn.norm", "ssm_norm", "value_dim", **_LINEAR),
        matrix("linear_attn.out_proj", "ssm_out", "hidden", _VALUES, columns=order, **_LINEAR),
    )


_BY_TURNS = by_turns("key_heads", _GROUP)
_SPLIT = (
    *_delta_net(_BY_TURNS),
    matrix("linear_attn.in_proj_qkv", "attn_qkv", _QKV, "hidden", rows=after(f"2*{_KEYS}", _BY_TURNS), **_LINEAR),
    matrix("linear_attn.in_proj_z", "attn_gate", _VALUES, "hidden", rows=_BY_TURNS, **_LINEAR),
    matrix("linear_attn.in_proj_b", "ssm_beta", "value_heads", "hidden", rows=_BY_TURNS, **_LINEAR),
    matrix("linear_attn.in_proj_a", "ssm_alpha", "value_heads", "hidden", rows=_BY_TURNS, **_LINEAR),
)
_IN_GROUPS = (
    *_delta_net(None),
    matrix(
        "linear_attn.in_proj_qkvz",
        "attn_qkv",
        f"2*{_KEYS}+2*{_VALUES}",
        "hidden",
        rows=joined(*(segment("key_heads", _QKVZ, k) for k in range(3))),
        **_LINEAR,
    ),
    matrix(
        "linear_attn.in_proj_qkvz",
        "attn_gate",
        f"2*{_KEYS}+2*{_VALUES}",
        "hidden",
        rows=segment("key_heads", _QKVZ, 3),
        **_LINEAR,
    ),
    matrix("linear_attn.in_proj_ba", "ssm_ba", "2*value_heads", "hidden", **_LINEAR),
)
# Of each head, q_proj has the query and then the gate of what the head reads.
_FULL: dict[str, Any] = {"layers": "!linear"}
_ATTENTION = (
    matrix("self_attn.q_proj", "attn_q", "2*q", "hidden", **_FULL),
    matrix("self_attn.k_proj", "attn_k", "kv", "hidden", **_FULL),
    matrix("self_attn.v_proj", "attn_v", "kv", "hidden", **_FULL),
    matrix("self_attn.o_proj", "attn_output", "hidden", "q", **_FULL),
    norm("self_attn.q_norm", "attn_q_norm", "head_dim", values=plus_one, **_FULL),
    norm("self_attn.k_norm", "attn_k_norm", "head_dim", values=plus_one, **_FULL),
)
_COMMON = (
    EMBEDDINGS[0],
    replace(EMBEDDINGS[1], values=plus_one),
    EMBEDDINGS[2],
    norm("input_layernorm", "attn_norm", values=plus_one),
    norm("post_attention_layernorm", "post_attention_norm", values=plus_one),
    *_ATTENTION,
)
_SPARSE = (router("mlp.gate"), *QWEN_EXPERTS, *GATED_SHARED_EXPERT)
_SIZES = {
    "kernel": Size(("linear_conv_kernel_dim",), "ssm.conv_kernel"),
    "key_dim": Size(("linear_key_head_dim",), "ssm.state_size"),
    "value_dim": Size(("linear_value_head_dim",)),
    "key_heads": Size(("linear_num_key_heads",), "ssm.group_count"),
    "value_heads": Size(("linear_num_value_heads",), "ssm.time_step_rank"),
}
_SPARSE_SIZES = {
    **QWEN_SIZES,
    **_SIZES,
    "shared_ffn": Size(("shared_expert_intermediate_size",), "expert_shared_feed_forward_length"),
}
_DEFAULTS = {
    **DEFAULTS,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def _key_dim(sizes: ModelSizes) -> int:
    return sizes.others["key_dim"]


_ONLY = {
    **SILU,
    "attention_bias": Constant(False, "llama.cpp has no place for the biases of attention"),
    "rms_norm_eps": Constant(
        1e-6,
        "llama.cpp takes it for the lengths of linear attention's queries and keys too, where transformers has 1e-06",
    ),
    "linear_value_head_dim": Constant(_key_dim, "llama.cpp wants keys and values of linear attention in one size"),
}


def _linear(config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    found = linear_layers(config, sizes.n_layer)
    if all(found) or not any(found):
        kind = LINEAR if all(found) else FULL
        raise config.error("layer_types", f"makes every layer {kind}: llama.cpp runs these models only with both kinds")
    return found


def _interval(config: ConfigFile, sizes: ModelSizes) -> int | None:
    """Every how many layers one has full attention, if that says it all: programs older than recurrent_layers read it."""
    found = _linear(config, sizes)
    first = found.index(False) + 1
    return first if found == [(layer + 1) % first != 0 for layer in range(len(found))] else None


_GGUF_KEYS: dict[str, Any] = {
    "ssm.inner_size": lambda _config, sizes: sizes.dimension(_VALUES),
    "attention.recurrent_layers": _linear,
    "full_attention_interval": _interval,
}


def _uneven(sizes: ModelSizes) -> bool:
    return sizes.others["value_heads"] % sizes.others["key_heads"] > 0


_FAMILY: dict[str, Any] = {
    "impossible": (Impossible("linear_num_value_heads", _uneven, "linear_num_key_heads does not divide it"),),
    "layers": {"linear": _linear},
    "layer_types": (LINEAR, FULL),
    "keys": _GGUF_KEYS,
    "prediction": ("mtp.", "model.mtp."),
    "yarn": "by flags: factor 4, original context 262144",
}


def _wrapper(name: str, model_type: str) -> Wrapper:
    return Wrapper(name, model_type, (("model.language_model.", "model."),), ("model.visual.",))


LINEAR_ATTENTION: tuple[Architecture, ...] = (
    Architecture(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        (*_COMMON, *_SPARSE, *_IN_GROUPS),
        {**_DEFAULTS, "norm_topk_prob": True},
        {**_ONLY, **NORMALIZED, **EVERY_LAYER},
        sizes=_SPARSE_SIZES,
        **_FAMILY,
    ),
    Architecture(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        (*_COMMON, *GATED, *_SPLIT),
        _DEFAULTS,
        _ONLY,
        sizes=_SIZES,
        wrappers=(_wrapper("Qwen3_5ForConditionalGeneration", "qwen3_5"),),
        **_FAMILY,
    ),
    Architecture(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        (*_COMMON, *_SPARSE, *_SPLIT),
        _DEFAULTS,
        _ONLY,
        sizes=_SPARSE_SIZES,
        wrappers=(_wrapper("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),),
        **_FAMILY,
    ),
)
