"""Latent attention (MLA) and DeepSeek's experts: what the rows of `deepseek` have in common.

llama.cpp runs the attention on what is cached: the part of kv_b that makes keys is applied to queries, transposed by head, and the
part that makes values to what is read. So its heads are those of one key as long as the latent vector and the rotated part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile

from .experts import router, stacked
from .layers import LayersOf
from .orders import segment
from .rows import EMBEDDINGS, GATED, PRE_NORMS, SILU, Constant, Impossible, NumberRow, TensorRow, matrix, norm
from .sizes import ModelSizes, Size

_KV_B = "model.layers.{i}.self_attn.kv_b_proj.weight"
_KV_SHAPE, _KV_PARTS = ("n_head*nope+n_head*value", "rank"), ("nope", "value")
_KEYS = segment("n_head", _KV_PARTS, 0, matrices=True)
_VALUES = segment("n_head", _KV_PARTS, 1, matrices=True)
_Q = "n_head*nope+n_head*rope"
SOFTMAX, SIGMOID = 1, 2  # llama-hparams.h: llama_expert_gating_func_type

ATTENTION = (
    matrix("self_attn.q_proj", "attn_q", _Q, "hidden", layers="!low-rank queries"),
    matrix("self_attn.q_a_proj", "attn_q_a", "q_rank", "hidden", layers="low-rank queries"),
    replace(norm("self_attn.q_a_layernorm", "attn_q_a_norm", "q_rank"), layers="low-rank queries"),
    matrix("self_attn.q_b_proj", "attn_q_b", _Q, "q_rank", layers="low-rank queries"),
    matrix("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", "rank+rope", "hidden"),
    norm("self_attn.kv_a_layernorm", "attn_kv_a_norm", "rank"),
    TensorRow(_KV_B, "blk.{i}.attn_k_b.weight", _KV_SHAPE, _KEYS, transposed=True),
    TensorRow(_KV_B, "blk.{i}.attn_v_b.weight", _KV_SHAPE, _VALUES),
    matrix("self_attn.o_proj", "attn_output", "hidden", "n_head*value"),
)
SHARED = (
    matrix("mlp.shared_experts.gate_proj", "ffn_gate_shexp", "shared*expert_ffn", "hidden"),
    matrix("mlp.shared_experts.up_proj", "ffn_up_shexp", "shared*expert_ffn", "hidden"),
    matrix("mlp.shared_experts.down_proj", "ffn_down_shexp", "hidden", "shared*expert_ffn"),
)
SPARSE = (router("mlp.gate"), *stacked("mlp", ("gate_proj", "up_proj", "down_proj"), "expert_ffn"), *SHARED)
ROUTER_BIAS = TensorRow("model.layers.{i}.mlp.gate.e_score_correction_bias", "blk.{i}.exp_probs_b.bias", ("experts",))


def latent_tensors(*sparse: TensorRow) -> tuple[TensorRow, ...]:
    """A family's tensors: some layers are dense, the others `sparse`."""
    dense = (replace(row, layers="dense") for row in GATED)
    return (*EMBEDDINGS, *PRE_NORMS, *ATTENTION, *dense, *(replace(row, layers="!dense") for row in sparse))


def _low_rank(_config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    return [sizes.others["q_rank"] > 0] * sizes.n_layer


def latent_layers(dense: LayersOf) -> dict[str, LayersOf]:
    """The kinds of layers. dense: those without experts."""
    return {"dense": dense, "low-rank queries": _low_rank}


def _grouped(name: str) -> Any:
    """A number of groups of experts, if not all groups are used: llama.cpp ends the process if they are."""

    def value(_config: ConfigFile, sizes: ModelSizes) -> int | None:
        return sizes.others[name] if sizes.others["groups_used"] < sizes.others["groups"] else None

    return value


def sums_up(config: ConfigFile, _sizes: ModelSizes) -> bool:
    """Whether the weights of a token's experts add up to 1, in families where they do by default."""
    return bool(config.boolean("norm_topk_prob")) if "norm_topk_prob" in config.values else True


def latent_keys(dense: LayersOf, **others: Any) -> dict[str, Any]:
    """What a GGUF says of latent attention, and of the first layers."""
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": lambda _config, sizes: sizes.dimension("rank+rope"),
        "attention.value_length": lambda _config, sizes: sizes.dimension("rank"),
        "attention.key_length_mla": lambda _config, sizes: sizes.dimension("nope+rope"),
        "attention.value_length_mla": lambda _config, sizes: sizes.dimension("value"),
        "leading_dense_block_count": lambda config, sizes: sum(dense(config, sizes)),
        **others,
    }


GROUPS = {"expert_group_count": _grouped("groups"), "expert_group_used_count": _grouped("groups_used")}
MLA_SIZES = {
    "rank": Size(("kv_lora_rank",), "attention.kv_lora_rank"),
    "q_rank": Size(("q_lora_rank",), "attention.q_lora_rank", optional=True),
    "nope": Size(("qk_nope_head_dim",)),
    "rope": Size(("qk_rope_head_dim",)),
    "value": Size(("v_head_dim",)),
}
EXPERT_SIZES = {
    **MLA_SIZES,
    "experts": Size(("n_routed_experts", "num_experts", "num_local_experts"), "expert_count"),
    "experts_used": Size(("num_experts_per_tok",), "expert_used_count"),
    "expert_ffn": Size(("moe_intermediate_size",), "expert_feed_forward_length"),
    "shared": Size(("n_shared_experts",), "expert_shared_count"),
}
GROUP_SIZES = {"groups": Size(("n_group",)), "groups_used": Size(("topk_group",))}
SCALE = (NumberRow("routed_scaling_factor", "expert_weights_scale"),)


def _heads(sizes: ModelSizes) -> int:
    return sizes.n_head


LATENT_ONLY = {
    **SILU,
    "attention_bias": Constant(False, "llama.cpp has no place for the biases of latent attention"),
    "num_key_value_heads": Constant(_heads, "every head has keys of its own", optional=True),
    "moe_layer_freq": Constant(1, "llama.cpp wants experts in every layer but the first", optional=True),
    "rope_interleave": Constant(True, "the rotated pairs must be neighbours in the checkpoint", optional=True),
}


def _lite(sizes: ModelSizes) -> bool:
    """llama.cpp's rule for models whose queries are of full rank (deepseek2.cpp)."""
    return sizes.n_layer in (26, 27) or (sizes.n_layer == 48 and sizes.vocab == 128256)


RANKS = (
    Impossible(
        "q_lora_rank",
        lambda sizes: not sizes.others["q_rank"] and not _lite(sizes),
        "llama.cpp runs such a model only with 26 or 27 layers, or with 48 and 128256 tokens",
    ),
    Impossible(
        "q_lora_rank",
        lambda sizes: bool(sizes.others["q_rank"]) and _lite(sizes),
        "llama.cpp takes a model with 26 or 27 layers, or with 48 and 128256 tokens, for one without",
    ),
)
GROUPS_FIT = (
    Impossible(
        "n_group",
        lambda sizes: (
            sizes.others["experts"] % sizes.others["groups"] > 0 or sizes.others["experts"] < 2 * sizes.others["groups"]
        ),
        "the experts must be in groups of one size, of two or more",
    ),
    Impossible(
        "topk_group",
        lambda sizes: sizes.others["groups_used"] > sizes.others["groups"],
        "there are only n_group groups",
    ),
)
