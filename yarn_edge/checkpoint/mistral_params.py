"""Mistral's own params.json -> `RopeScaling`: other names for the same things.

Sources: llama.cpp's conversion/mistral.py (`beta` is beta_fast, `alpha` is beta_slow) and vLLM's adapter of that file, where
`apply_scale` decides whether cos and sin get 0.1 ln s + 1.
"""

from __future__ import annotations

from typing import Any

from yarn_edge.checkpoint.block import ORIGINAL, as_float
from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

NUMBERS = {"factor": "factor", "beta": "beta_fast", "alpha": "beta_slow"}
_YARN_KEYS = {*NUMBERS, ORIGINAL, "apply_scale"}
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")


def read_params(params: ConfigFile, longest: int | None = None) -> tuple[dict[str, RopeScaling], tuple[str, ...]]:
    """The one part "" of a params.json, and notes. `longest`: the context where the file states none."""
    for key in _LATENT:
        if params.values.get(key) is not None:
            raise params.error(
                key,
                f"is {shown(params.values[key])}: what Mistral's latent attention multiplies logits by is "
                "not known from params.json; add config.json",
            )
    theta = as_float(params.values.get("rope_theta"))
    if theta is None:
        raise params.error("rope_theta", "is missing")
    dim, dim_source = params.integer("head_dim"), "head_dim"
    if dim is None:
        dim, dim_source = params.required_integer("dim") // params.required_integer("n_heads"), "dim / n_heads"
    yarn = params.section("yarn")
    context_key = next(
        (k for k in ("max_position_embeddings", "max_seq_len") if params.values.get(k) is not None), None
    )
    context = params.integer(context_key) if context_key else None
    provenance = {
        "method": params.where("yarn" if yarn else "no yarn"),
        "rope_theta": params.where("rope_theta"),
        "dim": params.where(dim_source),
        "original_context": params.where(context_key or "no max_position_embeddings"),
    }
    scaling_4 = params.section("llama_4_scaling")
    notes = (
        ()
        if scaling_4 is None
        else (
            f"{params.where('llama_4_scaling')}: queries are multiplied by 1 + beta ln(1 + floor(position / original)), "
            f"beta {shown(scaling_4.values.get('beta'))}, original {shown(scaling_4.values.get(ORIGINAL))}",
        )
    )
    if yarn is None:
        plain = context if context is not None else longest
        if plain is None:
            raise params.error("max_position_embeddings", "is missing: add it")
        return {"": RopeScaling("none", theta, dim, plain, provenance=provenance)}, notes
    for key in sorted(yarn.values.keys() - _YARN_KEYS):
        raise yarn.error(key[:60], f"is unknown here (value {shown(yarn.values[key])}): not supported yet")
    values: dict[str, Any] = {"original_context": yarn.required_integer(ORIGINAL)}
    for key, field in NUMBERS.items():
        values[field] = as_float(yarn.values.get(key))
        if values[field] is None:
            raise yarn.error(key, "is missing: add it")
    apply_scale = yarn.values.get("apply_scale")
    if not isinstance(apply_scale, bool):
        raise yarn.error("apply_scale", f"is {shown(apply_scale)}, not true or false")
    provenance |= {field: yarn.where(key) for key, field in NUMBERS.items()}
    provenance |= {
        "original_context": yarn.where(ORIGINAL),
        "attention_factor": yarn.where(f"apply_scale is {apply_scale}"),
    }
    provenance |= dict.fromkeys(("ext_factor", "truncate"), "the default of Mistral params.json")
    scaling = RopeScaling("yarn", theta, dim, **values, provenance=provenance)
    if apply_scale:
        scaling = scaling.with_overrides(
            yarn.where("apply_scale: 0.1 ln(factor) + 1"), attention_factor=yarn_attention_factor(scaling.factor)
        )
    if context is not None and not scaling.original_context <= context <= scaling.extended_context:
        raise params.error(
            str(context_key),
            f"is {context}, but yarn.{ORIGINAL} is {scaling.original_context} and factor {scaling.factor:g} "
            f"makes it {scaling.extended_context}: correct one of them",
        )
    return {"": scaling}, notes
