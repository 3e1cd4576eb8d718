"""Flags on top of a scaling: they make YaRN by themselves, or replace single values of a YaRN scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS, ScalingOverrides
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor


def apply_overrides(base: RopeScaling, overrides: ScalingOverrides, name: str) -> RopeScaling:
    """`base` with the overridden fields; the provenance of each is its flag. name: the file, for errors.

    A context that the makers state is that of their own factor, and goes with it.

    A base without YaRN becomes YaRN, which takes a factor and an original context; linear scaling whose original context alone
    is overridden stays linear, and a new rope_theta alone changes no method. A new factor gets its own default attention factor.
    Raises YarnEdgeError if a value is missing, or if the base has its own attention factor, made for its old factor.
    """
    fields = overrides.fields
    if "rope_theta" in fields:
        base = base.with_overrides(FLAGS["rope_theta"], rope_theta=fields.pop("rope_theta"))
    if fields.keys() & {"factor", "original_context"}:
        base = replace(base, declared_context=None)
    sources = {field: FLAGS[field] for field in fields}
    if base.method == "linear" and fields.keys() == {"original_context"}:
        return replace(base, **fields, provenance={**base.provenance, **sources})
    if fields and base.method != "yarn":
        base = _as_yarn(base, fields, name)
    if "factor" in fields and "attention_factor" not in fields:
        if abs(base.attention_factor / base.default_attention_factor - 1) > SAME_RELATIVE:
            raise YarnEdgeError(
                f"{name}: its attention factor {base.attention_factor:.6g} was made for another factor than --yarn-factor: "
                "pass --yarn-attention-factor too"
            )
        fields["attention_factor"] = yarn_attention_factor(fields["factor"])
        sources["attention_factor"] = "0.1 ln(--yarn-factor) + 1"
    return replace(base, **fields, provenance={**base.provenance, **sources})


def _as_yarn(base: RopeScaling, fields: Mapping[str, Any], name: str) -> RopeScaling:
    """`base` as YaRN of factor 1, from which the flags start."""
    if base.method != "none" and "factor" not in fields:
        raise YarnEdgeError(f"{name}: has {base.method} scaling: the --yarn-… flags need --yarn-factor to make it YaRN")
    missing = [FLAGS[field] for field in ("factor", "original_context") if field not in fields]
    if missing:
        raise YarnEdgeError(
            f"{name}: has no YaRN, so {missing[0]} is needed too (its context is {base.original_context} tokens)"
        )
    provenance = {**base.provenance, "method": FLAGS["factor"]}
    return replace(base, method="yarn", factor=1.0, attention_factor=1.0, provenance=provenance)
