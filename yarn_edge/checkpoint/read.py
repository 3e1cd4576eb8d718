"""How a checkpoint's config scales positions, by the rules of its dialect and its family.

`read_positions` returns everything: the scalings by layer type or allocated context, and what else acts on positions.
`read_scaling` is for models with one scaling. Nothing is guessed or dropped: an unknown, missing or contradictory value is
an error that names the file, the key, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.checkpoint.dialects import MISTRAL_PARAMS, Dialect, one_block_each, recognise, text_section
from yarn_edge.checkpoint.families import family_of
from yarn_edge.checkpoint.layers import layer_blocks, notes_of, used_layer_types
from yarn_edge.checkpoint.methods import assumptions, open_readings, read_block
from yarn_edge.checkpoint.mistral_params import read_params
from yarn_edge.checkpoint.readings import check_reading_flag, multiplying
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import NO_OVERRIDES, ScalingOverrides
from yarn_edge.positions.overrides import apply_overrides
from yarn_edge.positions.rope import correction_range, dynamic_factor
from yarn_edge.positions.scaling import MAX_CONTEXT, RAMPED_METHODS, RopeScaling, yarn_attention_factor


@dataclass(frozen=True)
class Positions:
    """Everything that a config says about positions.

    dialect: its name, for people. parts: one scaling named "" for a model with one; else by layer type ("full_attention") or,
    for LongRoPE, by allocated context ("up to 4096 tokens"). notes: what acts on positions besides rope. assumptions: what the
    config leaves open and a convention settles.
    """

    dialect: str
    parts: Mapping[str, RopeScaling]
    notes: tuple[str, ...] = field(default=())
    assumptions: tuple[str, ...] = field(default=())


def read_positions(config: ConfigFile, overrides: ScalingOverrides = NO_OVERRIDES) -> Positions:
    """Every scaling of a config, with `overrides` on top.

    Raises YarnEdgeError for anything unknown, missing, contradictory or impossible to represent.
    """
    check_reading_flag(config, overrides)
    alone = one_block_each(config)
    if alone:
        return _agreed(config, *(_read(one, overrides) for one in alone))
    return _read(config, overrides)


def _read(config: ConfigFile, overrides: ScalingOverrides) -> Positions:
    """`read_positions` of a config that describes them once."""
    dialect = recognise(config)
    assumed: tuple[str, ...] = ()
    if dialect is MISTRAL_PARAMS:
        parts, notes = read_params(config)
        parts = {"": _overridden(config, parts[""], overrides)}
    else:
        parts, notes, assumed = _read_blocks(text_section(config), dialect, overrides)
    if overrides.freeze_at is not None:
        parts = _frozen(config, dialect, parts, overrides.freeze_at)
    for scaling in parts.values():
        _check_ramp(config, scaling)
    if config.params is not None and not overrides.fields:
        _check_params(config, config.params, parts)
    longrope = any(scaling.method == "longrope" for scaling in parts.values())
    return Positions("LongRoPE" if longrope else dialect.name, parts, notes, assumed)


def _agreed(config: ConfigFile, v5: Positions, v4: Positions) -> Positions:
    """`v5` if rope_scaling, which the config has too, gives the same positions as rope_parameters."""

    def alike(label: str) -> bool:
        one, other = v5.parts[label], v4.parts[label]
        return not one.differences(other) and one.extended_context == other.extended_context

    if v5.parts.keys() == v4.parts.keys() and all(map(alike, v5.parts)):
        return replace(v5, assumptions=v5.assumptions or v4.assumptions)
    text = text_section(config)
    blocks = ", ".join(shown(text.values[key]) for key in ("rope_parameters", "rope_scaling"))
    raise text.error(
        "rope_parameters", f"and rope_scaling are both present and differ ({blocks}): remove the wrong one"
    )


def read_scaling(config: ConfigFile, overrides: ScalingOverrides = NO_OVERRIDES) -> RopeScaling:
    """The one scaling of a config, see `read_positions`. Raises YarnEdgeError with the names of the parts if they differ."""
    return only_scaling(config, read_positions(config, overrides))


def only_scaling(config: ConfigFile, positions: Positions) -> RopeScaling:
    """The one scaling of `positions`, which are those of `config`. Raises YarnEdgeError if the parts differ."""
    parts = positions.parts
    first, *others = parts.values()
    if any(first.differences(other) or first.extended_context != other.extended_context for other in others):
        longrope = first.method == "longrope"
        kind = "allocated context" if longrope else "layer type"
        remedy = ": pass --freeze-at N to use the table for N tokens" if longrope else ""
        raise YarnEdgeError(
            f"{config.name}: positions differ by {kind} ({', '.join(parts)}): that cannot be represented as one scaling{remedy}"
        )
    return first


def table_parts(parts: Mapping[str, RopeScaling]) -> tuple[RopeScaling, RopeScaling] | None:
    """LongRoPE's scalings up to the original context and beyond it, each with its own largest context; None for other parts."""
    if len(parts) != 2 or any(s.method != "longrope" for s in parts.values()):
        return None
    (name, short), (_beyond, long) = parts.items()
    origin = int(name.split()[2])  # "up to N tokens"
    return replace(short, original_context=origin), long


def _read_blocks(
    text: ConfigFile, dialect: Dialect, overrides: ScalingOverrides
) -> tuple[dict[str, RopeScaling], tuple[str, ...], tuple[str, ...]]:
    """(parts, notes, assumptions)."""
    flags = overrides.fields
    blocks = layer_blocks(text, dialect, family_of(text))
    used = used_layer_types(text)
    parts: dict[str, RopeScaling] = {}
    notes, assumed = list(notes_of(text, blocks)), list[str]()
    scaled = [label for label, block in blocks.items() if block and block.rope_type().method != "none"]
    flagged = scaled[0] if len(scaled) == 1 else next(iter(blocks))
    if flags and len(blocks) > 1 and len(scaled) != 1:
        raise text.error(
            dialect.block,
            f"differs by layer type ({', '.join(blocks)}): the scaling flags cannot say which one they mean",
        )
    for label, block in blocks.items():
        if block is None:
            notes.append(f"{text.where(dialect.block)}.{label} is null: those layers have no positions")
            continue
        if label == flagged:
            block = replace(block, flags=flags)
        if overrides.attention_factor_reading == "multiply":
            block = replace(block, dialect=multiplying(dialect))
        scalings = read_block(block)
        if label and len(scalings) > 1:
            raise block.error("rope_type", f"is LongRoPE for {label} alone: that is not supported")
        if label and used and label not in used:
            notes.append(f"{text.where(dialect.block)}.{label} is for a layer type that the model does not have")
            continue
        parts |= {label or part: scaling for part, scaling in scalings.items()}
        told = open_readings(block)
        assumed += assumptions(block) + (told if overrides.attention_factor_reading is None else [])
    if not parts:
        raise text.error("layer_types", f"names no layer type of {dialect.block} ({', '.join(blocks)[:200]})")
    if flags and [s.method for s in parts.values()] == ["none"]:
        ((label, base),) = parts.items()
        parts = {label: _overridden(text, base, overrides)}
    return parts, tuple(notes), tuple(assumed)


def _check_ramp(config: ConfigFile, scaling: RopeScaling) -> None:
    """Refuse a ramp that ends before it starts: transformers then runs it backwards, we and ggml make it a step."""
    if scaling.method not in RAMPED_METHODS or scaling.ramp != "index":
        return
    low, high = correction_range(scaling)
    if low > high:
        causes = ", ".join(
            f"{name} {getattr(scaling, name):g} ({scaling.source(name)})"
            for name in ("rope_theta", "original_context", "beta_fast", "beta_slow")
        )
        raise YarnEdgeError(
            f"{config.name}: the ramp of {scaling.method} would start at correction dimension {low:g} and end at {high:g}: "
            f"backwards in transformers, a step in llama.cpp. It comes from {causes}: correct the wrong value"
        )


def _overridden(config: ConfigFile, base: RopeScaling, overrides: ScalingOverrides) -> RopeScaling:
    """YaRN by flags alone on a plain checkpoint, or flags on top of params.json."""
    fields = overrides.fields
    if base.method == "none" and fields.get("original_context", 0) > base.original_context:
        raise config.error(
            "max_position_embeddings",
            f"is {base.original_context}, below --yarn-orig-ctx {fields['original_context']}: the original context cannot "
            "be longer",
        )
    if base.method == "yarn" and base.attention_factor == 1 and "factor" in fields and "attention_factor" not in fields:
        raise YarnEdgeError(
            f"{base.source('attention_factor')} makes A 1: with --yarn-factor, pass --yarn-attention-factor"
        )
    return apply_overrides(base, overrides, config.name)


def _frozen(
    config: ConfigFile, dialect: Dialect, parts: Mapping[str, RopeScaling], length: int
) -> dict[str, RopeScaling]:
    """The static form of dynamic scalings at `length` tokens; of LongRoPE's tables, the one for that context."""
    source = f"--freeze-at {length}"
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= MAX_CONTEXT:
        raise YarnEdgeError(f"--freeze-at is {shown(length)}, expected a whole number from 1 to {MAX_CONTEXT}")
    tables = table_parts(parts)
    if tables is not None:
        name, scaling = list(zip(parts, tables, strict=True))[length > tables[0].original_context]
        if length > scaling.original_context:
            raise YarnEdgeError(f"{source} is above {scaling.source('original_context')} {scaling.original_context}")
        where = f"{source}: the table for contexts {name}"
        return {"": scaling.with_overrides(where, original_context=scaling.original_context)}
    static = [s.method for s in parts.values() if s.is_static]
    if static:
        raise YarnEdgeError(
            f"{config.name}: {source} is for dynamic scaling, this config has {static[0]}: leave it out"
        )
    return {label: _freeze(scaling, dialect, length, source) for label, scaling in parts.items()}


def _freeze(scaling: RopeScaling, dialect: Dialect, length: int, source: str) -> RopeScaling:
    factor = dynamic_factor(scaling, length)
    if scaling.method == "dynamic-yarn":
        attention = yarn_attention_factor(factor, dialect.log_multiplier)
        return scaling.with_overrides(source, method="yarn", factor=factor, attention_factor=attention)
    # NTK's factor is not a ratio of contexts (transformers: f l/L - (f - 1)), and its angles do not depend on an original
    # context. The one stated here keeps its product with the factor within `length`, the context that users may fill.
    return scaling.with_overrides(source, method="ntk", factor=factor, original_context=max(1, int(length / factor)))


def _check_params(config: ConfigFile, params: ConfigFile, parts: Mapping[str, RopeScaling]) -> None:
    """Mistral's params.json, if it lies beside config.json, must agree with it."""
    longest = next(iter(parts.values())).original_context
    other = read_params(params, longest)[0][""]
    for scaling in parts.values():
        for name, (ours, theirs) in sorted(scaling.differences(other).items()):
            raise YarnEdgeError(
                f"{config.name}: {name} is {shown(ours)} ({scaling.source(name)}), but {theirs!r} in {other.source(name)}: "
                f"correct one of them, or remove {params.short}"
            )
