"""What a block's numbers mean to each method: one function per method, from a `Block` to its `RopeScaling`.

Each function returns the scalings by part: the single part "", except for LongRoPE, whose two tables are chosen by the
allocated context. Every field records its source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from yarn_edge.checkpoint.block import ORIGINAL, Block
from yarn_edge.checkpoint.config_file import shown
from yarn_edge.checkpoint.dialects import NOUS_LLAMA, RopeType
from yarn_edge.checkpoint.readings import ATTN_FACTOR, check_readings, multiplying, told_readings
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import MAX_CONTEXT, SAME_RELATIVE, Method, RopeScaling, yarn_attention_factor

Parts = dict[str, RopeScaling]
Sourced = tuple[Any, str]  # a value and its source
# a block's key -> the RopeScaling field with the same value
_YARN_NUMBERS = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "extrapolation_factor": "ext_factor"}


def _complete(block: Block, base: RopeScaling, method: Method, fields: dict[str, Sourced]) -> RopeScaling:
    """`base` with `fields`, the block's switches, and the flags on top."""
    fields.setdefault("softmax_factor", (1.0, "none: only latent attention has one"))
    for key in ("truncate", "finetuned"):
        value = block.boolean(key)
        if value is not None:
            fields[key] = value, block.where(key)
    fields |= {name: (block.flags[name], FLAGS[name]) for name in block.flags}
    return replace(
        base,
        method=method,
        **{name: value for name, (value, _where) in fields.items()},
        provenance={**base.provenance, **{name: where for name, (_value, where) in fields.items()}},
    )


def _none(_block: Block, base: RopeScaling, _row: RopeType) -> Parts:
    return {"": base}


def _linear(block: Block, base: RopeScaling, row: RopeType) -> Parts:
    fields = block.reach(row, base.original_context) | {"attention_factor": (1.0, "linear has none")}
    return {"": _complete(block, base, "linear", fields)}


def _ramp(block: Block) -> dict[str, Sourced]:
    """A block's ext_factor, betas and truncate."""
    default = f"the default of {block.dialect.name}"
    fields: dict[str, Sourced] = {
        "ext_factor": (1.0, default),
        "beta_fast": (block.dialect.beta_fast, default),
        "beta_slow": (block.dialect.beta_slow, default),
        "truncate": (True, default),
    }
    for key, name in _YARN_NUMBERS.items():
        if block.values.get(key) is not None:
            fields[name] = block.number(key), block.where(key)
    truncate = block.boolean("truncate") if "truncate" in block.values else True
    if (block.label or block.family.layers) and not truncate:
        nests = "" if block.label else f"it nests the block of {block.family.model_type} by layer type, and "
        raise block.error(
            "truncate",
            f"is {shown(truncate)}. transformers reads it beside the layer types and not inside one ({nests}"
            "there it is lost), so its meaning here is open: remove it",
        )
    if truncate is None:
        fields["truncate"] = False, f"{block.where('truncate')} (null, which transformers reads as false)"
    return fields


def _yarn(block: Block, base: RopeScaling, row: RopeType) -> Parts:
    fields = block.reach(row, base.original_context) | _ramp(block)
    factor = block.flags.get("factor", fields["factor"][0])
    if "attention_factor" not in block.flags:
        fields["attention_factor"] = _attention(block, row, factor)
    all_dim = block.number("mscale_all_dim")
    if block.family.softmax and all_dim:
        m = yarn_attention_factor(factor, 0.1 * all_dim)
        fields["softmax_factor"] = m * m, f"{block.where('mscale_all_dim')}: m(mscale_all_dim) squared"
    return {"": _complete(block, base, "yarn", fields)}


def _attention(block: Block, row: RopeType, factor: float) -> Sourced:
    """A and its source."""
    explicit, multiplier = block.number("attention_factor"), block.number("attn_factor")
    mscale, all_dim = block.number("mscale"), block.number("mscale_all_dim")
    log_multiplier = block.dialect.log_multiplier if row.log_multiplier is None else row.log_multiplier
    default = yarn_attention_factor(factor, log_multiplier)
    formula = f"{log_multiplier} ln(factor) + 1 ({block.dialect.name})"
    if block.dialect is NOUS_LLAMA and block.config.values.get("model_type") == "mistral":
        raise block.error(
            "finetuned",
            "is a key of the Nous code, whose Mistral form uses 0.07 ln s + 1 instead of 0.1 ln s + 1, and betas of 128 and 2. "
            "No modeling file says which form this is: pass --yarn-attention-factor, --yarn-beta-fast and --yarn-beta-slow",
        )
    if multiplier is not None:
        return default * multiplier, f"{block.where('attn_factor')} * ({formula})"
    if explicit is not None:
        if "factor" in block.flags:
            raise block.error(
                "attention_factor",
                f"is {explicit!r} and was made for a factor other than --yarn-factor: pass --yarn-attention-factor too",
            )
        return explicit, block.where("attention_factor")
    if mscale and all_dim:
        return _mscale_ratio(factor, mscale, all_dim), f"{block.where('mscale')} / mscale_all_dim"
    if block.dialect.own_mscales:
        own = _mscale_ratio(factor, 1.0 if mscale is None else mscale, all_dim or 0.0)
        if not math.isclose(own, default, rel_tol=SAME_RELATIVE):
            key, other = ("mscale_all_dim", "mscale") if all_dim else ("mscale", "mscale_all_dim")
            raise block.error(
                key,
                f"is {shown(block.values[key])} and {other} is {shown(block.values.get(other))}: the "
                f"{block.dialect.name} code gets A {own:.6g} from that, transformers {default:.6g}; set both, or pass "
                "--yarn-attention-factor",
            )
    return default, formula


def _mscale_ratio(factor: float, mscale: float, all_dim: float) -> float:
    """m(mscale) / m(mscale_all_dim)."""
    return yarn_attention_factor(factor, 0.1 * mscale) / yarn_attention_factor(factor, 0.1 * all_dim)


def _dynamic_ntk(block: Block, base: RopeScaling, row: RopeType) -> Parts:
    """L is max_position_embeddings, as in transformers' `_compute_dynamic_ntk_parameters` and in the Nous code."""
    given = block.origin(row)
    if given and given[1] != base.original_context:
        raise YarnEdgeError(
            f"{given[0]} is {given[1]}, but dynamic NTK computes its angles from the current length over "
            f"{base.source('original_context')} {base.original_context}: which one is right?"
        )
    fields: dict[str, Sourced] = {
        "factor": (block.needed("factor"), block.where("factor")),
        "attention_factor": (1.0, "dynamic NTK has none"),
    }
    return {"": _complete(block, base, "dynamic-ntk", fields)}


def _dynamic_yarn(block: Block, base: RopeScaling, row: RopeType) -> Parts:
    """The Nous code: plain up to L, then s = length / L. Nothing reads the block's factor, so it is ignored here."""
    if not block.dialect.attn_factor_multiplies:
        raise block.error(
            "type", "is 'dynamic-yarn', which only the Nous code has, but no modeling file names that code"
        )
    given = block.origin(row)
    assert given is not None
    if given[1] != base.original_context or block.values.get("finetuned") is True:
        raise YarnEdgeError(
            f"{given[0]} is {given[1]}, {base.source('original_context')} {base.original_context} and finetuned "
            f"{block.values.get('finetuned')!r}: the versions of the Nous code disagree on dynamic YaRN after fine-tuning; "
            "use type yarn and its factor"
        )
    if block.number("attn_factor") is not None:
        raise block.error(
            "attn_factor", "with dynamic YaRN is not supported: remove it, or use type yarn and its factor"
        )
    fields = _ramp(block) | {
        "factor": (1.0, "none: it depends on the current length"),
        "attention_factor": (
            1.0,
            f"at the original context; {block.dialect.log_multiplier} ln(length / original) + 1 beyond",
        ),
    }
    return {"": _complete(block, base, "dynamic-yarn", fields)}


def _llama3(block: Block, base: RopeScaling, row: RopeType) -> Parts:
    """Llama 3.1's rule as a table of factors. The context is max_position_embeddings, whatever the factor is."""
    where, origin = block.origin(row) or (base.source("original_context"), base.original_context)
    factor, low, high = (block.needed(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    for key, value, least in (
        ("factor", factor, 1.0),
        ("low_freq_factor", low, 1e-6),
        ("high_freq_factor", high, 1e-6),
    ):
        if not least <= value <= 1e6:
            raise block.error(key, f"is {value!r}, expected a number from {least:g} to 1e+06")
    if high <= low:
        raise block.error(
            "high_freq_factor", f"is {high:g} and low_freq_factor is {low:g}: high_freq_factor must be larger"
        )
    _within(base, where, origin)
    factors = rope.llama3_factors(base.dim, base.rope_theta, origin, factor, low, high)
    fields: dict[str, Sourced] = {
        "frequency_factors": (
            tuple(map(float, factors)),
            f"{block.where('factor')} {factor:g}, low_freq_factor {low:g}, high_freq_factor {high:g}, {where} {origin}",
        ),
        "attention_factor": (1.0, "llama3 has none"),
    }
    return {"": _complete(block, base, "llama3", fields)}


def _within(base: RopeScaling, where: str, origin: int) -> None:
    if origin > base.original_context:
        raise YarnEdgeError(
            f"{where} is {origin}, above {base.source('original_context')} {base.original_context}: correct one of them"
        )


def _longrope(block: Block, base: RopeScaling, row: RopeType) -> Parts:
    """A table for contexts up to the original one, another for longer ones, and one A for both (transformers' longrope)."""
    where, origin = block.origin(row) or (base.source("original_context"), base.original_context)
    _within(base, where, origin)
    given = block.number("factor")
    factor = base.original_context / origin if given is None else given
    if not 1 <= factor <= MAX_CONTEXT:
        raise block.error("factor", f"is {shown(given)}, expected a number from 1 to {MAX_CONTEXT}")
    attention = block.number("attention_factor"), block.where("attention_factor")
    if attention[0] is None:
        if origin < 2:
            raise YarnEdgeError(f"{where} is {origin}, too short for sqrt(1 + ln(factor) / ln({ORIGINAL}))")
        source = base.source("original_context") + f" / {ORIGINAL}" if given is None else block.where("factor")
        a = math.sqrt(1 + math.log(factor) / math.log(origin))
        attention = a, f"sqrt(1 + ln(factor) / ln({ORIGINAL})), factor from {source}"
    parts = {}
    for key, part in (("short_factor", f"up to {origin} tokens"), ("long_factor", f"beyond {origin} tokens")):
        table = _table(block, key, base.dim // 2), block.where(key)
        parts[part] = _complete(block, base, "longrope", {"frequency_factors": table, "attention_factor": attention})
    return parts


def _table(block: Block, key: str, n_pairs: int) -> tuple[float, ...]:
    values = block.values.get(key)
    if not isinstance(values, list):
        raise block.error(key, "is missing: add it" if values is None else f"is {shown(values)}, not a list of numbers")
    if len(values) != n_pairs:
        raise block.error(key, f"has {len(values)} numbers, expected {n_pairs}, one for each rotated pair")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-6 <= value <= 1e6:
            raise block.error(f"{key}[{index}]", f"is {shown(value)}, expected a number from 1e-06 to 1e+06")
    return tuple(map(float, values))


METHODS: dict[Method, Callable[[Block, RopeScaling, RopeType], Parts]] = {
    "none": _none,
    "linear": _linear,
    "yarn": _yarn,
    "dynamic-ntk": _dynamic_ntk,
    "dynamic-yarn": _dynamic_yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def read_block(block: Block) -> Parts:
    """The scalings of a block, by part. Raises YarnEdgeError for anything unknown, missing or contradictory."""
    parts = _read(block)
    for scaling in parts.values():
        if block.rope_type().method != "none":
            check_readings(block, scaling)
    return parts


def _read(block: Block) -> Parts:
    """`read_block` without what other code makes of the keys that this dialect's does not read."""
    row = block.rope_type()
    base = block.plain()
    assert row.method is not None
    allowed = {"rope_theta"} | ({"original_context"} if row.method == "linear" else set())
    if row.method not in ("none", "yarn") and block.flags.keys() - allowed:
        raise block.config.error(block.name, f"has {row.method} scaling: the --yarn-… flags are for YaRN")
    read = {k: v for k, v in block.values.items() if k not in block.dialect.unread}
    return METHODS[row.method](replace(block, values=read), base, row)


def assumptions(block: Block) -> list[str]:
    """What a block leaves open and a convention settles, as sentences."""
    if not block.leaves_context_open(block.rope_type()):
        return []
    longest = block.config.required_integer("max_position_embeddings")
    fields = block.reach(block.rope_type(), longest)
    origin, factor = fields["original_context"][0], fields["factor"][0]
    reach = round(origin * factor)
    whole = "" if reach == longest else f" ({reach}: factor {factor:g} * {origin}, a whole number of tokens)"
    return [
        f"{block.where(ORIGINAL)} is missing, which linear scaling does not need: {block.config.where('max_position_embeddings')} "
        f"{longest} is taken as the context after scaling{whole}; if it is the one before, pass --yarn-orig-ctx {longest}"
    ]


def open_readings(block: Block) -> list[str]:
    """Both readings of an attn_factor that this dialect's code does not read, as sentences."""
    unread = ATTN_FACTOR in block.dialect.unread and block.values.get(ATTN_FACTOR) is not None
    if not unread or "attention_factor" in block.flags or block.rope_type().method != "yarn":
        return []
    multiplied = _read(replace(block, dialect=multiplying(block.dialect)))[""]
    return told_readings(block, read_block(block)[""], multiplied)
