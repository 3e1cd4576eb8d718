"""Keys that one code base reads and another ignores: taken where both make the same of them, else refused with both values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from yarn_edge.checkpoint.block import Block
from yarn_edge.checkpoint.config_file import shown
from yarn_edge.flags import FLAGS
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor


class OtherReading(NamedTuple):
    """What the code that reads a key makes of it. field: of RopeScaling. value: that field, from the block and our reading."""

    field: str
    reader: str
    value: Callable[[Block, RopeScaling], Any]


def _ratio(block: Block, ours: RopeScaling) -> float:
    """transformers' A from mscale and mscale_all_dim, of which it ignores a single one."""
    mscale, all_dim = block.number("mscale"), block.number("mscale_all_dim")
    if not (mscale and all_dim):
        return yarn_attention_factor(ours.factor)
    return yarn_attention_factor(ours.factor, 0.1 * mscale) / yarn_attention_factor(ours.factor, 0.1 * all_dim)


_OTHERS: dict[str, OtherReading] = {
    "attn_factor": OtherReading(
        "attention_factor", "the Nous code", lambda b, s: s.default_attention_factor * (b.number("attn_factor") or 0.0)
    ),
    "extrapolation_factor": OtherReading("ext_factor", "the Nous code", lambda b, _s: b.number("extrapolation_factor")),
    "attention_factor": OtherReading("attention_factor", "transformers", lambda b, _s: b.number("attention_factor")),
    "mscale": OtherReading("attention_factor", "transformers", _ratio),
    "mscale_all_dim": OtherReading("attention_factor", "transformers", _ratio),
    "truncate": OtherReading("truncate", "transformers", lambda b, _s: bool(b.boolean("truncate"))),
}


def check_readings(block: Block, ours: RopeScaling) -> None:
    """Refuse a key that this dialect's code ignores, unless the code that reads it computes the same, or a flag decides."""
    for key in sorted(block.dialect.unread & block.values.keys()):
        field, reader, value = _OTHERS[key]
        # transformers reads a truncate of null as false.
        if (block.values[key] is None and key != "truncate") or field in block.flags:
            continue
        theirs, mine = value(block, ours), getattr(ours, field)
        if ours.is_static and math.isclose(theirs, mine, rel_tol=SAME_RELATIVE):
            continue
        code = (
            "transformers"
            if reader != "transformers"
            else f"the {block.dialect.name} code, which this checkpoint names,"
        )
        flag = f", or pass {FLAGS[field]}" if field in FLAGS else ""
        raise block.error(
            key,
            f"is {shown(block.values[key])}: {reader} reads it and gets {field} {_brief(theirs)}, {code} does not read it and gets "
            f"{_brief(mine)}: remove it{flag}",
        )


def _brief(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()
