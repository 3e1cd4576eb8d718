"""Keys that one code base reads and another ignores: taken where both make the same of them, else refused with both values.

Of `attn_factor` transformers' reading is taken, because published weights were trained and run under it, and both are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from yarn_edge.checkpoint.block import Block
from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.checkpoint.dialects import Dialect, recognise, text_section
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS, READING_FLAG, ScalingOverrides
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor


class OtherReading(NamedTuple):
    """What the code that reads a key makes of it. field: of RopeScaling. value: that field, from the block and our reading."""

    field: str
    reader: str
    value: Callable[[Block, RopeScaling], Any]


def _ratio(block: Block, ours: RopeScaling) -> float:
    """A from mscale and mscale_all_dim: transformers', which ignores a single one, or that of code with defaults for them."""
    mscale, all_dim = block.number("mscale"), block.number("mscale_all_dim")
    if block.dialect.own_mscales:
        mscale, all_dim = 1.0 if mscale is None else mscale, all_dim or 0.0
    elif not (mscale and all_dim):
        return yarn_attention_factor(ours.factor)
    return yarn_attention_factor(ours.factor, 0.1 * mscale) / yarn_attention_factor(ours.factor, 0.1 * all_dim)


# The multiplier of 0.1 ln s + 1, whose reading a flag decides where transformers' code runs the checkpoint.
ATTN_FACTOR = "attn_factor"
_MSCALES = frozenset({"mscale", "mscale_all_dim"})
_OTHERS: dict[str, OtherReading] = {
    "extrapolation_factor": OtherReading("ext_factor", "the Nous code", lambda b, _s: b.number("extrapolation_factor")),
    "attention_factor": OtherReading("attention_factor", "transformers", lambda b, _s: b.number("attention_factor")),
    "mscale": OtherReading("attention_factor", "transformers", _ratio),
    "mscale_all_dim": OtherReading("attention_factor", "transformers", _ratio),
    "truncate": OtherReading("truncate", "transformers", lambda b, _s: bool(b.boolean("truncate"))),
}


def check_readings(block: Block, ours: RopeScaling) -> None:
    """Refuse a key that this dialect's code ignores, unless the code that reads it computes the same, or a flag decides."""
    by_flag = _multiplied_by_flag(block)
    unread = block.dialect.unread | (_MSCALES | {"attention_factor"} if by_flag else frozenset())
    for key in sorted(unread & block.values.keys() - {ATTN_FACTOR}):
        field, reader, value = _OTHERS[key]
        # transformers reads a truncate of null as false.
        if (block.values[key] is None and key != "truncate") or field in block.flags:
            continue
        theirs, mine = value(block, ours), getattr(ours, field)
        if ours.is_static and math.isclose(theirs, mine, rel_tol=SAME_RELATIVE):
            continue
        if (
            by_flag
            and key in _MSCALES
            and math.isclose(theirs, yarn_attention_factor(ours.factor), rel_tol=SAME_RELATIVE)
        ):
            continue  # the A that is multiplied
        code = _code_of(block.dialect) if reader == "transformers" else "transformers"
        flag = f", or pass {FLAGS[field]}" if field in FLAGS else ""
        if by_flag and reader == "transformers":
            code = f"code that multiplies by {ATTN_FACTOR} {shown(block.values[ATTN_FACTOR])}"
            flag = f", or leave out {READING_FLAG} multiply"
        raise block.error(
            key,
            f"is {shown(block.values[key])}: {reader} reads it and gets {field} {_brief(theirs)}, {code} does not read it and gets "
            f"{_brief(mine)}: remove it{flag}",
        )


def _multiplied_by_flag(block: Block) -> bool:
    """Whether attn_factor multiplies A, and not because the checkpoint's code does so."""
    own = ATTN_FACTOR in block.dialect.unread or block.dialect.attn_factor_multiplies
    return not own and block.values.get(ATTN_FACTOR) is not None


def _code_of(dialect: Dialect) -> str:
    return f"the {dialect.name} code, which this checkpoint names,"


def multiplying(dialect: Dialect) -> Dialect:
    """A dialect like this one, whose code multiplies A by attn_factor."""
    return replace(dialect, unread=dialect.unread - {ATTN_FACTOR})


def check_reading_flag(config: ConfigFile, overrides: ScalingOverrides) -> None:
    """Refuse the flag where it has nothing to decide: no attn_factor, a code that multiplies, or A given by a flag."""
    if overrides.attention_factor_reading is None:
        return
    given = f"{READING_FLAG} {overrides.attention_factor_reading}"
    if overrides.attention_factor is not None:
        raise YarnEdgeError(f"{given} and {FLAGS['attention_factor']} both say what A is: leave one out")
    dialect, text = recognise(config), text_section(config)
    sections = [s.values for key in ("rope_parameters", "rope_scaling") if (s := text.section(key)) is not None]
    blocks = [*sections, *(inner for values in sections for inner in values.values() if isinstance(inner, dict))]
    if all(block.get(ATTN_FACTOR) is None for block in blocks):
        raise YarnEdgeError(
            f"{config.name}: {given} is for a config with {ATTN_FACTOR}, this one has none: leave it out"
        )
    if ATTN_FACTOR not in dialect.unread:
        raise YarnEdgeError(
            f"{config.name}: {given}: {_code_of(dialect)} multiplies by {ATTN_FACTOR}, so nothing is open: leave it out"
        )


def told_readings(block: Block, ours: RopeScaling, multiplied: RopeScaling) -> list[str]:
    """Both readings of attn_factor with their attention factors, as a sentence; [] if they are one."""
    mine, theirs = ours.attention_factor, multiplied.attention_factor
    if math.isclose(mine, theirs, rel_tol=SAME_RELATIVE):
        return []
    code = _code_of(block.dialect) if block.dialect.own_mscales else "transformers"
    return [
        f"{block.where(ATTN_FACTOR)} is {shown(block.values[ATTN_FACTOR])}: {code} does not read it and gets attention factor "
        f"{_brief(mine)}, which is taken because published weights were trained and run under it; code that multiplies by it "
        f"(Nous, vLLM) gets {_brief(theirs)}: {READING_FLAG} multiply"
    ]


def _brief(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()
