"""`RopeScaling` <-> GGUF keys, and what llama.cpp makes of them: the effective scaling, simulated key by key.

Three descriptions of one file are told apart here: *declared* (the keys of `{arch}.rope.*`, read literally), *wanted*
(the canonical `yarn_edge.rope.*` that convert wrote; declared where there is none), *effective* (what the runtime
computes, given the file and the arguments of the caller). The rules are those of llama.cpp as vendored by
llama-cpp-python 0.3.36, src/llama-context.cpp and src/llama-model.cpp.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from yarn_edge import rope
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf_file import GGUFFile
from yarn_edge.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor

CANONICAL = "yarn_edge.rope."
CANONICAL_VERSION = 1
DEFAULT_FREQ_BASE = 10000.0
FREQUENCY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# llama.h: enum llama_rope_scaling_type
ROPE_SCALING_TYPES = {"unspecified": -1, "none": 0, "linear": 1, "yarn": 2}
_METHOD_TO_TYPE = {"none": "none", "linear": "linear", "yarn": "yarn"}


@dataclass(frozen=True)
class Honoured:
    """What the pinned llama.cpp reads for an architecture beyond type, factor, origin, attn_factor and freq_base."""

    pairing: rope.Pairing
    betas: bool = False
    ext_factor: bool = False
    yarn_attn_factor: bool = False


# One row per GGUF architecture whose positions we can vouch for.
HONOURED: dict[str, Honoured] = {
    "llama": Honoured("interleaved"),
    "qwen2": Honoured("half"),
    "qwen3": Honoured("half"),
}


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


def honoured(architecture: str) -> Honoured:
    """The row of an architecture; an error that names those we know otherwise."""
    if architecture not in HONOURED:
        raise YarnEdgeError(
            f"what the runtime applies for architecture {architecture!r} is not known yet; known: {', '.join(HONOURED)}"
        )
    return HONOURED[architecture]


def _dims(file: GGUFFile) -> int:
    heads = file.required_int("attention.head_count")
    head_dim = file.number("attention.key_length", file.required_int("embedding_length") // heads)
    return int(file.number("rope.dimension_count", head_dim) or 0)


def _flag(file: GGUFFile, name: str) -> bool | None:
    value = file.metadata.get(f"{file.architecture}.{name}")
    return value if isinstance(value, bool) else None


def _refuse_factors(file: GGUFFile) -> None:
    for name in FREQUENCY_FACTORS:
        if name in file.tensors:
            raise YarnEdgeError(
                f"{file.path}: has its own frequency factors ({name}: Llama 3, LongRoPE or baked); "
                "they cannot be judged yet"
            )


def _scaling_type(file: GGUFFile) -> str:
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    if not isinstance(kind, str):
        raise YarnEdgeError(
            f"{file.path}: {file.architecture}.rope.scaling.type is {one_line(repr(kind), 60)}, not a string"
        )
    return kind


def _file_factor(file: GGUFFile) -> float:
    """The factor of the file, 0 where there is none. `rope.scale_linear` is the key's old name, still read."""
    old = file.number("rope.scale_linear", 0.0)
    return float(file.number("rope.scaling.factor", old) or 0.0)


def declared(file: GGUFFile) -> RopeScaling:
    """What the keys of `{arch}.rope.*` say, read literally, whether or not the runtime honours each of them.

    Factors multiply: A = (0.1 ln s + 1 for yarn, else 1) * rope.scaling.attn_factor * rope.scaling.yarn_attn_factor.
    """
    _refuse_factors(file)
    arch = file.architecture
    kind = _scaling_type(file)
    factor = _file_factor(file) or 1.0  # llama.cpp takes 0 as 1
    method = {"none": "none", "linear": "linear" if factor != 1 else "none", "yarn": "yarn"}.get(kind)
    if method is None:
        raise YarnEdgeError(f"{file.path}: {arch}.rope.scaling.type {kind!r} cannot be judged yet")
    ratio = float(file.number("rope.scaling.attn_factor", 1.0) or 0.0)
    if method == "yarn":
        ratio *= float(file.number("rope.scaling.yarn_attn_factor", 1.0) or 0.0)
    present = {
        "method": "rope.scaling.type", "rope_theta": "rope.freq_base", "dim": "rope.dimension_count",
        "factor": "rope.scaling.factor", "original_context": "rope.scaling.original_context_length",
        "ext_factor": "rope.scaling.yarn_ext_factor", "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow", "attention_factor": "rope.scaling.attn_factor",
        "finetuned": "rope.scaling.finetuned",
    }  # fmt: skip
    provenance = {
        field: f"{arch}.{key}" if f"{arch}.{key}" in file.metadata else f"llama.cpp's default for {arch}.{key}"
        for field, key in present.items()
    }
    return RopeScaling(
        method=method,  # type: ignore[arg-type]
        rope_theta=float(file.number("rope.freq_base", DEFAULT_FREQ_BASE) or 0.0),
        dim=_dims(file),
        original_context=_file_origin(file),
        factor=factor if method != "none" else 1.0,
        ext_factor=float(_or(file.number("rope.scaling.yarn_ext_factor"), 1.0)),
        beta_fast=float(_or(file.number("rope.scaling.yarn_beta_fast"), 32.0)),
        beta_slow=float(_or(file.number("rope.scaling.yarn_beta_slow"), 1.0)),
        attention_factor=ratio * (yarn_attention_factor(factor) if method == "yarn" else 1.0),
        finetuned=_flag(file, "rope.scaling.finetuned"),
        provenance=provenance,
    )


def _file_origin(file: GGUFFile) -> int:
    """The original context; where the key is missing or 0, llama.cpp takes the context length."""
    return int(file.number("rope.scaling.original_context_length", 0) or 0) or file.required_int("context_length")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def canonical(file: GGUFFile) -> RopeScaling | None:
    """The description under `yarn_edge.rope.*`, or None where the file carries none."""
    meta = file.metadata
    version = meta.get(CANONICAL + "version")
    if version is None:
        return None
    if not isinstance(version, int) or version != CANONICAL_VERSION:
        raise YarnEdgeError(
            f"{file.path}: {CANONICAL}version is {one_line(repr(version), 60)}, this yarn-edge reads {CANONICAL_VERSION}"
        )
    names = [n for n in RopeScaling.__dataclass_fields__ if n not in ("provenance", "finetuned")]
    missing = [n for n in names if CANONICAL + n not in meta]
    if missing:
        raise YarnEdgeError(f"{file.path}: {CANONICAL}{missing[0]} is missing")
    values = {n: meta[CANONICAL + n] for n in names}
    finetuned = meta.get(CANONICAL + "finetuned")
    return RopeScaling(
        **values,
        finetuned=finetuned if isinstance(finetuned, bool) else None,
        provenance={n: CANONICAL + n for n in (*names, "finetuned")},
    )


def wanted(file: GGUFFile) -> RopeScaling:
    """What this file's positions are meant to be: canonical if convert wrote it, else declared."""
    found = canonical(file)
    return declared(file) if found is None else found


def effective(file: GGUFFile, arguments: RuntimeArguments = FROM_MODEL) -> RopeScaling:
    """What llama.cpp computes for this file when a context is made with `arguments`, by its own rules."""
    _refuse_factors(file)
    row = honoured(file.architecture)
    file_factor, file_type = _file_factor(file), _scaling_type(file)
    kind = arguments.rope_scaling_type if arguments.rope_scaling_type != -1 else ROPE_SCALING_TYPES.get(file_type, -1)
    scale = arguments.rope_freq_scale or (1.0 / file_factor if file_factor else 1.0)
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
    attention *= float(_or(file.number("rope.scaling.attn_factor"), 1.0))
    method = "yarn" if ext != 0 else "linear" if factor != 1 else "none"
    return RopeScaling(
        method=method,  # type: ignore[arg-type]
        rope_theta=arguments.rope_freq_base or float(file.number("rope.freq_base", DEFAULT_FREQ_BASE) or 0.0),
        dim=_dims(file),
        original_context=arguments.yarn_orig_ctx or _file_origin(file),
        factor=factor,
        ext_factor=ext if ext else 1.0,
        beta_fast=_from(arguments.yarn_beta_fast, file, "rope.scaling.yarn_beta_fast", row.betas, 32.0),
        beta_slow=_from(arguments.yarn_beta_slow, file, "rope.scaling.yarn_beta_slow", row.betas, 1.0),
        attention_factor=attention,
        finetuned=_flag(file, "rope.scaling.finetuned"),
        provenance={"method": "llama.cpp"},
    )


def _from(argument: float, file: GGUFFile, key: str, read: bool, default: float) -> float:
    """llama.cpp's precedence: the argument if >= 0, the key where the architecture reads it, the default."""
    if argument >= 0:
        return argument
    return float(_or(file.number(key), default)) if read else default


def explicit_arguments(file: GGUFFile) -> RuntimeArguments:
    """Every scaling value spelled out from what the file declares, so that no default of anyone can change it.

    For what cannot be judged (architectures outside the table, files with frequency factors of their own): "from the
    model", without a claim.
    """
    if file.architecture not in HONOURED or any(name in file.tensors for name in FREQUENCY_FACTORS):
        return FROM_MODEL
    said = declared(file)
    yarn = said.method == "yarn"
    return RuntimeArguments(
        rope_scaling_type=ROPE_SCALING_TYPES[_METHOD_TO_TYPE[said.method]],
        rope_freq_base=said.rope_theta,
        rope_freq_scale=1.0 / said.factor,
        yarn_ext_factor=said.ext_factor if yarn else 0.0,
        yarn_attn_factor=said.default_attention_factor,
        yarn_beta_fast=said.beta_fast,
        yarn_beta_slow=said.beta_slow,
        yarn_orig_ctx=said.original_context,
    )


def llama_class_arguments(file: GGUFFile) -> dict[str, Any] | None:
    """Keyword arguments with which a plain `llama_cpp.Llama(path, **kwargs)` applies what the file wants.

    {} where its defaults do; None where no arguments can.
    """
    goal = wanted(file)
    if not angle_error(effective(file, LLAMA_CLASS_DEFAULTS), goal).any_difference:
        return {}
    explicit = explicit_arguments(file)
    if angle_error(effective(file, explicit), goal).any_difference:
        return None
    plain = asdict(LLAMA_CLASS_DEFAULTS)
    return {name: value for name, value in asdict(explicit).items() if value != plain[name]}


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


def gguf_keys(scaling: RopeScaling, architecture: str) -> dict[str, Any]:
    """The keys to write for `scaling`, in order, as Python values (int: uint32, float: float32, bool, str).

    Raises YarnEdgeError where llama.cpp would compute other positions from them: such a file is never written.
    """
    if not scaling.is_static or scaling.method not in _METHOD_TO_TYPE:
        raise YarnEdgeError(
            f"{scaling.source('method')}: {scaling.method} has no form in a GGUF that llama.cpp runs; "
            "only none, linear and yarn can be written yet"
        )
    prefix = f"{architecture}.rope."
    keys: dict[str, Any] = {
        prefix + "dimension_count": scaling.dim,
        prefix + "freq_base": float(scaling.rope_theta),
        prefix + "scaling.type": _METHOD_TO_TYPE[scaling.method],
    }
    if scaling.method != "none":
        keys[prefix + "scaling.factor"] = float(scaling.factor)
        keys[prefix + "scaling.original_context_length"] = scaling.original_context
        if scaling.finetuned is not None:
            keys[prefix + "scaling.finetuned"] = scaling.finetuned
    if scaling.method == "yarn":
        keys[prefix + "scaling.yarn_ext_factor"] = float(scaling.ext_factor)
        # Not the model's own ratio: a runtime that one day honours both keys must not apply it twice.
        keys[prefix + "scaling.yarn_attn_factor"] = 1.0
        keys[prefix + "scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        keys[prefix + "scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    ratio = scaling.attention_factor / scaling.default_attention_factor
    if abs(ratio - 1) > SAME_RELATIVE:
        keys[prefix + "scaling.attn_factor"] = ratio
    _refuse_other_positions(scaling, architecture, keys)
    return keys


def canonical_keys(scaling: RopeScaling) -> dict[str, Any]:
    """`yarn_edge.rope.*`: every field, and the provenance as JSON."""
    fields = scaling.as_dict()
    provenance = fields.pop("provenance")
    keys: dict[str, Any] = {CANONICAL + "version": CANONICAL_VERSION}
    keys |= {CANONICAL + name: value for name, value in fields.items() if value is not None}
    keys[CANONICAL + "provenance"] = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
    return keys


def _refuse_other_positions(scaling: RopeScaling, architecture: str, keys: dict[str, Any]) -> None:
    """The last gate of convert: simulate llama.cpp on the keys about to be written and compare the angles."""
    from pathlib import Path

    shape = {
        f"{architecture}.embedding_length": scaling.dim,
        f"{architecture}.attention.head_count": 1,
        f"{architecture}.context_length": scaling.extended_context,
        "general.architecture": architecture,
    }
    file = GGUFFile(Path("(the file to write)"), 3, {**keys, **shape}, {}, 32, 0, 0)
    runtime = effective(file)
    error = angle_error(runtime, scaling)
    if not error.any_difference:
        return
    culprits = {n: (a, b) for n, (a, b) in scaling.differences(runtime).items() if n != "method"}
    told = "; ".join(
        f"{scaling.source(n)} is {a!r}, llama.cpp would use {b!r}" for n, (a, b) in sorted(culprits.items())
    )
    raise YarnEdgeError(
        f"{told or 'these positions'}: architecture {architecture} cannot carry this in GGUF keys yet. The file would run "
        f"with frequencies up to {error.frequency:.2%} off (pair {error.pair}) and an attention factor "
        f"{error.attention:.2%} off, so it is not written"
    )
