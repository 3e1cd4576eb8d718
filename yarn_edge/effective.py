"""What llama.cpp really computes: its rules for the rope keys of a file and the arguments of a caller, simulated.

The rules are those of llama.cpp as vendored by llama-cpp-python 0.3.36, src/llama-context.cpp and src/llama-model.cpp;
the live-graph check of `verify` holds them against the running library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from yarn_edge import rope
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf_file import GGUFFile
from yarn_edge.honoured import honoured
from yarn_edge.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor

DEFAULT_FREQ_BASE = 10000.0


FREQUENCY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


# llama.h: enum llama_rope_scaling_type
ROPE_SCALING_TYPES = {"none": 0, "linear": 1, "yarn": 2}  # -1: from the model


@dataclass(frozen=True)
class RuntimeArguments:
    """The scaling fields of `llama_context_params`; the defaults say "from the model" for each of them."""

    rope_scaling_type: int = -1
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0


FROM_MODEL = RuntimeArguments()


# llama_cpp.Llama's own defaults: being >= 0 they win over the file (llama_cpp/llama.py, Llama.__init__).
LLAMA_CLASS_DEFAULTS = RuntimeArguments(yarn_attn_factor=1.0, yarn_beta_fast=32.0, yarn_beta_slow=1.0)


def rotated_dims(file: GGUFFile) -> int:
    """Rotated dimensions of one head."""
    heads = file.required_int("attention.head_count")
    head_dim = file.number("attention.key_length", file.required_int("embedding_length") // heads)
    return int(file.number("rope.dimension_count", head_dim) or 0)


def flag(file: GGUFFile, name: str) -> bool | None:
    """A boolean key of the architecture, None where it is absent."""
    value = file.metadata.get(f"{file.architecture}.{name}")
    return value if isinstance(value, bool) else None


def refuse_frequency_factors(file: GGUFFile) -> None:
    """Refuse what carries frequencies of its own: its keys alone do not tell its angles."""
    for name in FREQUENCY_FACTORS:
        if name in file.tensors:
            raise YarnEdgeError(
                f"{file.path}: has its own frequency factors ({name}: Llama 3, LongRoPE or baked); "
                "they cannot be judged yet"
            )


def scaling_type(file: GGUFFile) -> str:
    """`rope.scaling.type`, with llama.cpp's default "linear"."""
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    if not isinstance(kind, str):
        raise YarnEdgeError(
            f"{file.path}: {file.architecture}.rope.scaling.type is {one_line(repr(kind), 60)}, not a string"
        )
    return kind


def file_factor(file: GGUFFile) -> float:
    """The factor of the file, 0 where there is none. `rope.scale_linear` is the key's old name, still read."""
    old = file.number("rope.scale_linear", 0.0)
    return float(file.number("rope.scaling.factor", old) or 0.0)


def number_or(value: float | None, default: float) -> float:
    """`value`, or `default` where it is None."""
    return default if value is None else value


def file_origin(file: GGUFFile) -> int:
    """The original context; where the key is missing or 0, llama.cpp takes the context length."""
    return int(file.number("rope.scaling.original_context_length", 0) or 0) or file.required_int("context_length")


def effective(file: GGUFFile, arguments: RuntimeArguments = FROM_MODEL) -> RopeScaling:
    """What llama.cpp computes for this file when a context is made with `arguments`, by its own rules."""
    refuse_frequency_factors(file)
    row = honoured(file.architecture)
    factor_in_file, file_type = file_factor(file), scaling_type(file)
    kind = arguments.rope_scaling_type if arguments.rope_scaling_type != -1 else ROPE_SCALING_TYPES.get(file_type, -1)
    scale = arguments.rope_freq_scale or (1.0 / factor_in_file if factor_in_file else 1.0)
    if kind == ROPE_SCALING_TYPES["none"]:
        scale = 1.0
    ext = _from(arguments.yarn_ext_factor, file, "rope.scaling.yarn_ext_factor", row.ext_factor, -1.0)
    if ext < 0:
        ext = 1.0 if kind == ROPE_SCALING_TYPES["yarn"] else 0.0
    factor = 1.0 / scale
    if ext != 0:
        attention = yarn_attention_factor(factor)  # yarn_attn_factor is overwritten, whatever was passed
    else:
        attention = _from(arguments.yarn_attn_factor, file, "rope.scaling.yarn_attn_factor", row.yarn_attn_factor, 1.0)
    attention *= float(number_or(file.number("rope.scaling.attn_factor"), 1.0))
    method = "yarn" if ext != 0 else "linear" if factor != 1 else "none"
    return RopeScaling(
        method=method,  # type: ignore[arg-type]
        rope_theta=arguments.rope_freq_base or float(file.number("rope.freq_base", DEFAULT_FREQ_BASE) or 0.0),
        dim=rotated_dims(file),
        original_context=arguments.yarn_orig_ctx or file_origin(file),
        factor=factor,
        ext_factor=ext if ext else 1.0,
        beta_fast=_from(arguments.yarn_beta_fast, file, "rope.scaling.yarn_beta_fast", row.betas, 32.0),
        beta_slow=_from(arguments.yarn_beta_slow, file, "rope.scaling.yarn_beta_slow", row.betas, 1.0),
        attention_factor=attention,
        finetuned=flag(file, "rope.scaling.finetuned"),
        provenance={"method": "llama.cpp"},
    )


def _from(argument: float, file: GGUFFile, key: str, read: bool, default: float) -> float:
    """llama.cpp's precedence: the argument if >= 0, the key where the architecture reads it, the default."""
    if argument >= 0:
        return argument
    return float(number_or(file.number(key), default)) if read else default


@dataclass(frozen=True)
class AngleError:
    """By how much one scaling misses another: the worst pair's relative frequency error, and A's."""

    frequency: float
    pair: int
    attention: float

    @property
    def any_difference(self) -> bool:
        return not (self.frequency <= SAME_RELATIVE and self.attention <= SAME_RELATIVE)  # NaN is a difference


def angle_error(actual: RopeScaling, goal: RopeScaling) -> AngleError:
    """Compare two static scalings by what they compute; infinite where the rotated dimensions differ."""
    if actual.dim != goal.dim:
        return AngleError(math.inf, 0, math.inf)
    target = rope.inv_freq(goal)
    relative = np.abs(rope.inv_freq(actual) / target - 1)
    pair = int(relative.argmax())
    return AngleError(float(relative[pair]), pair, abs(actual.attention_factor / goal.attention_factor - 1))
