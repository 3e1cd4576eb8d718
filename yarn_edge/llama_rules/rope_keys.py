"""The keys `{arch}.rope.*` of a scaling: what the planner writes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from yarn_edge.llama_rules.effective import ROPE_SCALING_TYPES, mscale_ratio
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor


def in_keys(scaling: RopeScaling) -> RopeScaling | None:
    """The same angles by a method that llama.cpp has (none, linear or yarn); None if it has none for them."""
    if scaling.method == "ntk":
        base = rope.ntk_theta(scaling.dim, scaling.rope_theta, scaling.factor)
        return replace(scaling, method="none", rope_theta=base, factor=1.0, original_context=scaling.extended_context)
    if scaling.method == "ntk-by-parts":
        scaling = replace(scaling, method="yarn")
    if scaling.method == "yarn" and scaling.ext_factor == 0:
        return replace(scaling, method="linear")
    return scaling if scaling.method in ROPE_SCALING_TYPES else None


def native_keys(scaling: RopeScaling, architecture: str) -> dict[str, Any]:
    """The keys `{arch}.rope.*` for none, linear or yarn, in order, whether or not llama.cpp honors each of them."""
    prefix = f"{architecture}.rope."
    keys: dict[str, Any] = {
        prefix + "dimension_count": scaling.dim,
        prefix + "freq_base": float(scaling.rope_theta),
        prefix + "scaling.type": scaling.method,
    }
    sections = honoured(architecture).sections(scaling.dim)
    if sections:
        keys[prefix + "dimension_sections"] = sections
    if scaling.method != "none":
        keys[prefix + "scaling.factor"] = float(scaling.factor)
        keys[prefix + "scaling.original_context_length"] = scaling.original_context
        switch = honoured(architecture).finetuned_switch  # false would turn off all rotation
        if scaling.finetuned is not None and (scaling.finetuned or not switch):
            keys[prefix + "scaling.finetuned"] = scaling.finetuned
    if scaling.method == "yarn":
        keys[prefix + "scaling.yarn_ext_factor"] = float(scaling.ext_factor)
        # Not the model's own ratio, so that a future runtime that honors both keys does not apply it twice.
        keys[prefix + "scaling.yarn_attn_factor"] = 1.0
        keys[prefix + "scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        keys[prefix + "scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    own = yarn_attention_factor(scaling.factor) if scaling.method == "yarn" else 1.0
    log = honoured(architecture).log_multiplier
    if log is not None and log.in_softmax and scaling.method == "yarn" and scaling.factor > 1:
        # The softmax scale gets (A m(mscale_all_dim))^2, with m(x) = 0.1 x ln s + 1.
        all_dim = (math.sqrt(scaling.softmax_factor) / scaling.attention_factor - 1) / (0.1 * math.log(scaling.factor))
        keys[prefix + "scaling.yarn_log_multiplier"] = all_dim * log.unit
        if all_dim:
            own = mscale_ratio(log, all_dim, scaling.factor)
    ratio = scaling.attention_factor / own
    if abs(ratio - 1) > SAME_RELATIVE:
        keys[prefix + "scaling.attn_factor"] = ratio
    return keys


def without_method(scaling: RopeScaling) -> RopeScaling:
    """`scaling` without its method."""
    return replace(
        scaling, method="none", factor=1.0, original_context=scaling.extended_context, frequency_factors=None
    )


def nearest_keys(scaling: RopeScaling, architecture: str) -> dict[str, Any]:
    """The keys of a file in the live form: the nearest that keys can say, for other programs and for what is not an angle."""
    native = in_keys(scaling)
    return native_keys(
        without_method(scaling) if native is None else replace(native, frequency_factors=None), architecture
    )
