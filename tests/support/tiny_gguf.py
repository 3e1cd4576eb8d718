"""Tiny GGUFs with random weights, one row per architecture: what llama.cpp requires of a file to build a graph.

They do not come from `convert`, so architectures that it does not support can be run too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .gguf_files import BYTE_TOKENIZER, random_tensors, write_gguf

EMBEDDING, HEADS, HEAD_DIM, N_LAYERS, EXPERTS = 64, 4, 16, 4, 4
N_WORDS = 262
WINDOW = 8
# Shape letters: embedding, queries, keys (one of them per model), fused q k v, head, feed-forward and twice it, …
SIZES = {"E": EMBEDDING, "A": HEADS * HEAD_DIM, "D": HEAD_DIM, "F": 32, "G": 64, "X": EXPERTS, "H": HEADS, "V": N_WORDS}
WHOLE_MODEL = ("token_embd", "output", "output_norm", "output.bias", "output_norm.bias")

DENSE = (
    "token_embd=E.V output=E.V output_norm=E attn_norm=E attn_q=E.A attn_k=E.K attn_v=E.K attn_output=A.E "
    "ffn_norm=E ffn_gate=E.F ffn_up=E.F ffn_down=F.E"
)
QK_NORM = "attn_q_norm=D attn_k_norm=D "
POST_NORM = "post_attention_norm=E post_ffw_norm=E "
BIASES = "output_norm.bias=E attn_norm.bias=E "
MLP_BIASES = "attn_output.bias=E ffn_norm.bias=E ffn_up.bias=F ffn_down.bias=E "
MOE = "ffn_gate_inp=E.X ffn_gate_exps=E.F.X ffn_up_exps=E.F.X ffn_down_exps=F.E.X "
SHARED = MOE + "ffn_gate_shexp=E.F ffn_up_shexp=E.F ffn_down_shexp=F.E "
GATE = "ffn_gate_inp_shexp=E"
SECTIONS = {"rope.dimension_sections": [3, 3, 2, 0]}
MOE_BIASES = "ffn_gate_inp.bias=X ffn_gate_exps.bias=F.X ffn_up_exps.bias=F.X ffn_down_exps.bias=E.X "
SEPARATE_QKV = "attn_q attn_k attn_v"
MLA = "attn_q_a_norm=32 attn_kv_a_norm=24 attn_q_a=E.32 attn_q_b=32.64 attn_kv_a_mqa=E.32 attn_k_b=8.24.H attn_v_b=24.8.H "
MLA_KEYS = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 24,
    "rope.dimension_count": 8,
    "attention.key_length": 32,
    "attention.value_length": 24,
    "attention.key_length_mla": 16,
    "attention.value_length_mla": 8,
}
# d_state 8, 2 heads of keys and 4 of values, kernel 4
DELTA = "attn_norm=E post_attention_norm=E attn_qkv=E.64 attn_gate=E.32 ssm_conv1d=4.64 ssm_a=4 ssm_dt.bias=4 ssm_norm=8 ssm_out=32.E "
DELTA_KEYS = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 8,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 32,
}
GATED_Q = QK_NORM + "post_attention_norm=E attn_q=E.128"
DENSE_FIRST = {"leading_dense_block_count": 1}


@dataclass(frozen=True)
class Tiny:
    """How a file of an architecture differs from a dense llama: tensors added and dropped, experts, keys."""

    add: str = ""
    drop: str = ""
    experts: str = ""  # in place of ffn_gate, ffn_up, ffn_down from layer leading_dense_block_count on
    keys: dict[str, Any] = field(default_factory=dict)
    linear: str = ""  # in place of attention in three of four layers


ARCHITECTURES: dict[str, Tiny] = {
    "llama": Tiny(),
    "mistral3": Tiny(),
    "mistral4": Tiny(MLA + "attn_output=32.E", SEPARATE_QKV, SHARED, {**MLA_KEYS, **DENSE_FIRST}),
    "qwen2": Tiny(),
    "qwen2moe": Tiny(experts=SHARED + GATE),
    "qwen3": Tiny(QK_NORM),
    "qwen3moe": Tiny(QK_NORM, experts=MOE),
    "qwen3vl": Tiny(QK_NORM, keys=SECTIONS),
    "qwen3vlmoe": Tiny(QK_NORM, experts=MOE, keys=SECTIONS),
    "qwen3next": Tiny(GATED_Q, "ffn_norm", SHARED + GATE, DELTA_KEYS, DELTA + "ssm_ba=E.8"),
    "qwen35": Tiny(GATED_Q, "ffn_norm", "", {**DELTA_KEYS, **SECTIONS}, DELTA + "ssm_alpha=E.4 ssm_beta=E.4"),
    "qwen35moe": Tiny(
        GATED_Q, "ffn_norm", SHARED + GATE, {**DELTA_KEYS, **SECTIONS}, DELTA + "ssm_alpha=E.4 ssm_beta=E.4"
    ),
    "deepseek": Tiny(experts=SHARED, keys=DENSE_FIRST),
    "deepseek2": Tiny(MLA + "attn_output=32.E", SEPARATE_QKV, SHARED, {**MLA_KEYS, **DENSE_FIRST}),
    "gpt-oss": Tiny("post_attention_norm=E attn_sinks=H attn_output.bias=E", "ffn_norm", MOE + MOE_BIASES),
    "olmo": Tiny(drop="output_norm attn_norm ffn_norm"),
    "olmo2": Tiny("attn_q_norm=A attn_k_norm=K " + POST_NORM, "attn_norm ffn_norm"),
    "olmoe": Tiny("attn_q_norm=A attn_k_norm=A", experts=MOE, keys={"attention.head_count_kv": 4}),
    "phi3": Tiny("attn_qkv=E.Q ffn_up=E.G", SEPARATE_QKV + " ffn_gate"),
    "phimoe": Tiny(BIASES + "output.bias=V attn_output.bias=E ffn_norm.bias=E", experts=MOE),
    "gemma2": Tiny(POST_NORM, "output"),
    "gemma3": Tiny(POST_NORM + QK_NORM, keys={"block_count": 7}),
    "granite": Tiny(keys={"logit_scale": 1.0}),
    "granitemoe": Tiny(experts=SHARED, keys={"logit_scale": 1.0}),
    "minicpm": Tiny(),
    "exaone": Tiny(),
    "exaone-moe": Tiny(QK_NORM, experts=SHARED, keys={**DENSE_FIRST, "expert_gating_func": 2}),
    "deci": Tiny(),
    "arcee": Tiny(drop="ffn_gate"),
    "smollm3": Tiny(),
    "seed_oss": Tiny("post_attention_norm=E", "ffn_norm"),
    "grok": Tiny("attn_output_norm=E post_ffw_norm=E", experts=MOE),
    "laguna": Tiny(
        QK_NORM + "attn_gate=E.H", experts=SHARED + "exp_probs_b.bias=X", keys={**DENSE_FIRST, "block_count": 5}
    ),
    "mellum": Tiny(QK_NORM, experts=MOE),
    "glm4": Tiny(POST_NORM + "ffn_up=E.G", "ffn_gate"),
    "glm4moe": Tiny("post_attention_norm=E", "ffn_norm", SHARED + "exp_probs_b.bias=X", DENSE_FIRST),
    "chatglm": Tiny("ffn_up=E.G", "ffn_gate"),
    "command-r": Tiny(drop="output ffn_norm"),
    "cohere2": Tiny(drop="output ffn_norm", keys={"logit_scale": 1.0}),
    "internlm2": Tiny(),
    "ernie4_5": Tiny(),
    "ernie4_5-moe": Tiny(experts=SHARED, keys={"interleave_moe_layer_step": 1}),
    "hunyuan-dense": Tiny(QK_NORM),
    "hunyuan-moe": Tiny(QK_NORM, experts=SHARED),
    "starcoder2": Tiny(BIASES + MLP_BIASES, "ffn_gate"),
    "stablelm": Tiny(BIASES, "ffn_norm"),
    "bailingmoe": Tiny(experts=SHARED, keys={"leading_dense_block_count": 0}),
    "bailingmoe2": Tiny(QK_NORM + "attn_qkv=E.Q", SEPARATE_QKV, SHARED, {**DENSE_FIRST, "expert_gating_func": 2}),
    "apertus": Tiny(QK_NORM, "ffn_gate", keys={f"xielu.{n}": 0.5 for n in ("alpha_n", "alpha_p", "beta", "eps")}),
    "dots1": Tiny(QK_NORM, experts=SHARED, keys={**DENSE_FIRST, "attention.head_count_kv": 4, "expert_gating_func": 2}),
    "afmoe": Tiny(
        POST_NORM + QK_NORM + "attn_gate=E.A",
        experts=SHARED + "exp_probs_b.bias=X",
        keys={**DENSE_FIRST, "block_count": 6},
    ),
    "minimax-m2": Tiny(
        "attn_q_norm=A attn_k_norm=K", experts=MOE + "exp_probs_b.bias=X", keys={"expert_gating_func": 2}
    ),
    "bitnet": Tiny("attn_sub_norm=E ffn_sub_norm=F", "output"),
    "falcon": Tiny(BIASES + "attn_qkv=E.Q", SEPARATE_QKV + " ffn_norm ffn_gate"),
    "gptneox": Tiny(
        BIASES + MLP_BIASES + "attn_qkv=E.Q attn_qkv.bias=Q",
        SEPARATE_QKV + " ffn_gate",
        keys={"use_parallel_residual": True},
    ),
    "nemotron": Tiny(BIASES + "ffn_norm.bias=E", "ffn_gate"),
    "orion": Tiny(BIASES + "ffn_norm.bias=E"),
    "xverse": Tiny(),
    "nanbeige": Tiny(),
    "jais2": Tiny(BIASES + MLP_BIASES, "ffn_gate"),
    "pangu-embedded": Tiny("attn_output.bias=E"),
}


def model_keys(architecture: str) -> dict[str, Any]:
    """The keys that depend only on the architecture: all but those of positions."""
    row = ARCHITECTURES[architecture]
    moe = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_shared_count": 1}
    lengths = {f"{n}feed_forward_length": SIZES["F"] for n in ("", "expert_", "expert_shared_")}
    return {
        "context_length": 1024,
        "embedding_length": EMBEDDING,
        "block_count": N_LAYERS,
        "vocab_size": N_WORDS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 2,
        "attention.sliding_window": WINDOW,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        **lengths,
        **(moe if row.experts else {}),
        **row.keys,
    }


def tensor_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in NumPy's order: the last dimension varies fastest."""
    row, keys = ARCHITECTURES[architecture], model_keys(architecture)
    kv_width = keys["attention.head_count_kv"] * HEAD_DIM
    sizes = SIZES | {"K": kv_width, "Q": SIZES["A"] + 2 * kv_width}

    def parse(text: str) -> dict[str, tuple[int, ...]]:
        items = (item.split("=") for item in text.split())
        return {n: tuple(sizes.get(d) or int(d) for d in reversed(dims.split("."))) for n, dims in items}

    dense = {n: s for n, s in (parse(DENSE) | parse(row.add)).items() if n not in row.drop.split()}
    shapes = {n: s for n, s in dense.items() if n in WHOLE_MODEL}
    for layer in range(keys["block_count"]):
        of_layer = {n: s for n, s in dense.items() if n not in WHOLE_MODEL}
        if row.linear and layer % 4 != 3:
            of_layer = {n: s for n, s in of_layer.items() if n.startswith("ffn_")} | parse(row.linear)
        if row.experts and layer >= keys.get("leading_dense_block_count", 0):
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                of_layer.pop(name, None)
            of_layer |= parse(row.experts)
        shapes |= {f"blk.{layer}.{n}": s for n, s in of_layer.items()}
    return {n if n.endswith((".bias", "ssm_a")) else f"{n}.weight": s for n, s in shapes.items()}


def write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Path:
    """A file of random weights. keys: more metadata, without the architecture's prefix. tensors: more tensors."""
    own = model_keys(architecture) | dict(keys or {})
    prefixed = {key if key.startswith("xielu.") else f"{architecture}.{key}": value for key, value in own.items()}
    weights = random_tensors(tensor_shapes(architecture))
    return write_gguf(path, architecture, BYTE_TOKENIZER | prefixed, {**weights, **(tensors or {})})
