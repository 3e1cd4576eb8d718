"""What the keys of `{arch}.rope.*` declare, read literally into a `RopeScaling`."""

from __future__ import annotations

import math

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile, errors_naming
from yarn_edge.llama_rules.description import is_described
from yarn_edge.llama_rules.effective import (
    DEFAULT_FREQ_BASE,
    FROM_MODEL,
    ROPE_SCALING_TYPES,
    file_base,
    file_factor,
    file_origin,
    flag,
    magnitudes,
    number_or,
    rotated_dims,
    scaling_type,
)
from yarn_edge.llama_rules.frequency_tables import file_frequency_factors
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS, HONOURED, Honoured
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor

NOT_IN_THE_FILE = "llama.cpp's default for"  # the source of a value without a key begins with this


def declared(file: GGUFFile, n_ctx: int | None = None) -> RopeScaling:
    """What the keys of `{arch}.rope.*` say, read literally, whether or not the runtime honors each of them.

    n_ctx: the size of the context, if LongRoPE's tables need one.

    Factors multiply: A = (0.1 ln s + 1 for yarn, else 1) * rope.scaling.attn_factor * rope.scaling.yarn_attn_factor. If the
    architecture has yarn_log_multiplier, llama.cpp's rule for it applies too. A yarn_attn_factor equal to 0.1 ln s + 1 is A
    spelled out (OLMo 3), not a multiplier.
    """
    arch = file.architecture
    factors = file_frequency_factors(file, n_ctx)
    kind = scaling_type(file)
    factor = file_factor(file) or 1.0  # llama.cpp reads 0 as 1
    if kind not in ROPE_SCALING_TYPES:
        raise YarnEdgeError(f"{file.path}: {arch}.rope.scaling.type {kind!r} cannot be judged")
    method = "none" if kind == "linear" and factor == 1 else kind
    row = HONOURED.get(arch, Honoured("half"))
    attention, softmax = magnitudes(file, row, FROM_MODEL, factor, 1.0 if method == "yarn" else 0.0)
    if method == "yarn":
        multiplier = float(number_or(file.number("rope.scaling.yarn_attn_factor"), 1.0))
        if row.yarn_attn_factor or not math.isclose(multiplier, yarn_attention_factor(factor), rel_tol=SAME_RELATIVE):
            attention *= multiplier
    keys = {
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
        for field, key in keys.items()
    }
    with errors_naming(file):
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
    """The yarn_attn_factor of another converter's file if its meaning is open, else None.

    llama.cpp's converter writes both transformers' attention_factor (A itself, 1 for Laguna) and the Nous attn_factor (which
    multiplies 0.1 ln s + 1) into this key, and llama.cpp reads neither.
    """
    value = file.number("rope.scaling.yarn_attn_factor")
    row = HONOURED.get(file.architecture)
    if value is None or scaling_type(file) != "yarn" or is_described(file):
        return None
    spelled_out = math.isclose(value, yarn_attention_factor(file_factor(file) or 1.0), rel_tol=SAME_RELATIVE)
    return None if spelled_out or (row is not None and row.yarn_attn_factor) else value
