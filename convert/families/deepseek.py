"""DeepSeek V2 and V3, and the families that have their shape: one row each."""

from __future__ import annotations

from dataclasses import replace

from yarn_edge.checkpoint.config_file import ConfigFile, shown

from .dense import MISTRAL3
from .experts import router
from .latent import (
    ATTENTION,
    EXPERT_SIZES,
    GROUP_SIZES,
    GROUPS,
    GROUPS_FIT,
    LATENT_ONLY,
    MLA_SIZES,
    RANKS,
    ROUTER_BIAS,
    SCALE,
    SHARED,
    SIGMOID,
    SOFTMAX,
    SPARSE,
    latent_keys,
    latent_layers,
    latent_tensors,
    sums_up,
)
from .layers import layers_called, leading
from .rows import DEFAULTS, EMBEDDINGS, GATED, PRE_NORMS, Architecture, Constant, NumberRow, TensorRow
from .sizes import ModelSizes


def _glm_dense(config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    """transformers: mlp_layer_types, else the first layer. llama.cpp knows only how many the first are."""
    types = config.values.get("mlp_layer_types")
    n, key = config.values.get("first_k_dense_replace"), "first_k_dense_replace"
    if types is None:
        if n not in (None, 1):
            raise config.error(
                key, f"is {shown(n)}, but transformers has experts from the second layer on: add mlp_layer_types"
            )
        return [layer < 1 for layer in range(sizes.n_layer)]
    dense = layers_called("mlp_layer_types", "dense")(config, sizes)
    if types != ["dense"] * sum(dense) + ["sparse"] * (sizes.n_layer - sum(dense)):
        what = f"is {shown(types)}: llama.cpp wants the dense layers first, and all others sparse"
        raise config.error("mlp_layer_types", what)
    return dense


def _all(_config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    return [True] * sizes.n_layer


def _origin(config: ConfigFile, _sizes: ModelSizes) -> int | None:
    """From where on queries are multiplied by more than 1."""
    section = config.section("rope_parameters")
    return None if section is None else section.required_integer("original_max_position_embeddings")


_KIMI = replace(
    MISTRAL3,
    hf_name="KimiK25ForConditionalGeneration",
    model_type="kimi_k25",
    left_out=("model.vision_tower.", "model.mm_projector.", "model.multi_modal_projector."),
)
_V3_DEFAULTS = {
    **DEFAULTS,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}
_V3 = Architecture(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    latent_tensors(*SPARSE, ROUTER_BIAS),
    {
        **_V3_DEFAULTS,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    {
        **LATENT_ONLY,
        "scoring_func": Constant("sigmoid", "transformers knows nothing else", optional=True),
        "topk_method": Constant("noaux_tc", "transformers knows nothing else", optional=True),
    },
    sizes={**EXPERT_SIZES, **GROUP_SIZES},
    layers=latent_layers(leading("first_k_dense_replace", 3)),
    numbers=SCALE,
    keys=latent_keys(
        leading("first_k_dense_replace", 3), expert_gating_func=SIGMOID, expert_weights_norm=sums_up, **GROUPS
    ),
    impossible=(*RANKS, *GROUPS_FIT),
    aliases=("kimi_k2",),
    prediction_layers="num_nextn_predict_layers",
    wrappers=(_KIMI, replace(_KIMI, hf_name="Kimi_K25ForConditionalGeneration")),
    yarn="in the config: factor 40, original context 4096 (Kimi K2: 32; K2.5: 64)",
)

DEEPSEEK: tuple[Architecture, ...] = (
    Architecture(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        latent_tensors(*SPARSE),
        {
            **_V3_DEFAULTS,
            "n_routed_experts": 64,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        {
            **LATENT_ONLY,
            "mlp_bias": Constant(False, "llama.cpp has no place for the biases of the MLP"),
            "norm_topk_prob": Constant(False, "transformers ignores it", optional=True),
            "scoring_func": Constant("softmax", "transformers knows nothing else", optional=True),
            "topk_method": Constant(
                "greedy",
                "llama.cpp ranks groups of experts by the sum of their two best, DeepSeek V2 by the best one (with n_group 1, "
                "write greedy: it is the same)",
            ),
        },
        sizes=EXPERT_SIZES,
        layers=latent_layers(leading("first_k_dense_replace")),
        numbers=SCALE,
        keys=latent_keys(leading("first_k_dense_replace"), expert_gating_func=SOFTMAX),
        impossible=RANKS,
        yarn="in the config: factor 40, original context 4096",
    ),
    _V3,
    replace(
        _V3,
        hf_name="Glm4MoeLiteForCausalLM",
        model_type="glm4_moe_lite",
        defaults={
            **_V3.defaults,
            "rms_norm_eps": 1e-5,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1536,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.8,
        },
        layers=latent_layers(_glm_dense),
        keys={**_V3.keys, **latent_keys(_glm_dense)},
        aliases=(),
        wrappers=(),
        yarn="none is published (GLM-4.7-Flash)",
    ),
    Architecture(
        "YoutuForCausalLM",
        "youtu",
        (*EMBEDDINGS, *PRE_NORMS, *ATTENTION, *GATED),
        {**_V3_DEFAULTS, "tie_word_embeddings": True},
        LATENT_ONLY,
        sizes=MLA_SIZES,
        layers=latent_layers(_all),
        # llama.cpp wants the keys of experts in a model without.
        keys=latent_keys(_all, expert_feed_forward_length=lambda _config, sizes: sizes.ffn, expert_shared_count=0),
        impossible=RANKS,
        yarn="none is published",
    ),
    Architecture(
        "Mistral4ForCausalLM",
        "mistral4",
        latent_tensors(
            router("mlp.gate"),
            TensorRow(
                "model.layers.{i}.mlp.experts.gate_up_proj",
                "blk.{i}.ffn_gate_up_exps.weight",
                ("experts", "2*expert_ffn", "hidden"),
            ),
            TensorRow(
                "model.layers.{i}.mlp.experts.down_proj",
                "blk.{i}.ffn_down_exps.weight",
                ("experts", "hidden", "expert_ffn"),
            ),
            *SHARED,
        ),
        {
            **_V3_DEFAULTS,
            "q_lora_rank": 1024,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        },
        LATENT_ONLY,
        sizes={**EXPERT_SIZES, **GROUP_SIZES},
        layers=latent_layers(leading("first_k_dense_replace")),
        numbers=(*SCALE, NumberRow("rope_parameters.llama_4_scaling_beta", "attention.temperature_scale", zero=True)),
        keys=latent_keys(
            leading("first_k_dense_replace"),
            expert_gating_func=SOFTMAX,
            expert_weights_norm=sums_up,
            **{"attention.temperature_length": _origin},
            **GROUPS,
        ),
        impossible=(*RANKS, *GROUPS_FIT),
        wrappers=(MISTRAL3,),
        yarn="in the config: factor 128, original context 8192",
    ),
)
