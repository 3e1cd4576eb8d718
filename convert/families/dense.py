"""Families without experts and with one kind of layer: one row each."""

from __future__ import annotations

from dataclasses import replace

from .rows import (
    DEFAULTS,
    EMBEDDINGS,
    GATED,
    HEAD_NORMS,
    LAYER_NORM,
    MLP_BIASES,
    OWN_HEAD,
    PRE_NORMS,
    SILU,
    Architecture,
    Constant,
    NumberRow,
    Wrapper,
    attention,
    attention_biases,
    matrix,
    norm,
)
from .sizes import ModelSizes

_NO_O_BIAS = Constant(False, "llama.cpp has no place for the bias of o_proj")
_NO_MLP_BIAS = Constant(False, "llama.cpp has no place for the biases of the MLP")
_NO_WINDOW = {"use_sliding_window": Constant(False)}
GRANITE_NUMBERS = (
    NumberRow("embedding_multiplier", "embedding_scale"),
    NumberRow("residual_multiplier", "residual_scale"),
    NumberRow("attention_multiplier", "attention.scale"),
    NumberRow("logits_scaling", "logit_scale"),
)
GRANITE_DEFAULTS = {row.source: 1.0 for row in GRANITE_NUMBERS}
# Repositories of transformers 4 have the first two beginnings, transformers 5 has the third inside its own class.
MISTRAL3 = Wrapper(
    "Mistral3ForConditionalGeneration",
    "mistral3",
    (
        ("model.language_model.model.", "model."),
        ("model.language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    ("model.vision_tower.", "model.multi_modal_projector."),
)
QWEN3_VL = Wrapper(
    "Qwen3VLForConditionalGeneration",
    "qwen3_vl",
    (("model.language_model.", "model."),),
    ("model.visual.",),
    "its sections turn every pair of text, where Qwen3-VL's own would leave two still, and it has no layers for image features, so "
    "that llama.cpp refuses it beside an mmproj file",
)


# Attention and MLP read the same normalized input, and the embeddings are the output matrix.
COHERE = (*EMBEDDINGS[:2], PRE_NORMS[0], *GATED, *attention())
COHERE_DEFAULTS = {"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu", "logit_scale": 0.0625}
COHERE_ONLY = {
    **SILU,
    "attention_bias": _NO_O_BIAS,
    "tie_word_embeddings": Constant(True, "llama.cpp takes the embeddings for the output matrix"),
}
COHERE_NUMBERS = (NumberRow("logit_scale", "logit_scale"),)


def _is_plus(sizes: ModelSizes) -> bool:
    """llama.cpp's rule for Command R+ (command-r.cpp)."""
    return sizes.n_layer >= 64


def _all_but_every_fourth(sizes: ModelSizes) -> list[int]:
    """SmolLM3's no_rope_layers, in which 1 is a layer with RoPE."""
    return [int(layer % 4 != 3) for layer in range(sizes.n_layer)]


DENSE: tuple[Architecture, ...] = (
    Architecture(
        "LlamaForCausalLM", "llama",
        (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(halves=True),
         *attention_biases(True, "attention_bias", output=True), *MLP_BIASES),
        {**DEFAULTS, "attention_bias": False, "mlp_bias": False}, SILU,
        yarn="in the config (Nous), or by flags",
    ),
    Architecture(
        "MistralForCausalLM", "mistral", (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(halves=True)),
        {**DEFAULTS, "sliding_window": 4096}, SILU, window_ignored=True, yarn="in the config (Nous), or by flags",
    ),
    Architecture(
        "Qwen2ForCausalLM", "qwen2", (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(), *attention_biases()),
        DEFAULTS, {**SILU, **_NO_WINDOW}, width_is_heads=True,
        yarn="by flags: factor 4, original context 32768",
    ),
    Architecture(
        "Qwen3ForCausalLM", "qwen3", (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(), *HEAD_NORMS),
        DEFAULTS, {**SILU, **_NO_WINDOW, "attention_bias": Constant(False)},
        yarn="by flags: factor 4, original context 32768",
    ),
    Architecture(
        "Qwen3VLTextModel", "qwen3_vl_text", (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(), *HEAD_NORMS),
        DEFAULTS, {**SILU, "attention_bias": Constant(False)}, wrappers=(QWEN3_VL,),
        yarn="by flags: factor 3, original context 256000",
    ),
    Architecture(
        "Ministral3ForCausalLM", "ministral3", (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(halves=True)),
        {**DEFAULTS, "rms_norm_eps": 1e-5}, SILU, window_ignored=True,
        numbers=(NumberRow("rope_parameters.llama_4_scaling_beta", "attention.temperature_scale", zero=True),),
        wrappers=(MISTRAL3,), yarn="in the config: factor 16, original context 16384 (Devstral 2: 64, 4096)",
    ),
    Architecture(
        "SmolLM3ForCausalLM", "smollm3", (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(halves=True)),
        {**DEFAULTS, "tie_word_embeddings": True},
        {**SILU, **_NO_WINDOW, "attention_bias": _NO_O_BIAS, "mlp_bias": _NO_MLP_BIAS,
         "no_rope_layers": Constant(_all_but_every_fourth, "llama.cpp leaves out RoPE in every fourth layer", optional=True),
         "no_rope_layer_interval": Constant(4, "llama.cpp leaves out RoPE in every fourth layer", optional=True)},
        yarn="by flags: factor 2, original context 65536",
    ),
    Architecture(
        "ArceeForCausalLM", "arcee",
        (*EMBEDDINGS, *PRE_NORMS, matrix("mlp.up_proj", "ffn_up", "ffn", "hidden"),
         matrix("mlp.down_proj", "ffn_down", "hidden", "ffn"), *attention(halves=True)),
        {**DEFAULTS, "rms_norm_eps": 1e-5, "hidden_act": "relu2"},
        {"hidden_act": Constant("relu2"), "attention_bias": _NO_O_BIAS, "mlp_bias": _NO_MLP_BIAS},
        yarn="in the config: factor 20, original context 4096",
    ),
    Architecture(
        "Glm4ForCausalLM", "glm4",
        (*EMBEDDINGS, *PRE_NORMS, norm("post_self_attn_layernorm", "post_attention_norm"),
         norm("post_mlp_layernorm", "post_ffw_norm"), matrix("mlp.gate_up_proj", "ffn_up", "2*ffn", "hidden"),
         matrix("mlp.down_proj", "ffn_down", "hidden", "ffn"), *attention(),
         *attention_biases(when="attention_bias")),
        {**DEFAULTS, "rms_norm_eps": 1.5625e-7, "attention_bias": True}, SILU,
        yarn="by flags: factor 4, original context 32768",
    ),
    Architecture(
        "Phi3ForCausalLM", "phi3",
        (*EMBEDDINGS, *PRE_NORMS, matrix("self_attn.qkv_proj", "attn_qkv", "q+2*kv", "hidden"),
         matrix("self_attn.o_proj", "attn_output", "hidden", "q"),
         matrix("mlp.gate_up_proj", "ffn_up", "2*ffn", "hidden"), matrix("mlp.down_proj", "ffn_down", "hidden", "ffn")),
        {**DEFAULTS, "rms_norm_eps": 1e-5}, SILU, width_is_heads=True, window_ignored=True,
        yarn="by flags; LongRoPE in the config: original context 4096, longest 131072",
    ),
    Architecture(
        "GraniteForCausalLM", "granite",
        (*EMBEDDINGS, *PRE_NORMS, *GATED, *attention(halves=True),
         *attention_biases(True, "attention_bias", output=True), *MLP_BIASES),
        {**DEFAULTS, **GRANITE_DEFAULTS}, SILU, numbers=GRANITE_NUMBERS,
    ),
    Architecture(
        "CohereForCausalLM", "cohere",
        (*COHERE, replace(norm("self_attn.q_norm", "attn_q_norm", "n_head", "head_dim"), when="use_qk_norm", float32=True),
         replace(norm("self_attn.k_norm", "attn_k_norm", "n_kv_head", "head_dim"), when="use_qk_norm", float32=True)),
        COHERE_DEFAULTS,
        {**COHERE_ONLY, "use_qk_norm": Constant(_is_plus, "llama.cpp has these norms in models of 64 layers and more, and only there")},
        numbers=COHERE_NUMBERS, width_is_heads=True, epsilon=LAYER_NORM,
        yarn="by flags; `model_max_length` of Command R's config is ignored, as in transformers",
    ),
    Architecture(
        "Olmo2ForCausalLM", "olmo2",
        (*EMBEDDINGS, OWN_HEAD, norm("post_attention_layernorm", "post_attention_norm"),
         norm("post_feedforward_layernorm", "post_ffw_norm"), *GATED, *attention(),
         norm("self_attn.q_norm", "attn_q_norm", "q"), norm("self_attn.k_norm", "attn_k_norm", "kv")),
        {**DEFAULTS, "rms_norm_eps": 1e-5}, {**SILU, "attention_bias": Constant(False)}, width_is_heads=True,
    ),
)  # fmt: skip
