"""`RopeScaling` <-> GGUF keys.

Three descriptions of one file are told apart: *declared* (the keys of `{arch}.rope.*`, read literally), *wanted* (the
canonical `yarn_edge.rope.*` that convert wrote; declared where there is none), *effective* (what the runtime computes,
`yarn_edge.effective`). No file is written whose effective scaling is not the wanted one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.effective import (
    DEFAULT_FREQ_BASE,
    FREQUENCY_FACTORS,
    FROM_MODEL,
    LLAMA_CLASS_DEFAULTS,
    ROPE_SCALING_TYPES,
    RuntimeArguments,
    angle_error,
    effective,
    file_factor,
    file_origin,
    flag,
    number_or,
    refuse_frequency_factors,
    rotated_dims,
    scaling_type,
)
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf_file import GGUFFile
from yarn_edge.honoured import HONOURED
from yarn_edge.scaling import MAX_DIM, OPTIONAL, SAME_RELATIVE, RopeScaling, yarn_attention_factor

CANONICAL = "yarn_edge.rope."
CANONICAL_VERSION = 1


def declared(file: GGUFFile) -> RopeScaling:
    """What the keys of `{arch}.rope.*` say, read literally, whether or not the runtime honours each of them.

    Factors multiply: A = (0.1 ln s + 1 for yarn, else 1) * rope.scaling.attn_factor * rope.scaling.yarn_attn_factor.
    """
    refuse_frequency_factors(file)
    arch = file.architecture
    kind = scaling_type(file)
    factor = file_factor(file) or 1.0  # llama.cpp takes 0 as 1
    if kind not in ROPE_SCALING_TYPES:
        raise YarnEdgeError(f"{file.path}: {arch}.rope.scaling.type {kind!r} cannot be judged yet")
    method = "none" if kind == "linear" and factor == 1 else kind
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
        dim=rotated_dims(file),
        original_context=file_origin(file),
        factor=factor if method != "none" else 1.0,
        ext_factor=float(number_or(file.number("rope.scaling.yarn_ext_factor"), 1.0)),
        beta_fast=float(number_or(file.number("rope.scaling.yarn_beta_fast"), 32.0)),
        beta_slow=float(number_or(file.number("rope.scaling.yarn_beta_slow"), 1.0)),
        attention_factor=ratio * (yarn_attention_factor(factor) if method == "yarn" else 1.0),
        finetuned=flag(file, "rope.scaling.finetuned"),
        provenance=provenance,
    )


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
    names = [n for n in RopeScaling.__dataclass_fields__ if n != "provenance"]
    missing = [n for n in names if n not in OPTIONAL and CANONICAL + n not in meta]
    if missing:
        raise YarnEdgeError(f"{file.path}: {CANONICAL}{missing[0]} is missing")
    values = {n: meta[CANONICAL + n] for n in names if CANONICAL + n in meta}
    factors = values.get("frequency_factors")
    if isinstance(factors, np.ndarray) and factors.size <= MAX_DIM:
        values["frequency_factors"] = tuple(factors.tolist())
    return RopeScaling(**values, provenance={n: CANONICAL + n for n in names})


def wanted(file: GGUFFile) -> RopeScaling:
    """What this file's positions are meant to be: canonical if convert wrote it, else declared."""
    found = canonical(file)
    return declared(file) if found is None else found


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
        rope_scaling_type=ROPE_SCALING_TYPES[said.method],
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


def gguf_keys(scaling: RopeScaling, architecture: str) -> dict[str, Any]:
    """The keys to write for `scaling`, in order, as Python values (int: uint32, float: float32, bool, str).

    Raises YarnEdgeError where llama.cpp would compute other positions from them: such a file is never written.
    """
    if scaling.method not in ROPE_SCALING_TYPES:
        raise YarnEdgeError(
            f"{scaling.source('method')}: {scaling.method} has no form in a GGUF that llama.cpp runs; "
            "only none, linear and yarn can be written yet"
        )
    prefix = f"{architecture}.rope."
    keys: dict[str, Any] = {
        prefix + "dimension_count": scaling.dim,
        prefix + "freq_base": float(scaling.rope_theta),
        prefix + "scaling.type": scaling.method,
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
    keys |= {CANONICAL + name: value for name, value in fields.items()}
    keys[CANONICAL + "provenance"] = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
    return keys


def _refuse_other_positions(scaling: RopeScaling, architecture: str, keys: dict[str, Any]) -> None:
    """The last gate of convert: simulate llama.cpp on the keys about to be written and compare the angles."""
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
