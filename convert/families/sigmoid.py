"""Families whose router adds a bias to sigmoids, with shared experts and dense layers first: one row each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile, shown

from .experts import QWEN_EXPERTS, SHARED_EXPERT, router
from .latent import (
    EXPERT_SIZES,
    GROUP_SIZES,
    GROUPS,
    GROUPS_FIT,
    MLA_SIZES,
    ROUTER_BIAS,
    SCALE,
    SIGMOID,
    SPARSE,
    sums_up,
)
from .layers import LayersOf, layers_called, leading
from .rows import (
    DEFAULTS,
    EMBEDDINGS,
    GATED,
    HEAD_NORMS,
    OWN_HEAD,
    PRE_NORMS,
    SILU,
    Architecture,
    Constant,
    Impossible,
    NumberRow,
    TensorRow,
    attention,
    attention_biases,
    matrix,
    norm,
)
from .sizes import ModelSizes, Size

# A token's experts come from the groups that are used.
_ENOUGH = Impossible(
    "num_experts_per_tok",
    lambda sizes: (
        sizes.others["experts_used"] * sizes.others["groups"] > sizes.others["experts"] * sizes.others["groups_used"]
    ),
    "more than the groups of topk_group have",
)
_EXPERTS = {name: size for name, size in EXPERT_SIZES.items() if name not in MLA_SIZES and name != "shared"}
_SIGMOIDS = {"scoring_func": Constant("sigmoid", optional=True), "topk_method": Constant("noaux_tc", optional=True)}


def _mlp(*sparse: TensorRow) -> tuple[TensorRow, ...]:
    """The MLPs: `sparse` in the layers that are not called dense."""
    dense = (replace(row, layers="dense") for row in GATED)
    return (*dense, *(replace(row, layers="!dense") for row in sparse))


def _keys(dense: LayersOf, weights_norm: Any) -> dict[str, Any]:
    return {
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": weights_norm,
        "leading_dense_block_count": lambda config, sizes: sum(dense(config, sizes)),
    }


# ---- Laguna


def _laguna_dense(config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    """transformers: mlp_layer_types, else the first layer. llama.cpp knows only how many the first are."""
    if config.values.get("mlp_layer_types") is None:
        dense = [layer == 0 for layer in range(sizes.n_layer)]
    else:
        dense = layers_called("mlp_layer_types", "dense")(config, sizes)
        sparse = layers_called("mlp_layer_types", "sparse")(config, sizes)
        if dense != sorted(dense, reverse=True) or sparse != [not one for one in dense]:
            types = shown(config.values["mlp_layer_types"])
            raise config.error(
                "mlp_layer_types", f"is {types}: llama.cpp wants the dense layers first, and all others sparse"
            )
    listed = config.values.get("mlp_only_layers")  # of the first repositories; transformers does not read it
    if listed is not None and listed != list(range(sum(dense))):
        raise config.error(
            "mlp_only_layers", f"is {shown(listed)}, but the first {sum(dense)} layers are dense: which is right?"
        )
    return dense


def _gates_by_element(config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    """Whether the gate has a value for each element of a head, not one for all, as transformers reads `gating`."""
    gating = config.values.get("gating", True)
    if gating not in (True, "per-head", "per-element") or isinstance(gating, int) != isinstance(gating, bool):
        raise config.error("gating", f"is {shown(gating)}, expected true, per-head or per-element")
    by_element = gating == "per-element"
    types, name = config.values.get("gating_types"), "per_element" if by_element else "per_head"
    if types is not None and types != [name] * sizes.n_layer:
        raise config.error("gating_types", f"is {shown(types)}, but gating makes every layer {name}: which is right?")
    return [by_element] * sizes.n_layer


_LAGUNA = Architecture(
    "LagunaForCausalLM",
    "laguna",
    (
        *EMBEDDINGS,
        *PRE_NORMS,
        *attention(),
        *HEAD_NORMS,
        matrix("self_attn.g_proj", "attn_gate", "n_head", "hidden", layers="!gate by element"),
        matrix("self_attn.g_proj", "attn_gate", "q", "hidden", layers="gate by element"),
        *_mlp(
            router("mlp.gate"),
            *QWEN_EXPERTS,
            replace(ROUTER_BIAS, source="model.layers.{i}.mlp.experts.e_score_correction_bias"),
            *SHARED_EXPERT,
        ),
    ),
    {**DEFAULTS, "moe_routed_scaling_factor": 1.0},
    {
        **SILU,
        "attention_bias": Constant(False, "llama.cpp has no place for the bias of o_proj"),
        "norm_topk_prob": Constant(True, "transformers ignores it", optional=True),
        "decoder_sparse_step": Constant(1, "transformers ignores it", optional=True),
        "moe_apply_router_weight_on_input": Constant(False),
        "moe_router_logit_softcapping": Constant(0.0, "llama.cpp does not cap the router", optional=True),
    },
    sizes={**_EXPERTS, "shared_ffn": Size(("shared_expert_intermediate_size",), "expert_shared_feed_forward_length")},
    by_layer={"n_head": "num_attention_heads_per_layer"},
    layers={"dense": _laguna_dense, "gate by element": _gates_by_element},
    numbers=(NumberRow("moe_routed_scaling_factor", "expert_weights_scale"),),
    keys=_keys(_laguna_dense, True),
    yarn="in the config, for layers with full attention: factor 32, 64 or 128, original context 4096 or 8192",
)

# ---- GLM-4.5 and Solar Open

_SHARED = {**_EXPERTS, "shared": EXPERT_SIZES["shared"], **GROUP_SIZES}
_GLM_DENSE = leading("first_k_dense_replace", 1)
_GLM4_MOE = Architecture(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    (
        *EMBEDDINGS,
        norm("input_layernorm", "attn_norm"),
        norm("post_attention_layernorm", "post_attention_norm"),
        *attention(),
        *attention_biases(when="attention_bias"),
        *(replace(row, when="use_qk_norm") for row in HEAD_NORMS),
        *_mlp(*SPARSE, ROUTER_BIAS),
    ),
    {
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    {**SILU, **_SIGMOIDS},
    sizes=_SHARED,
    layers={"dense": _GLM_DENSE},
    numbers=SCALE,
    keys={**_keys(_GLM_DENSE, sums_up), **GROUPS},
    impossible=(*GROUPS_FIT, _ENOUGH),
    prediction_layers="num_nextn_predict_layers",
    yarn="none is published (GLM-4.5, 4.6)",
)


def _none(_config: ConfigFile, sizes: ModelSizes) -> list[bool]:
    return [False] * sizes.n_layer


_SOLAR_OPEN = replace(
    _GLM4_MOE,
    hf_name="SolarOpenForCausalLM",
    model_type="solar_open",
    tensors=tuple(replace(row, layers="") for row in _GLM4_MOE.tensors if row.layers != "dense"),
    defaults={**_GLM4_MOE.defaults, "intermediate_size": 10240},  # as published: no layer is that wide
    constants={
        **_GLM4_MOE.constants,
        "first_k_dense_replace": Constant(0, "transformers has experts in every layer", optional=True),
        "use_qk_norm": Constant(False, "transformers has no such norms", optional=True),
    },
    layers={},
    keys={**_keys(_none, sums_up), **GROUPS},
    prediction_layers="",
    yarn="in the config: factor 2, original context 65536",
)

# ---- Ling and Ring 2.0


def _several_used(_config: ConfigFile, sizes: ModelSizes) -> bool:
    """The makers' rule: the weights add up to 1 unless there is only one."""
    return sizes.others["experts_used"] > 1


def _shared_width(sizes: ModelSizes) -> int:
    return sizes.dimension("shared*expert_ffn")


_LING_DENSE = leading("first_k_dense_replace")
_BAILING = Architecture(
    "BailingMoeV2ForCausalLM",
    "bailing_moe_v2",
    (
        replace(EMBEDDINGS[0], source="model.word_embeddings.weight"),
        *EMBEDDINGS[1:],
        replace(OWN_HEAD, source="model.word_embeddings.weight"),
        *PRE_NORMS,
        matrix("attention.query_key_value", "attn_qkv", "q+2*kv", "hidden"),
        matrix("attention.dense", "attn_output", "hidden", "q"),
        norm("attention.query_layernorm", "attn_q_norm", "head_dim"),
        norm("attention.key_layernorm", "attn_k_norm", "head_dim"),
        *_mlp(*SPARSE, replace(ROUTER_BIAS, source="model.layers.{i}.mlp.gate.expert_bias")),
    ),
    {"tie_word_embeddings": False},
    {
        **SILU,
        "use_qkv_bias": Constant(False, "llama.cpp has no place for the biases of attention"),
        "use_bias": Constant(False, "llama.cpp has no place for the biases of attention"),
        "use_qk_norm": Constant(True, "llama.cpp has these norms in every model"),
        "norm_topk_prob": Constant(True, "the makers' code ignores it", optional=True),
        "score_function": Constant("sigmoid", "the makers' code knows nothing else", optional=True),
        "moe_router_enable_expert_bias": Constant(True, "the makers' code always has it", optional=True),
        "moe_shared_expert_intermediate_size": Constant(_shared_width, "the makers' code ignores it", optional=True),
    },
    sizes={**_EXPERTS, "shared": Size(("num_shared_experts",), "expert_shared_count"), **GROUP_SIZES},
    layers={"dense": _LING_DENSE},
    numbers=SCALE,
    keys={**_keys(_LING_DENSE, _several_used), **GROUPS},
    impossible=(*GROUPS_FIT, _ENOUGH),
    aliases=("bailing_moe",),
    stated=(
        "rope_theta",
        "partial_rotary_factor",
        "rms_norm_eps",
        "hidden_act",
        "first_k_dense_replace",
        "routed_scaling_factor",
        "use_qkv_bias",
        "use_bias",
        "use_qk_norm",
    ),
    prediction_layers="num_nextn_predict_layers",
    width_is_heads=True,
    yarn="by flags: factor 4, original context 32768",
)

SIGMOID_ROUTERS: tuple[Architecture, ...] = (_LAGUNA, _GLM4_MOE, _SOLAR_OPEN, _BAILING)
