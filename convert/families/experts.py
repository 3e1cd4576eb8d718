"""Families with a mixture of experts: one row each. Experts are stacked, those of one kind in one tensor."""

from __future__ import annotations

from dataclasses import replace

from .dense import GRANITE_DEFAULTS, GRANITE_NUMBERS, QWEN3_VL
from .orders import Order, equal_part
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
from .sizes import Size

_LAYER = "model.layers.{i}."


def _fused(hf: str, gguf: str, out: str, into: str, rows: Order | None = None) -> TensorRow:
    """One kind of matrix of all experts in one tensor, shape (experts, out, into). rows: of these, the target's."""
    return TensorRow(_LAYER + hf, f"blk.{{i}}.{gguf}.weight", ("experts", out, into), rows)


def _transposed(row: TensorRow) -> TensorRow:
    """A row of `_fused` whose matrices the checkpoint has the other way round, or as they are."""
    experts, out, into = row.shape
    return replace(row, shape=(experts, into, out), rows=None, columns=row.rows, transposed=True, other=row)


def _gate_and_up(hf: str, size: str) -> tuple[TensorRow, TensorRow]:
    """Two of `_fused` in one tensor."""
    return (
        _fused(hf, "ffn_gate_exps", f"2*{size}", "hidden", equal_part(0, 2)),
        _fused(hf, "ffn_up_exps", f"2*{size}", "hidden", equal_part(1, 2)),
    )


def _expert(hf: str, out: str, into: str, fused: TensorRow) -> TensorRow:
    """One kind of matrix of all experts, each in a tensor of its own, or all of them in `fused`."""
    return TensorRow(_LAYER + hf, fused.target, (out, into), other=fused)


def stacked(base: str, names: tuple[str, str, str], size: str) -> tuple[TensorRow, ...]:
    """gate, up and down of all experts. size: the width of one expert."""
    gate, up, down = (f"{base}.experts.{{e}}.{name}.weight" for name in names)
    both = _gate_and_up("mlp.experts.gate_up_proj", size)
    return (
        _expert(gate, size, "hidden", both[0]),
        _expert(up, size, "hidden", both[1]),
        _expert(down, "hidden", size, _fused("mlp.experts.down_proj", "ffn_down_exps", "hidden", size)),
    )


def router(hf: str) -> TensorRow:
    """The matrix that chooses the experts."""
    return matrix(hf, "ffn_gate_inp", "experts", "hidden", float32=True)


QWEN_EXPERTS = stacked("mlp", ("gate_proj", "up_proj", "down_proj"), "expert_ffn")
SHARED_EXPERT = (
    matrix("mlp.shared_expert.gate_proj", "ffn_gate_shexp", "shared_ffn", "hidden"),
    matrix("mlp.shared_expert.up_proj", "ffn_up_shexp", "shared_ffn", "hidden"),
    matrix("mlp.shared_expert.down_proj", "ffn_down_shexp", "hidden", "shared_ffn"),
)
GATED_SHARED_EXPERT = (
    matrix("mlp.shared_expert_gate", "ffn_gate_inp_shexp", "1", "hidden", float32=True),
    *SHARED_EXPERT,
)
_USED = Size(("num_experts_per_tok",), "expert_used_count")
QWEN_SIZES = {
    "experts": Size(("num_experts", "num_local_experts"), "expert_count"),
    "experts_used": _USED,
    "expert_ffn": Size(("moe_intermediate_size",), "expert_feed_forward_length"),
}
NORMALIZED = {"norm_topk_prob": Constant(True, "llama.cpp lets the weights of a token's experts always add up to 1")}
EVERY_LAYER = {
    "decoder_sparse_step": Constant(1, "llama.cpp wants experts in every layer", optional=True),
    "mlp_only_layers": Constant([], "llama.cpp wants experts in every layer", optional=True),
}
_LOCAL_SIZES = {"experts": Size(("num_local_experts",), "expert_count"), "experts_used": _USED}

EXPERTS: tuple[Architecture, ...] = (
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (*EMBEDDINGS, *PRE_NORMS, router("mlp.gate"), *QWEN_EXPERTS, *attention(), *HEAD_NORMS),
        DEFAULTS,
        {
            **SILU,
            **NORMALIZED,
            **EVERY_LAYER,
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
            *map(_transposed, _gate_and_up("mlp.experts.gate_up_proj", "expert_ffn")),
            _transposed(_fused("mlp.experts.down_proj", "ffn_down_exps", "hidden", "expert_ffn")),
            *attention(),
            *HEAD_NORMS,
        ),
        DEFAULTS,
        {**SILU, **EVERY_LAYER, "attention_bias": Constant(False, "llama.cpp has no place for the bias of o_proj")},
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
            *GATED_SHARED_EXPERT,
            *attention(),
            *attention_biases(when="qkv_bias"),
        ),
        {**DEFAULTS, "qkv_bias": True},
        {
            **SILU,
            **EVERY_LAYER,
            "use_sliding_window": Constant(False),
            "norm_topk_prob": Constant(False, "llama.cpp never lets the weights of a token's experts add up to 1"),
        },
        sizes={
            **QWEN_SIZES,
            "shared_ffn": Size(("shared_expert_intermediate_size",), "expert_shared_feed_forward_length"),
        },
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
            *attention(halves=True),
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
            *_gate_and_up("block_sparse_moe.input_linear.weight", "ffn"),
            _fused("block_sparse_moe.output_linear.weight", "ffn_down_exps", "hidden", "ffn"),
            *attention(halves=True),
            *attention_biases(True, "attention_bias", output=True),
        ),
        {**DEFAULTS, **GRANITE_DEFAULTS},
        SILU,
        sizes=_LOCAL_SIZES,
        numbers=GRANITE_NUMBERS,
    ),
)
