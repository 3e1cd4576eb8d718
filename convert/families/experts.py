"""Families with a mixture of experts: one row each. Experts are stacked, those of one kind in one tensor."""

from __future__ import annotations

from dataclasses import replace

from .dense import GRANITE_DEFAULTS, GRANITE_NUMBERS, QWEN3_VL
from .rows import (
    DEFAULTS,
    EMBEDDINGS,
    HEAD_NORMS,
    OWN_HEAD,
    PRE_NORMS,
    SILU,
    Architecture,
    Constant,
    TensorRow,
    attention,
    attention_biases,
    matrix,
)

_LAYER = "model.layers.{i}."


def _fused(hf: str, gguf: str, out: str, into: str, part: tuple[int, int] = (0, 1)) -> TensorRow:
    """One kind of matrix of all experts in one tensor, shape (experts, n * out, into)."""
    rows = out if part[1] == 1 else f"{part[1]}*{out}"
    return TensorRow(_LAYER + hf, f"blk.{{i}}.{gguf}.weight", ("experts", rows, into), part=part)


def _transposed(row: TensorRow) -> TensorRow:
    """A row of `_fused` whose matrices the checkpoint has the other way round, or as they are."""
    experts, rows, into = row.shape
    return replace(row, shape=(experts, into, rows), transposed=True, other=row)


def _expert(hf: str, gguf: str, out: str, into: str, fused: str, part: tuple[int, int] = (0, 1)) -> TensorRow:
    """One kind of matrix of all experts, each in a tensor of its own, or all of them in `fused`."""
    other = _fused(fused, gguf, out, into, part)
    return TensorRow(_LAYER + hf, other.target, (out, into), other=other)


def stacked(base: str, names: tuple[str, str, str], size: str) -> tuple[TensorRow, ...]:
    """gate, up and down of all experts. size: the width of one expert."""
    gate, up, down = (f"{base}.experts.{{e}}.{name}.weight" for name in names)
    both = "mlp.experts.gate_up_proj"
    return (
        _expert(gate, "ffn_gate_exps", size, "hidden", both, (0, 2)),
        _expert(up, "ffn_up_exps", size, "hidden", both, (1, 2)),
        _expert(down, "ffn_down_exps", "hidden", size, "mlp.experts.down_proj"),
    )


def router(hf: str) -> TensorRow:
    """The matrix that chooses the experts."""
    return matrix(hf, "ffn_gate_inp", "experts", "hidden", float32=True)


QWEN_EXPERTS = stacked("mlp", ("gate_proj", "up_proj", "down_proj"), "expert_ffn")
QWEN_SIZES = {
    "experts": ("num_experts", "num_local_experts"),
    "experts_used": ("num_experts_per_tok",),
    "expert_ffn": ("moe_intermediate_size",),
}
NORMALIZED = {"norm_topk_prob": Constant(True, "llama.cpp lets the weights of a token's experts always add up to 1")}
_EVERY_LAYER = {
    "decoder_sparse_step": Constant(1, "llama.cpp wants experts in every layer", optional=True),
    "mlp_only_layers": Constant([], "llama.cpp wants experts in every layer", optional=True),
}
_LOCAL_SIZES = {"experts": ("num_local_experts",), "experts_used": ("num_experts_per_tok",)}

EXPERTS: tuple[Architecture, ...] = (
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (*EMBEDDINGS, *PRE_NORMS, router("mlp.gate"), *QWEN_EXPERTS, *attention(), *HEAD_NORMS),
        DEFAULTS,
        {
            **SILU,
            **NORMALIZED,
            **_EVERY_LAYER,
            "use_sliding_window": Constant(False),
            "attention_bias": Constant(False, "llama.cpp has no place for the bias of o_proj"),
        },
        sizes=QWEN_SIZES,
        yarn="by flags: factor 4, original context 32768 (2507: 262144)",
    ),
    # As published, and since transformers 5 as save_pretrained writes it.
    Architecture(
        "Qwen3VLMoeTextModel",
        "qwen3_vl_moe_text",
        (
            *EMBEDDINGS,
            *PRE_NORMS,
            router("mlp.gate"),
            _transposed(_fused("mlp.experts.gate_up_proj", "ffn_gate_exps", "expert_ffn", "hidden", (0, 2))),
            _transposed(_fused("mlp.experts.gate_up_proj", "ffn_up_exps", "expert_ffn", "hidden", (1, 2))),
            _transposed(_fused("mlp.experts.down_proj", "ffn_down_exps", "hidden", "expert_ffn")),
            *attention(),
            *HEAD_NORMS,
        ),
        DEFAULTS,
        {**SILU, **_EVERY_LAYER, "attention_bias": Constant(False, "llama.cpp has no place for the bias of o_proj")},
        sizes=QWEN_SIZES,
        wrappers=(replace(QWEN3_VL, hf_name="Qwen3VLMoeForConditionalGeneration", model_type="qwen3_vl_moe"),),
        yarn="by flags: factor 3, original context 256000",
    ),
    Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        (
            *EMBEDDINGS,
            OWN_HEAD,
            *PRE_NORMS,
            router("mlp.gate"),
            *QWEN_EXPERTS,
            matrix("mlp.shared_expert_gate", "ffn_gate_inp_shexp", "1", "hidden", float32=True),
            matrix("mlp.shared_expert.gate_proj", "ffn_gate_shexp", "shared_ffn", "hidden"),
            matrix("mlp.shared_expert.up_proj", "ffn_up_shexp", "shared_ffn", "hidden"),
            matrix("mlp.shared_expert.down_proj", "ffn_down_shexp", "hidden", "shared_ffn"),
            *attention(),
            *attention_biases(when="qkv_bias"),
        ),
        {**DEFAULTS, "qkv_bias": True},
        {
            **SILU,
            **_EVERY_LAYER,
            "use_sliding_window": Constant(False),
            "norm_topk_prob": Constant(False, "llama.cpp never lets the weights of a token's experts add up to 1"),
        },
        sizes={**QWEN_SIZES, "shared_ffn": ("shared_expert_intermediate_size",)},
        width_is_heads=True,
        yarn="by flags: factor 4, original context 32768",
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        (
            *EMBEDDINGS,
            *PRE_NORMS,
            router("block_sparse_moe.gate"),
            *stacked("block_sparse_moe", ("w1", "w3", "w2"), "ffn"),
            *attention(interleaved=True),
        ),
        {**DEFAULTS, "rms_norm_eps": 1e-5},
        SILU,
        sizes=_LOCAL_SIZES,
        window_ignored=True,
    ),
    Architecture(
        "GraniteMoeForCausalLM",
        "granitemoe",
        (
            *EMBEDDINGS,
            *PRE_NORMS,
            router("block_sparse_moe.router.layer"),
            TensorRow(
                _LAYER + "block_sparse_moe.input_linear.weight",
                "blk.{i}.ffn_gate_exps.weight",
                ("experts", "2*ffn", "hidden"),
                part=(0, 2),
            ),
            TensorRow(
                _LAYER + "block_sparse_moe.input_linear.weight",
                "blk.{i}.ffn_up_exps.weight",
                ("experts", "2*ffn", "hidden"),
                part=(1, 2),
            ),
            TensorRow(
                _LAYER + "block_sparse_moe.output_linear.weight",
                "blk.{i}.ffn_down_exps.weight",
                ("experts", "hidden", "ffn"),
            ),
            *attention(interleaved=True),
            *attention_biases(True, "attention_bias", output=True),
        ),
        {**DEFAULTS, **GRANITE_DEFAULTS},
        SILU,
        sizes=_LOCAL_SIZES,
        numbers=GRANITE_NUMBERS,
    ),
)
