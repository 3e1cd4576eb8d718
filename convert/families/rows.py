"""The language in which a model family is written down: rows for its tensors, constants, keys and wrappers.

A family is one `Architecture`. Names on the left are Hugging Face's, on the right llama.cpp's (gguf-py, tensor_mapping;
llama-model.cpp). docs/add-a-family.md walks through one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.families import FULL, WINDOWS, Windows
from yarn_edge.llama_rules.honoured import GGUF_ARCHITECTURES

from .layers import LayersOf
from .orders import Order, interleaved
from .sizes import ModelSizes, Size

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the GGUF, or one per layer with {i} in its names.

    source: with {e} it is one tensor for each expert, and the target is all of them, stacked. shape: of one source, in names of
    `ModelSizes.dimension`; a dimension "1" is not in the target. rows, columns: those of each matrix on disk that the target has,
    in its order, None for all as they are; a vector's values are its rows. transposed: rows on disk become columns. values: what
    becomes of the values, in float32. when: a config key that must be true for the tensor to exist, or false with "!" before it;
    layers: a name in `Architecture.layers`, of the layers that have it, or with "!" do not; "" means always. float32: llama.cpp's
    converter writes it in float32, whatever the type of the others. other: the same tensor in another layout, used if the
    checkpoint has that one's source and not this one's, or, under the same name, that one's shape. layer: filled in.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    rows: Order | None = None
    columns: Order | None = None
    transposed: bool = False
    values: Callable[[Floats], Floats] | None = None
    when: str = ""
    layers: str = ""
    float32: bool = False
    other: TensorRow | None = None
    layer: int | None = None

    def in_layer(self, layer: int) -> TensorRow:
        """The row for one layer."""
        return replace(
            self,
            source=self.source.replace("{i}", str(layer)),
            target=self.target.replace("{i}", str(layer)),
            other=self.other and self.other.in_layer(layer),
            layer=layer,
        )

    def sources(self, sizes: ModelSizes) -> Iterator[str]:
        """The names of the tensors that it is made of."""
        n_sources = sizes.others["experts"] if "{e}" in self.source else 1
        return (self.source.replace("{e}", str(expert)) for expert in range(n_sources))

    def disk_shape(self, sizes: ModelSizes) -> tuple[int, ...]:
        """The shape of one source in the checkpoint."""
        sizes = sizes.in_layer(self.layer)
        return tuple(sizes.dimension(name) for name in self.shape)


@dataclass(frozen=True)
class Constant:
    """The only value of a config key that can be converted. why: the reason, if it is not that llama.cpp has nothing else.

    value: or a function of the sizes that returns it. optional: null is this value too, and so is an absent key.
    """

    value: Any
    why: str = ""
    optional: bool = False

    def expected(self, sizes: ModelSizes) -> Any:
        """The value for a model of these sizes."""
        return self.value(sizes) if callable(self.value) else self.value


@dataclass(frozen=True)
class Impossible:
    """Sizes that llama.cpp does not run, or runs otherwise. key: of the config, which the message names. why: for the message."""

    key: str
    when: Callable[[ModelSizes], bool]
    why: str


@dataclass(frozen=True)
class NumberRow:
    """A number of the config that becomes a key `{arch}.{key}`. source: its key, with the block before a dot if it is in one.

    zero: whether 0 is a value like others; llama.cpp takes it for "none" where it is not. optional: null, or an absent key, is no
    error and writes nothing.
    """

    source: str
    key: str
    zero: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Wrapper:
    """A multimodal class around the family, whose text_config and language model are converted.

    names: beginnings of tensor names, and what they are without the wrapper; the first that fits counts. left_out: beginnings
    of the names of tensors that are not in the language model. text_alone: why the file is for text alone, if it could seem to
    be for more.
    """

    hf_name: str
    model_type: str
    names: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    text_alone: str = ""


@dataclass(frozen=True)
class Architecture:
    """One family. defaults: transformers' values for absent config keys. constants: the only values that can be converted.

    aliases: other names of its model_type, in checkpoints with code of their own. impossible: sizes that are refused.
    stated: keys that the config must have, in a family that transformers does not know.
    sizes: those beyond a dense model's. by_layer: sizes for which the config may have a list with a number for each layer, and its
    key. layers: which layers are of a kind, by its name. layer_types: what the config may call them, in a family without windows.
    numbers: further keys of the GGUF that are numbers of the config. keys: further ones, or instead of a dense model's: a value,
    or a function of config and sizes that returns it; None is no key. prediction: beginnings of the names of tensors that predict
    further tokens, which are left out, with a note; prediction_layers: the config's key for how many such layers follow the last.
    width_is_heads: llama.cpp requires head_dim * heads == hidden size. window_ignored: the class has a sliding window, llama.cpp
    does not. wrappers: classes around it. epsilon: of the norms, its key in the config and in the GGUF. yarn: where its scaling
    comes from, for the documentation.
    """

    hf_name: str
    model_type: str
    tensors: tuple[TensorRow, ...]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=dict)
    by_layer: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, LayersOf] = field(default_factory=dict)
    layer_types: tuple[str, ...] = (FULL,)
    numbers: tuple[NumberRow, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    impossible: tuple[Impossible, ...] = ()
    aliases: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    prediction: tuple[str, ...] = ()
    prediction_layers: str = ""
    width_is_heads: bool = False
    window_ignored: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    yarn: str = "by flags"

    @property
    def model_types(self) -> tuple[str, ...]:
        """The names of its model_type."""
        return (self.model_type, *self.aliases)

    @property
    def gguf(self) -> str:
        """The family's architecture in a GGUF."""
        return GGUF_ARCHITECTURES[self.model_type]

    def has(self, size: str) -> bool:
        """Whether a tensor has a dimension with this size."""
        return any(size in re.split(r"[*+/]", name) for row in self.tensors for name in row.shape)

    @property
    def windows(self) -> Windows | None:
        """The family's layers with a sliding window, which llama.cpp runs; None if it has none."""
        return WINDOWS.get(self.model_type)


def value_of(row: Architecture, config: ConfigFile, key: str) -> Any:
    """A config value, or the family's default if the key is absent."""
    return config.values[key] if key in config.values else row.defaults.get(key)


def flag_of(row: Architecture, config: ConfigFile, key: str) -> bool:
    """A boolean of the config; if it is absent or null, the family's default, which is false."""
    given = config.boolean(key)
    return bool(row.defaults.get(key)) if given is None else given


def plus_one(values: Floats) -> Floats:
    """For norms that are saved as w - 1."""
    return values + np.float32(1)


def minus_exp(values: Floats) -> Floats:
    """For decays that are saved as the logarithm of their negative."""
    return -np.exp(values.astype(np.float64)).astype(np.float32)


def matrix(hf: str, gguf: str, out: str, into: str, **how: Any) -> TensorRow:
    """A matrix of every layer, shape (out, into)."""
    return TensorRow(f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", (out, into), **how)


def bias(hf: str, gguf: str, size: str, halves: bool = False, when: str = "") -> TensorRow:
    """A bias of every layer. halves: its pairs are to be interleaved."""
    return TensorRow(
        f"model.layers.{{i}}.{hf}.bias", f"blk.{{i}}.{gguf}.bias", (size,), interleaved if halves else None, when=when
    )


def norm(hf: str, gguf: str, *shape: str, **how: Any) -> TensorRow:
    """A norm's weight of every layer, without a shape that of the hidden state."""
    names = shape or ("hidden",)
    return TensorRow(f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", names, **how)


def attention(halves: bool = False) -> tuple[TensorRow, ...]:
    """The four projections of attention. halves: their pairs are to be interleaved."""
    rows = interleaved if halves else None
    return (
        matrix("self_attn.q_proj", "attn_q", "q", "hidden", rows=rows),
        matrix("self_attn.k_proj", "attn_k", "kv", "hidden", rows=rows),
        matrix("self_attn.v_proj", "attn_v", "kv", "hidden"),
        matrix("self_attn.o_proj", "attn_output", "hidden", "q"),
    )


def attention_biases(halves: bool = False, when: str = "", output: bool = False) -> tuple[TensorRow, ...]:
    """The biases of q, k and v. output: o's too."""
    rows = (
        bias("self_attn.q_proj", "attn_q", "q", halves, when),
        bias("self_attn.k_proj", "attn_k", "kv", halves, when),
        bias("self_attn.v_proj", "attn_v", "kv", False, when),
        bias("self_attn.o_proj", "attn_output", "hidden", False, when),
    )
    return rows if output else rows[:3]


EMBEDDINGS = (
    TensorRow("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
    TensorRow("model.norm.weight", "output_norm.weight", ("hidden",)),
    TensorRow("lm_head.weight", "output.weight", ("vocab", "hidden"), when="!tie_word_embeddings"),
)
# For architectures that llama.cpp does not load without an output matrix: tied embeddings are written twice.
OWN_HEAD = TensorRow("model.embed_tokens.weight", "output.weight", ("vocab", "hidden"), when="tie_word_embeddings")
PRE_NORMS = (norm("input_layernorm", "attn_norm"), norm("post_attention_layernorm", "ffn_norm"))
GATED = (
    matrix("mlp.gate_proj", "ffn_gate", "ffn", "hidden"),
    matrix("mlp.up_proj", "ffn_up", "ffn", "hidden"),
    matrix("mlp.down_proj", "ffn_down", "hidden", "ffn"),
)
MLP_BIASES = (
    bias("mlp.gate_proj", "ffn_gate", "ffn", False, "mlp_bias"),
    bias("mlp.up_proj", "ffn_up", "ffn", False, "mlp_bias"),
    bias("mlp.down_proj", "ffn_down", "hidden", False, "mlp_bias"),
)
HEAD_NORMS = (norm("self_attn.q_norm", "attn_q_norm", "head_dim"), norm("self_attn.k_norm", "attn_k_norm", "head_dim"))
LAYER_NORM = ("layer_norm_eps", "attention.layer_norm_epsilon")
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
SILU = {"hidden_act": Constant("silu")}
