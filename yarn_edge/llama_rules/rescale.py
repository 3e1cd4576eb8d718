"""Another scaling for a GGUF: what a file and flags mean together, and how to run that without writing a file.

Runtime arguments and a metadata override, or the live graph, apply the scaling in memory. It is exact or refused; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import FLAGS, NO_OVERRIDES, ScalingOverrides
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.contradictions import DOES_NOT_RUN, contradictions, open_questions
from yarn_edge.llama_rules.declared import declared, open_attention_factor
from yarn_edge.llama_rules.effective import (
    FROM_MODEL,
    LivePositions,
    RuntimeArguments,
    as_table,
    file_factor,
    ratio_in_file,
    simulate,
    spelled_out,
)
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS
from yarn_edge.llama_rules.layers import sliding_scaling
from yarn_edge.llama_rules.loadable import has_known_type
from yarn_edge.llama_rules.rope_keys import in_keys, native_keys, nearest_keys
from yarn_edge.positions.overrides import apply_overrides
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor


def from_file(positions: FilePositions, overrides: ScalingOverrides = NO_OVERRIDES) -> RopeScaling:
    """What the file describes, with known mistakes corrected and `overrides` on top.

    Raises YarnEdgeError if the file leaves open what it means.
    """
    fields, file = overrides.fields, positions.file
    base = positions.canonical
    if base is None:
        for question in open_questions(file, fields):
            raise YarnEdgeError(f"{file.path}: {question}")
        base = declared(_without_slips(_as_flags_say(file, fields), overrides))
    context = file.required_int("context_length")
    scaled = fields.keys() - {"rope_theta"}
    if positions.canonical is None and base.method != "none" and not scaled and context > base.extended_context:
        raise YarnEdgeError(
            f"{file.path}: context_length is {context}, but factor {base.factor:g} makes {base.original_context} tokens "
            f"{base.extended_context}: pass --yarn-factor and --yarn-orig-ctx"
        )
    if not fields:
        return base
    if base.frequency_factors is not None and not all(abs(f - 1) <= SAME_RELATIVE for f in base.frequency_factors):
        raise YarnEdgeError(
            f"{file.path}: has its own frequency factors ({FREQUENCY_FACTORS}: Llama 3, or baked by others), made for its own base: "
            "YaRN on top of them would scale twice"
        )
    if abs(base.softmax_factor - 1) > SAME_RELATIVE and fields.keys() & {"factor", "attention_factor"}:
        raise YarnEdgeError(
            f"{file.path}: its softmax factor {base.softmax_factor:.6g} belongs to its factor: use --from CHECKPOINT"
        )
    if base.method != "yarn" and "factor" in fields:  # the old values' sources do not apply to the new YaRN
        base = replace(base, provenance={})
    return apply_overrides(base, overrides, str(file.path))


def file_parts(positions: FilePositions, overrides: ScalingOverrides = NO_OVERRIDES) -> dict[str, RopeScaling]:
    """`from_file` by layer type: "" for all layers, or beside full attention the file's own description of sliding windows."""
    full, own = from_file(positions, overrides), positions.own_sliding
    return {"": full} if own is None else {"full_attention": full, "sliding_attention": own}


# key after the architecture's prefix -> (the field whose flag replaces it, the value that it must be above)
_REPLACEABLE = {
    "rope.scaling.factor": ("factor", 0.999),
    "rope.scale_linear": ("factor", 0.999),
    "rope.scaling.original_context_length": ("original_context", 0.0),
    "rope.scaling.attn_factor": ("attention_factor", 0.0),
    "rope.freq_base": ("rope_theta", 1.0),
}


def _as_flags_say(file: GGUFFile, fields: Mapping[str, Any]) -> GGUFFile:
    """The header with flags in place of what makes no sense, and as YaRN if a flag says so for a scaling that does not run."""
    meta = dict(file.metadata)
    for name, (field, low) in _REPLACEABLE.items():
        key = f"{file.architecture}.{name}"
        value = meta.get(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < math.inf
        if (
            value is not None
            and field not in fields
            and (not isinstance(value, (int, float)) or not math.isfinite(value))
        ):
            raise YarnEdgeError(
                f"{file.path}: {key} is {one_line(repr(value), 60)}, not a finite number: pass {FLAGS[field]}"
            )
        if value is not None and not good and field in fields:
            # Of attn_factor, a multiplier, nothing is left: the flag is A itself.
            meta[key] = 1.0 if field == "attention_factor" else fields[field]
    if "factor" in fields and (contradictions(file, DOES_NOT_RUN) or not has_known_type(file)):
        meta[f"{file.architecture}.rope.scaling.type"] = "yarn"
    return replace(file, metadata=meta)


def _without_slips(file: GGUFFile, overrides: ScalingOverrides) -> GGUFFile:
    """The header with its clear mistakes corrected. Raises YarnEdgeError for mistakes whose meaning is open."""
    fields = overrides.fields
    prefix = f"{file.architecture}.rope.scaling."
    meta = dict(file.metadata)
    origin = meta.get(prefix + "original_context_length")
    no_origin = (
        origin is None or (isinstance(origin, (int, float)) and not origin)
    ) and "original_context" not in fields
    if (
        meta.get(prefix + "type", "linear") == "linear"
        and no_origin
        and (file_factor(file) or 1.0) != 1
        and "factor" not in fields
    ):
        raise YarnEdgeError(
            f"{file.path}: has linear scaling and no {prefix}original_context_length, so its context_length may be the one before "
            "or after the scaling: pass --yarn-orig-ctx"
        )
    if meta.get(prefix + "type") != "yarn":
        return file
    ext, factor = meta.get(prefix + "yarn_ext_factor"), file_factor(file)
    if isinstance(ext, (int, float)) and ext > 1:
        if factor not in (0.0, 1.0, float(ext)) and "factor" not in fields:
            raise YarnEdgeError(
                f"{file.path}: {prefix}yarn_ext_factor is {ext:g} and {prefix}factor is {factor:g}: which one is the factor? "
                "pass --yarn-factor"
            )
        meta[prefix + "factor"] = factor = float(ext)
        meta[prefix + "yarn_ext_factor"] = 1.0
    if factor <= 1 and "factor" not in fields:
        raise YarnEdgeError(
            f"{file.path}: declares YaRN without {prefix}factor: pass --yarn-factor, or --from CHECKPOINT"
        )
    if no_origin:
        raise YarnEdgeError(
            f"{file.path}: {prefix}original_context_length is missing, and nothing else in the file has it: "
            "pass --yarn-orig-ctx, or --from CHECKPOINT"
        )
    multiplier = open_attention_factor(file)
    if multiplier is not None and "attention_factor" not in fields:
        default = yarn_attention_factor(fields.get("factor") or file_factor(file) or 1.0)
        raise YarnEdgeError(
            f"{file.path}: {prefix}yarn_attn_factor is {multiplier:.7g}, and its meaning is open: llama.cpp's converter writes "
            f"transformers' attention_factor there (then A is {multiplier:.7g}) and the Nous attn_factor too (then it is "
            f"{multiplier * default:.7g}): pass --yarn-attention-factor, or --from CHECKPOINT"
        )
    if multiplier is not None:
        meta[prefix + "yarn_attn_factor"] = 1.0
    return replace(file, metadata=meta)


def base_scaling(positions: FilePositions, overrides: ScalingOverrides = NO_OVERRIDES) -> RopeScaling:
    """The file's own scaling with `overrides` on top. A file without scaling has its context_length as the original context.

    Raises YarnEdgeError for scalings that cannot be varied: frequency tables, or a softmax factor.
    """
    given = overrides.fields
    if given.keys() - {"rope_theta"} and not given.keys() >= {"factor", "original_context"}:
        own = from_file(positions)
        if own.method != "yarn":
            around = {"factor": max(1.0, own.factor), "original_context": own.original_context}
            overrides = ScalingOverrides(**{**around, **given})
    base = from_file(positions, overrides)
    if base.frequency_factors is not None and not all(abs(f - 1) <= SAME_RELATIVE for f in base.frequency_factors):
        raise YarnEdgeError(
            f"{positions.file.path}: its frequencies come from a table (Llama 3, LongRoPE), which cannot be replaced"
        )
    if abs(base.softmax_factor - 1) > SAME_RELATIVE:
        raise YarnEdgeError(
            f"{positions.file.path}: its softmax factor {base.softmax_factor:.6g} belongs to its own factor, so it cannot be swept"
        )
    return base


def with_factor(base: RopeScaling, factor: float, method: str = "yarn", own_attention: bool = True) -> RopeScaling:
    """`base` with another method or factor; rope_theta and the original context stay.

    own_attention: A is YaRN's default for `factor`, times the ratio of the base's own A to its default; else A is 1.
    """
    base = replace(base, declared_context=None)
    if factor <= 1 or method == "none":
        return replace(base, method="none", factor=1.0, attention_factor=1.0)
    ratio = base.attention_factor / base.default_attention_factor if base.method == "yarn" else 1.0
    attention = yarn_attention_factor(factor) * ratio if own_attention else 1.0
    return replace(base, method=method, factor=float(factor), attention_factor=attention)  # type: ignore[arg-type]


def in_memory(positions: FilePositions, goal: RopeScaling, label: str) -> tuple[RuntimeArguments, dict[str, float]]:
    """(runtime arguments, metadata overrides) that run `goal` from this file. label: for errors.

    llama.cpp's own arguments if they are exact, else the live graph. An override of `rope.scaling.attn_factor` sets A, because
    the argument yarn_attn_factor has no effect with an ext_factor. Raises YarnEdgeError if nothing can run `goal` (dynamic
    scaling, another softmax factor).
    """
    if not goal.is_static:
        raise YarnEdgeError(f"{label}: {goal.method} has no fixed angles: pass --freeze-at N")
    native = in_keys(goal)
    if native is not None and positions.live is None:
        found = _by_arguments(positions, native)
        if found is not None:
            return found
    return _in_graph(positions, goal, label), {}


def _by_arguments(positions: FilePositions, native: RopeScaling) -> tuple[RuntimeArguments, dict[str, float]] | None:
    """`in_memory` by llama.cpp's own arguments; None if they are not exact (frequencies in the file, windows)."""
    file = positions.file
    name = f"{file.architecture}.rope.scaling.attn_factor"
    # attn_factor supplies whatever part of A the architecture does not get from the file's other keys.
    own = positions.with_metadata({name: 1.0}).effective(spelled_out(native, 1.0)).attention_factor
    ratio = native.attention_factor / own
    overrides = {name: ratio} if abs(ratio / ratio_in_file(file) - 1) > SAME_RELATIVE else {}
    arguments = spelled_out(native, ratio)
    seen = positions.with_metadata(overrides)
    runs = seen.effective(arguments)
    keys = native_keys(native, file.architecture)
    sliding, meant = (sliding_scaling(p.file, runs) for p in (seen, positions.with_metadata(keys)))
    if sliding is not None and meant is not None and angle_error(sliding, meant).any_difference:
        return None
    return None if angle_error(runs, native).any_difference else (arguments, overrides)


def _in_graph(positions: FilePositions, goal: RopeScaling, label: str) -> RuntimeArguments:
    """Arguments that put `goal` into the live graph; layers with a sliding window get what a file with its keys would run there."""
    file = positions.file
    patched = positions.with_metadata(nearest_keys(goal, file.architecture))
    near = simulate(patched.file, FROM_MODEL, None)
    sliding = positions.own_sliding or sliding_scaling(patched.file, near)
    if sliding is not None and not angle_error(sliding, near).any_difference:
        sliding = goal
    live = LivePositions(as_table(goal), None if sliding is None else as_table(sliding))
    arguments = replace(spelled_out(positions.effective(), ratio_in_file(file)), live=live)
    error = angle_error(positions.effective(arguments), goal)
    if error.any_difference:
        raise YarnEdgeError(f"{label}: this file cannot run {goal.method} scaling with these values: {error}")
    return arguments
