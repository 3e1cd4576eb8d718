"""Mistral's own params.json as a `RopeScaling`: other names for the same things.

Sources: llama.cpp's conversion/mistral.py (`beta` is beta_fast, `alpha` is beta_slow) and vLLM's adapter for that file, where
`apply_scale` decides whether cos and sin get 0.1 ln s + 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from yarn_edge.checkpoint.block import ORIGINAL, as_float
from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

NUMBERS = {"factor": "factor", "beta": "beta_fast", "alpha": "beta_slow"}
_YARN_KEYS = {*NUMBERS, ORIGINAL, "apply_scale"}
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")
_CONTEXTS = ("max_position_embeddings", "max_seq_len")


def read_params(params: ConfigFile, longest: int | None = None) -> tuple[dict[str, RopeScaling], tuple[str, ...]]:
    """The one part "" of a params.json, and notes. `longest`: the context if the file states none.

    Raises YarnEdgeError for latent attention, for unknown, missing or contradictory values.
    """
    for key in _LATENT:
        if params.values.get(key) is not None:
            raise params.error(
                key,
                f"is {shown(params.values[key])}: params.json does not say what Mistral's latent attention multiplies "
                "logits by; add config.json",
            )
    notes = _notes(params)
    yarn = params.section("yarn")
    if yarn is not None:
        return {"": _yarn(params, yarn)}, notes
    context = _context(params)[0] or longest
    if context is None:
        raise params.error("max_position_embeddings", "is missing: add it")
    return {"": _plain(params, context)}, notes


def _notes(params: ConfigFile) -> tuple[str, ...]:
    """Whatever acts on positions besides rope, as sentences."""
    scaling = params.section("llama_4_scaling")
    if scaling is None:
        return ()
    return (
        f"{params.where('llama_4_scaling')}: queries are multiplied by 1 + beta ln(1 + floor(position / original)), "
        f"beta {shown(scaling.values.get('beta'))}, original {shown(scaling.values.get(ORIGINAL))}",
    )


def _context(params: ConfigFile) -> tuple[int | None, str]:
    """(the context that the file states, its key)."""
    key = next((k for k in _CONTEXTS if params.values.get(k) is not None), None)
    return (None, "no max_position_embeddings") if key is None else (params.integer(key), key)


def _plain(params: ConfigFile, context: int) -> RopeScaling:
    """Plain RoPE: base, rotated dimensions, `context`."""
    theta = as_float(params.values.get("rope_theta"))
    if theta is None:
        raise params.error("rope_theta", "is missing")
    dim, dim_source = params.integer("head_dim"), "head_dim"
    if dim is None:
        dim, dim_source = params.required_integer("dim") // params.required_integer("n_heads"), "dim / n_heads"
    provenance = {
        "method": params.where("no yarn"),
        "rope_theta": params.where("rope_theta"),
        "dim": params.where(dim_source),
        "original_context": params.where(_context(params)[1]),
    }
    return RopeScaling("none", theta, dim, context, provenance=provenance)


def _yarn(params: ConfigFile, yarn: ConfigFile) -> RopeScaling:
    """The scaling of the section `yarn`, checked against the context that the file states."""
    for key in sorted(yarn.values.keys() - _YARN_KEYS):
        raise yarn.error(key[:60], f"is unknown here (value {shown(yarn.values[key])}): not supported yet")
    values: dict[str, Any] = {"original_context": yarn.required_integer(ORIGINAL)}
    for key, field in NUMBERS.items():
        values[field] = as_float(yarn.values.get(key))
        if values[field] is None:
            raise yarn.error(key, "is missing: add it")
    apply_scale = yarn.boolean("apply_scale")
    if apply_scale is None:
        raise yarn.error("apply_scale", f"is {shown(yarn.values.get('apply_scale'))}, not true or false")
    base = _plain(params, values["original_context"])
    default = "the default of Mistral params.json"
    sources = {field: yarn.where(key) for key, field in NUMBERS.items()} | {
        "method": params.where("yarn"),
        "original_context": yarn.where(ORIGINAL),
        "attention_factor": yarn.where(f"apply_scale is {apply_scale}"),
        "ext_factor": default,
        "truncate": default,
    }
    scaling = replace(base, method="yarn", **values, provenance={**base.provenance, **sources})
    if apply_scale:
        scaling = scaling.with_overrides(
            yarn.where("apply_scale: 0.1 ln(factor) + 1"), attention_factor=yarn_attention_factor(scaling.factor)
        )
    context, key = _context(params)
    if context is not None and not scaling.original_context <= context <= scaling.extended_context:
        raise params.error(
            key,
            f"is {context}, but yarn.{ORIGINAL} is {scaling.original_context} and factor {scaling.factor:g} "
            f"makes it {scaling.extended_context}: correct one of them",
        )
    return scaling
