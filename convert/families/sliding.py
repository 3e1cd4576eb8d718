"""Families in which some layers have a sliding window, and positions of their own: one row each."""

from __future__ import annotations

from dataclasses import replace

from .dense import COHERE, COHERE_DEFAULTS, COHERE_NUMBERS, COHERE_ONLY, DENSE
from .experts import NORMALIZED, QWEN_EXPERTS, QWEN_SIZES, router
from .orders import Order, every
from .rows import (
    DEFAULTS,
    EMBEDDINGS,
    GATED,
    HEAD_NORMS,
    LAYER_NORM,
    OWN_HEAD,
    PRE_NORMS,
    SILU,
    Architecture,
    Constant,
    NumberRow,
    TensorRow,
    attention,
    attention_biases,
    bias,
    norm,
    plus_one,
)
from .sizes import ModelSizes, Size

_OLMO2 = next(row for row in DENSE if row.model_type == "olmo2")
_NO_BIAS = {"attention_bias": Constant(False, "llama.cpp has no place for the bias of o_proj")}


def _sparse(sizes: ModelSizes) -> list[str]:
    return ["sparse"] * sizes.n_layer


def _gpt_oss_experts(
    hf: str, gguf: str, out: str, into: str, order: Order | None = None
) -> tuple[TensorRow, TensorRow]:
    """One kind of matrix of all experts, [experts, in, out] or in MXFP4, and its bias. order: of `out` on disk, the target's."""
    name, target = f"model.layers.{{i}}.mlp.experts.{hf}", f"blk.{{i}}.{gguf}"
    packed = TensorRow(name + "_blocks", target + ".weight", ("experts", out, into), order)
    return (
        TensorRow(name, target + ".weight", ("experts", into, out), columns=order, transposed=True, other=packed),
        TensorRow(name + "_bias", target + ".bias", ("experts", out), columns=order, float32=True),
    )


def _gemma3_scalar(sizes: ModelSizes) -> int:
    """llama.cpp's rule (gemma3.cpp): the head dimension, but in a model of 62 layers hidden_size / num_attention_heads."""
    return sizes.hidden // sizes.n_head if sizes.n_layer == 62 else sizes.head_dim


SLIDING_WINDOWS: tuple[Architecture, ...] = (
    replace(
        _OLMO2,
        hf_name="Olmo3ForCausalLM",
        model_type="olmo3",
        yarn="in the config, for layers with full attention: factor 8, original context 8192",
    ),
    Architecture(
        "MellumForCausalLM",
        "mellum",
        (*EMBEDDINGS, OWN_HEAD, *PRE_NORMS, router("mlp.gate"), *QWEN_EXPERTS, *attention(), *HEAD_NORMS),
        {**DEFAULTS, "norm_topk_prob": True},
        {
            **SILU,
            **NORMALIZED,
            **_NO_BIAS,
            "mlp_layer_types": Constant(_sparse, "llama.cpp wants experts in every layer", optional=True),
            "num_nextn_predict_layers": Constant(0, "llama.cpp has no place for such layers", optional=True),
        },
        sizes=QWEN_SIZES,
        yarn="in the config, for layers with full attention: factor 16, original context 8192",
    ),
    Architecture(
        "Cohere2ForCausalLM",
        "cohere2",
        COHERE,
        COHERE_DEFAULTS,
        COHERE_ONLY,
        numbers=COHERE_NUMBERS,
        width_is_heads=True,
        epsilon=LAYER_NORM,
        yarn="by flags, for layers with a sliding window: the others have no positions",
    ),
    Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        (
            EMBEDDINGS[0],
            replace(EMBEDDINGS[1], values=plus_one),
            EMBEDDINGS[2],
            norm("input_layernorm", "attn_norm", values=plus_one),
            norm("post_attention_layernorm", "post_attention_norm", values=plus_one),
            norm("pre_feedforward_layernorm", "ffn_norm", values=plus_one),
            norm("post_feedforward_layernorm", "post_ffw_norm", values=plus_one),
            *GATED,
            *attention(),
            *(replace(row, values=plus_one) for row in HEAD_NORMS),
        ),
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
        },
        {
            **_NO_BIAS,
            "hidden_activation": Constant("gelu_pytorch_tanh"),
            "query_pre_attn_scalar": Constant(_gemma3_scalar, "llama.cpp takes this from the sizes of the model"),
            "attn_logit_softcapping": Constant(None),
            "use_bidirectional_attention": Constant(False),
        },
        numbers=(NumberRow("final_logit_softcapping", "final_logit_softcapping", optional=True),),
        yarn="none is published; linear factor 8 for layers with full attention is in the config of 4B and larger",
    ),
    Architecture(
        "GptOssForCausalLM",
        "gpt_oss",
        (
            *EMBEDDINGS,
            OWN_HEAD,
            norm("input_layernorm", "attn_norm"),
            norm("post_attention_layernorm", "post_attention_norm"),
            *attention(),
            *attention_biases(output=True),
            TensorRow("model.layers.{i}.self_attn.sinks", "blk.{i}.attn_sinks.weight", ("n_head",)),
            router("mlp.router"),
            bias("mlp.router", "ffn_gate_inp", "experts"),
            *_gpt_oss_experts("gate_up_proj", "ffn_gate_exps", "2*ffn", "hidden", every(2, 0)),
            *_gpt_oss_experts("gate_up_proj", "ffn_up_exps", "2*ffn", "hidden", every(2, 1)),
            *_gpt_oss_experts("down_proj", "ffn_down_exps", "hidden", "ffn"),
        ),
        {**DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        {
            **SILU,
            "attention_bias": Constant(True, "llama.cpp wants the biases of all four projections"),
            "swiglu_alpha": Constant(1.702),
            "swiglu_limit": Constant(7.0),
        },
        sizes={
            "experts": Size(("num_local_experts", "num_experts"), "expert_count"),
            "experts_used": Size(("num_experts_per_tok",), "expert_used_count"),
            "expert_ffn": Size(("intermediate_size",), "expert_feed_forward_length"),
        },
        yarn="in the config: factor 32, original context 4096, `truncate: false`",
    ),
)
