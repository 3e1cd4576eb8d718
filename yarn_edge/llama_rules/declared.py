"""`RopeScaling` <-> GGUF keys.

Three descriptions of one file are told apart: *declared* (the keys of `{arch}.rope.*`, read literally), *wanted* (the
canonical `yarn_edge.rope.*` that convert wrote; declared where there is none), *effective* (what the runtime computes,
`yarn_edge.llama_rules.effective`). What is written, in which form, is the planner's choice (`yarn_edge.llama_rules.planner`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, told_of
from yarn_edge.llama_rules.effective import (
    DEFAULT_FREQ_BASE,
    FREQUENCY_FACTORS,
    FROM_MODEL,
    LLAMA_CLASS_DEFAULTS,
    LONG_FACTORS,
    ROPE_SCALING_TYPES,
    SHORT_FACTORS,
    RuntimeArguments,
    angle_error,
    effective,
    file_base,
    file_factor,
    file_frequency_factors,
    file_origin,
    flag,
    magnitudes,
    number_or,
    ratio_in_file,
    rotated_dims,
    scaling_type,
    spelled_out,
)
from yarn_edge.llama_rules.honoured import HONOURED, Honoured
from yarn_edge.positions.scaling import MAX_DIM, OPTIONAL, SAME_RELATIVE, RopeScaling, yarn_attention_factor

CANONICAL = "yarn_edge.rope."
CANONICAL_VERSION = 1
NOT_IN_THE_FILE = "llama.cpp's default for"  # begins the source of a value that no key tells


def declared(file: GGUFFile) -> RopeScaling:
    """What the keys of `{arch}.rope.*` say, read literally, whether or not the runtime honours each of them.

    Factors multiply: A = (0.1 ln s + 1 for yarn, else 1) * rope.scaling.attn_factor * rope.scaling.yarn_attn_factor; where the
    architecture has yarn_log_multiplier, that takes part by llama.cpp's rule. A yarn_attn_factor that is 0.1 ln s + 1 itself
    is A spelled out (OLMo 3), not a multiplier.
    """
    arch = file.architecture
    factors = file_frequency_factors(file)
    kind = scaling_type(file)
    factor = file_factor(file) or 1.0  # llama.cpp takes 0 as 1
    if kind not in ROPE_SCALING_TYPES:
        raise YarnEdgeError(f"{file.path}: {arch}.rope.scaling.type {kind!r} cannot be judged yet")
    method = "none" if kind == "linear" and factor == 1 else kind
    row = HONOURED.get(arch, Honoured("half"))
    attention, softmax = magnitudes(file, row, FROM_MODEL, factor, 1.0 if method == "yarn" else 0.0)
    if method == "yarn":
        multiplier = float(number_or(file.number("rope.scaling.yarn_attn_factor"), 1.0))
        if row.yarn_attn_factor or not math.isclose(multiplier, yarn_attention_factor(factor), rel_tol=SAME_RELATIVE):
            attention *= multiplier
    present = {
        "method": "rope.scaling.type",
        "rope_theta": "rope.freq_base",
        "dim": "rope.dimension_count",
        "factor": "rope.scaling.factor",
        "original_context": "rope.scaling.original_context_length",
        "ext_factor": "rope.scaling.yarn_ext_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
        "attention_factor": "rope.scaling.attn_factor",
        "finetuned": "rope.scaling.finetuned",
    }
    provenance = {
        field: f"{arch}.{key}" if f"{arch}.{key}" in file.metadata else f"{NOT_IN_THE_FILE} {arch}.{key}"
        for field, key in present.items()
    }
    with told_of(file):
        return RopeScaling(
            method=method,  # type: ignore[arg-type]
            rope_theta=file_base(file)
            if arch in HONOURED
            else float(file.number("rope.freq_base", DEFAULT_FREQ_BASE) or 0.0),
            dim=rotated_dims(file),
            original_context=file_origin(file),
            factor=factor if method != "none" else 1.0,
            ext_factor=float(number_or(file.number("rope.scaling.yarn_ext_factor"), 1.0)) if method == "yarn" else 1.0,
            beta_fast=float(number_or(file.number("rope.scaling.yarn_beta_fast"), row.beta_fast)),
            beta_slow=float(number_or(file.number("rope.scaling.yarn_beta_slow"), 1.0)),
            attention_factor=attention,
            softmax_factor=softmax,
            finetuned=flag(file, "rope.scaling.finetuned"),
            frequency_factors=factors,
            provenance={**provenance, "frequency_factors": FREQUENCY_FACTORS},
        )


def open_attention_factor(file: GGUFFile) -> float | None:
    """A yarn_attn_factor of somebody else's file whose meaning is open, None where there is none.

    llama.cpp's converter writes transformers' attention_factor there (A itself, 1 for Laguna) and the Nous attn_factor (which
    multiplies 0.1 ln s + 1), and llama.cpp reads neither.
    """
    value = file.number("rope.scaling.yarn_attn_factor")
    row = HONOURED.get(file.architecture)
    if value is None or scaling_type(file) != "yarn" or CANONICAL + "version" in file.metadata:
        return None
    spelled = math.isclose(value, yarn_attention_factor(file_factor(file) or 1.0), rel_tol=SAME_RELATIVE)
    return None if spelled or (row is not None and row.yarn_attn_factor) else value


def _stored_provenance(file: GGUFFile) -> dict[str, str]:
    """Where the values came from when the file was written, as far as it still tells."""
    stored = file.metadata.get(CANONICAL + "provenance")
    try:
        found = json.loads(stored) if isinstance(stored, str) and len(stored) < 1 << 16 else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        k: one_line(v, 200) for k, v in found.items() if k in RopeScaling.__dataclass_fields__ and isinstance(v, str)
    }


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
    with told_of(file):
        return RopeScaling(**values, provenance={n: CANONICAL + n for n in names} | _stored_provenance(file))


def wanted(file: GGUFFile) -> RopeScaling:
    """What this file's positions are meant to be: canonical if convert wrote it, else declared."""
    found = canonical(file)
    return declared(file) if found is None else found


def explicit_arguments(file: GGUFFile) -> RuntimeArguments:
    """Every scaling value spelled out, so that no default of anyone can change it: what makes the file run as wanted.

    Where the file alone does, its own values; else those that come nearest to the description. For architectures
    outside the table and LongRoPE's two tables "from the model", without a claim.
    """
    if file.architecture not in HONOURED or LONG_FACTORS in file.tensors or SHORT_FACTORS in file.tensors:
        return FROM_MODEL
    ratio, runs, goal = ratio_in_file(file), effective(file), wanted(file)
    ways = [spelled_out(said, ratio) for said in (runs, goal, declared(file)) if said.method in ROPE_SCALING_TYPES]

    def missed(arguments: RuntimeArguments) -> float:
        error = angle_error(effective(file, arguments), goal)
        return error.frequency + error.attention if error.any_difference else 0.0

    return min(ways, key=missed)  # the first of equals: the file alone, where that is enough


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


def canonical_keys(scaling: RopeScaling, form: str) -> dict[str, Any]:
    """`yarn_edge.rope.*`: every field, the form in which the planner carries it, and the provenance as JSON."""
    fields = scaling.as_dict()
    provenance = fields.pop("provenance")
    keys: dict[str, Any] = {CANONICAL + "version": CANONICAL_VERSION, CANONICAL + "form": form}
    keys |= {CANONICAL + name: value for name, value in fields.items()}
    keys[CANONICAL + "provenance"] = json.dumps(provenance, ensure_ascii=False, sort_keys=True)
    return keys
