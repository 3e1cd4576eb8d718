"""What llama.cpp really computes: a simulation of its rules for a file's rope keys and a caller's arguments.

The rules are those of llama.cpp as vendored by llama-cpp-python 0.3.36 (src/llama-context.cpp, src/llama-model.cpp). The
live-graph check of `verify` compares them with the running library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, errors_naming
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS, HONOURED, Honoured, LogMultiplier, honoured
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

DEFAULT_FREQ_BASE = 10000.0
_STOPS = 1e14  # a frequency divided by it turns nothing within any context
# llama.h: enum llama_rope_scaling_type
ROPE_SCALING_TYPES = {"none": 0, "linear": 1, "yarn": 2}  # -1: from the model


@dataclass(frozen=True)
class LivePositions:
    """What the ROPE nodes of the live graph are given (`yarn_edge.graph`), by kind of layer, each in the form of `as_table`.

    sliding: of layers with a sliding window; None leaves their nodes as llama.cpp made them.
    """

    full: RopeScaling
    sliding: RopeScaling | None = None


@dataclass(frozen=True)
class RuntimeArguments:
    """The scaling fields of `llama_context_params`, and what is done to the graph beyond them.

    The default of each means "from the model".
    """

    rope_scaling_type: int = -1
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0
    live: LivePositions | None = None

    @property
    def context_params(self) -> dict[str, int | float]:
        """The fields that `llama_context_params` has, by name."""
        return {name: value for name, value in vars(self).items() if name != "live"}


FROM_MODEL = RuntimeArguments()
# llama_cpp.Llama's own defaults. They are >= 0, so they override the file (llama_cpp/llama.py, Llama.__init__).
LLAMA_CLASS_DEFAULTS = RuntimeArguments(yarn_attn_factor=1.0, yarn_beta_fast=32.0, yarn_beta_slow=1.0)


def rotated_dims(file: GGUFFile) -> int:
    """The rotated dimensions of one head in layers with full attention."""
    rotated = file.number("rope.dimension_count", file.number("attention.key_length"))
    if rotated is None:
        rotated = file.required_int("embedding_length") // file.required_int("attention.head_count")
    if slides(file, 0):  # the graph asks for layer 0's, whatever the layer (llama_hparams::n_rot)
        rotated = number_or(file.number("rope.dimension_count_swa"), rotated)
    return int(rotated)


def has_sliding(file: GGUFFile) -> bool:
    """Whether llama.cpp treats layers with a sliding window differently in this file."""
    row = HONOURED.get(file.architecture)
    if row is None or row.sliding is None:
        return False
    return row.sliding.always or bool(file.number("attention.sliding_window"))


def slides(file: GGUFFile, layer: int) -> bool:
    """Whether a layer has a sliding window (llama_model_base::load_swa_pattern, llama_hparams::set_swa_pattern)."""
    rule = honoured(file.architecture).sliding if has_sliding(file) else None
    if rule is None:
        return False
    pattern = file.metadata.get(f"{file.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if layer >= pattern.size:
            raise YarnEdgeError(f"{file.path}: attention.sliding_window_pattern has {pattern.size} layers")
        return bool(pattern[layer])
    period = number_or(file.number("attention.sliding_window_pattern"), rule.period)
    return period == 0 or bool(layer % period != (0 if rule.dense_first else period - 1))


def recurs(file: GGUFFile, layer: int) -> bool:
    """Whether a layer has linear attention, in architectures that have such layers (models/qwen35.cpp, qwen3next.cpp)."""
    listed = file.metadata.get(f"{file.architecture}.attention.recurrent_layers")
    if isinstance(listed, np.ndarray):
        if layer >= listed.size:
            raise YarnEdgeError(f"{file.path}: attention.recurrent_layers has {listed.size} layers")
        return bool(listed[layer])
    if isinstance(listed, (bool, int)):
        return bool(listed)
    period = number_or(file.number("full_attention_interval"), 4)
    return bool(period and (layer + 1) % period != 0)


def flag(file: GGUFFile, name: str) -> bool | None:
    """A boolean key of the architecture, None if it is absent."""
    value = file.metadata.get(f"{file.architecture}.{name}")
    return value if isinstance(value, bool) else None


def scaling_type(file: GGUFFile) -> str:
    """`rope.scaling.type`; llama.cpp's default is "linear"."""
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    if not isinstance(kind, str):
        raise YarnEdgeError(
            f"{file.path}: {file.architecture}.rope.scaling.type is {one_line(repr(kind), 60)}, not a string"
        )
    return kind


def file_factor(file: GGUFFile) -> float:
    """The file's factor, 0 if it has none. `rope.scale_linear` is the key's old name, which is still read."""
    old = file.number("rope.scale_linear", 0.0)
    return float(file.number("rope.scaling.factor", old) or 0.0)


def number_or(value: float | None, default: float) -> float:
    """`value`, or `default` if it is None."""
    return default if value is None else value


def file_origin(file: GGUFFile) -> int:
    """The original context. If the key is missing or 0, llama.cpp uses the context length."""
    return int(file.number("rope.scaling.original_context_length", 0) or 0) or file.required_int("context_length")


def unturned_pairs(file: GGUFFile, dim: int) -> tuple[float, ...] | None:
    """Divisors that stop the pairs of a fourth axis, as llama.cpp does in text (ggml.c, ggml_mrope_cache_init); None if it turns all."""
    sections = file.numbers("rope.dimension_sections", 4) if honoured(file.architecture).by_axes else []
    if not sum(sections):
        return None  # which llama.cpp does not load
    places = (pair % int(sum(sections)) for pair in range(dim // 2))
    divisors = tuple(1.0 if place < 3 * sections[place % 3] else _STOPS for place in places)
    return None if _STOPS not in divisors else divisors


def frequency_divisors(scaling: RopeScaling) -> npt.NDArray[np.float32]:
    """theta_d / theta'_d, shape (D/2,): what `rope_freqs.weight` holds in the baked form, and a ROPE node in the live one."""
    plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
    return np.asarray(plain / rope.inv_freq(scaling), dtype=np.float32)


def as_table(scaling: RopeScaling) -> RopeScaling:
    """The same angles as plain RoPE whose frequencies are divided by a table."""
    return RopeScaling(
        "none",
        scaling.rope_theta,
        scaling.dim,
        scaling.extended_context,
        attention_factor=scaling.attention_factor,
        frequency_factors=tuple(map(float, frequency_divisors(scaling))),
        softmax_factor=scaling.softmax_factor,
    )


def simulate(file: GGUFFile, arguments: RuntimeArguments, factors: tuple[float, ...] | None) -> RopeScaling:
    """What llama.cpp computes by itself for a file in a context made with `arguments`, in layers with full attention.

    factors: the values of `rope_freqs.weight`. They are an argument because the file may not be written yet.
    """
    row = honoured(file.architecture)
    factor_in_file, file_type = file_factor(file), scaling_type(file)
    if file_type not in ROPE_SCALING_TYPES:
        raise YarnEdgeError(f"{file.path}: {file.architecture}.rope.scaling.type {file_type!r} cannot be judged")
    kind = arguments.rope_scaling_type if arguments.rope_scaling_type != -1 else ROPE_SCALING_TYPES[file_type]
    scale = arguments.rope_freq_scale or (1.0 / factor_in_file if factor_in_file else 1.0)
    if kind == ROPE_SCALING_TYPES["none"]:
        scale = 1.0
    ext = _from(arguments.yarn_ext_factor, file, "rope.scaling.yarn_ext_factor", row.ext_factor, -1.0)
    if ext < 0:
        ext = 1.0 if kind == ROPE_SCALING_TYPES["yarn"] else 0.0
    factor = 1.0 / scale
    attention, softmax = magnitudes(file, row, arguments, factor, ext)
    dim = rotated_dims(file)
    with errors_naming(file):
        return RopeScaling(
            method="yarn" if ext != 0 else "linear" if factor != 1 else "none",
            rope_theta=arguments.rope_freq_base or file_base(file),
            dim=dim,
            original_context=arguments.yarn_orig_ctx or file_origin(file),
            factor=factor,
            ext_factor=ext if ext else 1.0,
            beta_fast=_from(arguments.yarn_beta_fast, file, "rope.scaling.yarn_beta_fast", row.betas, row.beta_fast),
            beta_slow=_from(arguments.yarn_beta_slow, file, "rope.scaling.yarn_beta_slow", row.betas, 1.0),
            attention_factor=attention,
            softmax_factor=softmax,
            finetuned=flag(file, "rope.scaling.finetuned"),
            frequency_factors=unturned_pairs(file, dim) if factors is None else factors,
            provenance={"method": "llama.cpp", "frequency_factors": FREQUENCY_FACTORS},
        )


def mscale_ratio(log: LogMultiplier, all_dim: float, factor: float) -> float:
    """m(mscale) / m(mscale_all_dim): A in an architecture that reads yarn_log_multiplier, if all_dim is not 0."""
    mscale = all_dim if log.same_mscale else 1.0
    return yarn_attention_factor(factor, 0.1 * mscale) / yarn_attention_factor(factor, 0.1 * all_dim)


def magnitudes(
    file: GGUFFile, row: Honoured, arguments: RuntimeArguments, factor: float, ext: float
) -> tuple[float, float]:
    """(A, an additional multiplier of the softmax scale). With an ext_factor, llama.cpp overwrites any yarn_attn_factor."""
    log = row.log_multiplier
    all_dim = float(number_or(file.number("rope.scaling.yarn_log_multiplier"), 0.0)) / log.unit if log else 0.0
    if ext == 0:
        attention = _from(arguments.yarn_attn_factor, file, "rope.scaling.yarn_attn_factor", row.yarn_attn_factor, 1.0)
    elif log and all_dim:
        attention = mscale_ratio(log, all_dim, factor)
    else:
        attention = yarn_attention_factor(factor)
    attention *= ratio_in_file(file)
    if log is None or not log.in_softmax:
        return attention, 1.0
    # The graph undoes ggml's own 0.1 ln s + 1.
    undone = attention if ext else attention * yarn_attention_factor(factor)
    return attention, (undone * yarn_attention_factor(factor, 0.1 * all_dim)) ** 2


def file_base(file: GGUFFile) -> float:
    """The file's base, changed by `rope.scaling.alpha` if the architecture reads that."""
    row = honoured(file.architecture)
    if row.finetuned_switch and flag(file, "rope.scaling.finetuned") is False:
        raise YarnEdgeError(
            f"{file.path}: {file.architecture}.rope.scaling.finetuned is false: llama.cpp then rotates nothing at all"
        )
    base = float(number_or(file.number("rope.freq_base"), DEFAULT_FREQ_BASE))
    alpha = file.number("rope.scaling.alpha") if row.ntk_alpha else None
    if alpha:
        dim = file.number("attention.key_length", rotated_dims(file)) or 0
        if alpha < 0 or dim <= 2:
            raise YarnEdgeError(
                f"{file.path}: {file.architecture}.rope.scaling.alpha is {alpha!r} for heads of {dim:g}"
            )
        base *= alpha ** (dim / (dim - 2))
    return base


def ratio_in_file(file: GGUFFile) -> float:
    """`rope.scaling.attn_factor`, by which every architecture multiplies A."""
    return float(number_or(file.number("rope.scaling.attn_factor"), 1.0))


def spelled_out(scaling: RopeScaling, ratio: float) -> RuntimeArguments:
    """Arguments that request `scaling` (none, linear or yarn) value by value. ratio: the file's attn_factor."""
    yarn = scaling.method == "yarn"
    return RuntimeArguments(
        rope_scaling_type=ROPE_SCALING_TYPES[scaling.method],
        rope_freq_base=scaling.rope_theta,
        rope_freq_scale=1.0 / scaling.factor,
        yarn_ext_factor=scaling.ext_factor if yarn else 0.0,
        # llama.cpp overwrites it if ext_factor is not 0, and multiplies it by the file's own factor otherwise.
        yarn_attn_factor=yarn_attention_factor(scaling.factor)
        if yarn and scaling.ext_factor
        else scaling.attention_factor / ratio,
        yarn_beta_fast=scaling.beta_fast,
        yarn_beta_slow=scaling.beta_slow,
        yarn_orig_ctx=scaling.original_context,
    )


def _from(argument: float, file: GGUFFile, key: str, read: bool, default: float) -> float:
    """llama.cpp's precedence: the argument if it is >= 0, the key if the architecture reads it, the default."""
    if argument >= 0:
        return argument
    return float(number_or(file.number(key), default)) if read else default
