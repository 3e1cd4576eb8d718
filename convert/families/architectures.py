"""The model families that convert supports: one row each, with its tensors, its hyper-parameters and what it cannot use.

Names on the left are Hugging Face's, on the right llama.cpp's (gguf-py, tensor_mapping; llama-model.cpp). All differences
between families are data in their rows: no code below looks at a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole
from yarn_edge.checkpoint.dialects import head_dim
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.llama_rules.honoured import GGUF_ARCHITECTURES
from yarn_edge.positions.scaling import RopeScaling

Raw = npt.NDArray[Any]


@dataclass(frozen=True)
class ModelSizes:
    """The hyper-parameters that determine the shapes of the tensors."""

    n_layer: int
    hidden: int
    ffn: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab: int

    def dimension(self, name: str) -> int:
        """A dimension by its name in a `TensorRow`."""
        return {"q": self.n_head * self.head_dim, "kv": self.n_kv_head * self.head_dim}.get(name) or int(
            getattr(self, name)
        )


def interleave(sizes: ModelSizes, raw: Raw) -> Raw:
    """Half-split pairs -> interleaved pairs: rows d and d + D/2 of each head become rows 2d and 2d + 1.

    raw: rows of whole heads, of any dtype.
    """
    pairs = raw.reshape(-1, 2, sizes.head_dim // 2, *raw.shape[1:])
    return pairs.swapaxes(1, 2).reshape(raw.shape)


@dataclass(frozen=True)
class TensorRow:
    """One tensor, or one per layer with {i} in its names. interleaved: its rows go through `interleave`, head by head.

    when: a config key that must be true for the tensor to exist, or false with "!" before it; "" means always.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    interleaved: bool = False
    when: str = ""


def _projection(hf: str, gguf: str, out: str, into: str, interleaved: bool = False) -> TensorRow:
    return TensorRow(f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", (out, into), interleaved)


def _bias(hf: str, gguf: str, size: str, interleaved: bool = False, when: str = "") -> TensorRow:
    return TensorRow(f"model.layers.{{i}}.{hf}.bias", f"blk.{{i}}.{gguf}.bias", (size,), interleaved, when)


def _norm(hf: str, gguf: str, size: str) -> TensorRow:
    return TensorRow(f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", (size,))


def _attention(interleaved: bool = False) -> tuple[TensorRow, ...]:
    return (
        _projection("self_attn.q_proj", "attn_q", "q", "hidden", interleaved),
        _projection("self_attn.k_proj", "attn_k", "kv", "hidden", interleaved),
        _projection("self_attn.v_proj", "attn_v", "kv", "hidden"),
        _projection("self_attn.o_proj", "attn_output", "hidden", "q"),
    )


_EMBEDDINGS = (
    TensorRow("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
    TensorRow("model.norm.weight", "output_norm.weight", ("hidden",)),
    TensorRow("lm_head.weight", "output.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
)
_BLOCK = (
    _norm("input_layernorm", "attn_norm", "hidden"),
    _norm("post_attention_layernorm", "ffn_norm", "hidden"),
    _projection("mlp.gate_proj", "ffn_gate", "ffn", "hidden"),
    _projection("mlp.up_proj", "ffn_up", "ffn", "hidden"),
    _projection("mlp.down_proj", "ffn_down", "hidden", "ffn"),
)


@dataclass(frozen=True)
class Architecture:
    """One family. constants: the only values that llama.cpp supports for these config keys.

    width_is_heads: llama.cpp requires head_dim * heads == hidden size.
    """

    hf_name: str
    model_type: str
    tensors: tuple[TensorRow, ...]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    width_is_heads: bool = False
    sliding_window: bool = False

    @property
    def gguf(self) -> str:
        """The family's architecture in a GGUF."""
        return GGUF_ARCHITECTURES[self.model_type]


_COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
_COMMON_CONSTANTS = {"hidden_act": "silu"}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "LlamaForCausalLM", "llama",
        (*_EMBEDDINGS, *_BLOCK, *_attention(interleaved=True),
         _bias("self_attn.q_proj", "attn_q", "q", True, "attention_bias"),
         _bias("self_attn.k_proj", "attn_k", "kv", True, "attention_bias"),
         _bias("self_attn.v_proj", "attn_v", "kv", False, "attention_bias"),
         _bias("self_attn.o_proj", "attn_output", "hidden", False, "attention_bias"),
         _bias("mlp.gate_proj", "ffn_gate", "ffn", False, "mlp_bias"),
         _bias("mlp.up_proj", "ffn_up", "ffn", False, "mlp_bias"),
         _bias("mlp.down_proj", "ffn_down", "hidden", False, "mlp_bias")),
        {**_COMMON_DEFAULTS, "attention_bias": False, "mlp_bias": False},
        _COMMON_CONSTANTS,
    ),
    Architecture(
        "MistralForCausalLM", "mistral",
        (*_EMBEDDINGS, *_BLOCK, *_attention(interleaved=True)),
        {**_COMMON_DEFAULTS, "sliding_window": 4096},
        _COMMON_CONSTANTS, sliding_window=True,
    ),
    Architecture(
        "Qwen2ForCausalLM", "qwen2",
        (*_EMBEDDINGS, *_BLOCK, *_attention(),
         _bias("self_attn.q_proj", "attn_q", "q"), _bias("self_attn.k_proj", "attn_k", "kv"),
         _bias("self_attn.v_proj", "attn_v", "kv")),
        _COMMON_DEFAULTS, {**_COMMON_CONSTANTS, "use_sliding_window": False}, width_is_heads=True,
    ),
    Architecture(
        "Qwen3ForCausalLM", "qwen3",
        (*_EMBEDDINGS, *_BLOCK, *_attention(),
         _norm("self_attn.q_norm", "attn_q_norm", "head_dim"), _norm("self_attn.k_norm", "attn_k_norm", "head_dim")),
        _COMMON_DEFAULTS, {**_COMMON_CONSTANTS, "use_sliding_window": False, "attention_bias": False},
    ),
)  # fmt: skip


def architecture_of(config: ConfigFile) -> Architecture:
    """The row for a checkpoint, by `architectures`, else by `model_type`. Raises YarnEdgeError for an unknown family."""
    names = config.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_type = config.values.get("model_type")
    for row in ARCHITECTURES:
        if name == row.hf_name and model_type not in (None, row.model_type):
            raise config.error(
                "model_type",
                f"is {one_line(repr(model_type), 60)}, but architectures says {name}: transformers uses the "
                "former; correct one of them",
            )
        if name == row.hf_name or (name is None and model_type == row.model_type):
            return row
    given = name if name is not None else model_type
    known = ", ".join(row.hf_name for row in ARCHITECTURES)
    raise config.error(
        "architectures", f"is {one_line(repr(given), 80)}, which convert does not support; it supports {known}"
    )


def value_of(row: Architecture, config: ConfigFile, key: str) -> Any:
    """A config value, or the family's default if the key is absent."""
    return config.values[key] if key in config.values else row.defaults.get(key)


def flag_of(row: Architecture, config: ConfigFile, key: str) -> bool:
    """A boolean of the config; if it is absent or null, the family's default, which is false."""
    given = config.boolean(key)
    return bool(row.defaults.get(key)) if given is None else given


def model_sizes(row: Architecture, config: ConfigFile) -> ModelSizes:
    """The hyper-parameters. Raises YarnEdgeError if they contradict each other, or llama.cpp cannot run them."""
    for key, expected in row.constants.items():
        value = flag_of(row, config, key) if isinstance(expected, bool) else value_of(row, config, key)
        if value is None and expected is not None:
            raise config.error(key, f"is null, which transformers fails on: write {expected!r}")
        if value is not None and value != expected:
            raise config.error(key, f"is {one_line(repr(value), 80)}: only {expected!r} can be converted")
    types = config.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise config.error("layer_types", f"is {one_line(repr(types), 80)}: only full_attention can be converted")
    n_head = config.required_integer("num_attention_heads")
    sizes = ModelSizes(
        config.required_integer("num_hidden_layers"),
        config.required_integer("hidden_size"),
        config.required_integer("intermediate_size"),
        n_head,
        config.integer("num_key_value_heads") or n_head,
        head_dim(config),
        config.required_integer("vocab_size"),
    )
    if sizes.n_head % sizes.n_kv_head:
        raise config.error(
            "num_key_value_heads", f"is {sizes.n_kv_head}, which does not divide num_attention_heads, {n_head}"
        )
    if sizes.head_dim % 2:
        raise config.error("head_dim", f"is {sizes.head_dim}: RoPE needs an even number")
    if row.width_is_heads and sizes.head_dim * sizes.n_head != sizes.hidden:
        raise config.error(
            "head_dim",
            f"is {sizes.head_dim} with {n_head} heads and hidden_size {sizes.hidden}: "
            f"llama.cpp runs {row.gguf} only if heads * head_dim is the hidden size",
        )
    eps = value_of(row, config, "rms_norm_eps")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise config.error("rms_norm_eps", f"is {one_line(repr(eps), 60)}, not a number between 0 and 1")
    return sizes


def check_sliding_window(row: Architecture, config: ConfigFile, scaling: RopeScaling) -> None:
    """Refuse a sliding window that is shorter than the context: llama.cpp attends to the whole context in these families."""
    window = value_of(row, config, "sliding_window") if row.sliding_window else None
    if window is None:
        return
    context = scaling.extended_context
    if not is_whole(window) or window < context:
        value = (
            "is absent, which transformers reads as 4096" if "sliding_window" not in config.values else f"is {window!r}"
        )
        raise config.error(
            "sliding_window",
            f"{value}, shorter than the context of {context}: llama.cpp would attend to all of it. "
            "If the model was trained with full attention, set sliding_window to null",
        )


def hyper_parameters(row: Architecture, config: ConfigFile, sizes: ModelSizes, context_length: int) -> dict[str, Any]:
    """The `{arch}.*` keys under llama.cpp's names, without those of RoPE."""
    prefix = f"{row.gguf}."
    return {
        prefix + "block_count": sizes.n_layer,
        prefix + "context_length": context_length,
        prefix + "embedding_length": sizes.hidden,
        prefix + "feed_forward_length": sizes.ffn,
        prefix + "attention.head_count": sizes.n_head,
        prefix + "attention.head_count_kv": sizes.n_kv_head,
        prefix + "attention.key_length": sizes.head_dim,
        prefix + "attention.value_length": sizes.head_dim,
        prefix + "attention.layer_norm_rms_epsilon": float(value_of(row, config, "rms_norm_eps")),
        prefix + "vocab_size": sizes.vocab,
    }


def tensor_rows(row: Architecture, config: ConfigFile, sizes: ModelSizes) -> list[TensorRow]:
    """Every tensor that this checkpoint must have, in writing order, with {i} filled in."""

    def wanted(condition: str) -> bool:
        key = condition.removeprefix("!")
        return not condition or flag_of(row, config, key) != condition.startswith("!")

    rows = [r for r in row.tensors if wanted(r.when)]
    whole = [r for r in rows if "{i}" not in r.source]
    per_layer = [r for r in rows if "{i}" in r.source]
    return whole + [
        TensorRow(r.source.format(i=i), r.target.format(i=i), r.shape, r.interleaved)
        for i in range(sizes.n_layer)
        for r in per_layer
    ]


def unknown_tensor(source: str, name: str) -> YarnEdgeError:
    """The error for a tensor that no row uses: it must not be dropped silently."""
    return YarnEdgeError(
        f"{source}: tensor {one_line(name, 120)} has no place in the GGUF: if the model does without it (transformers loads it "
        "then, and save_pretrained leaves the tensor out), remove it from the checkpoint"
    )
