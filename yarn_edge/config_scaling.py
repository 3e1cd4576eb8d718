"""A checkpoint's config -> `RopeScaling`, by the rules of its dialect (`yarn_edge.dialects`).

Unknown keys, missing values and contradictions are errors that name file, key, value and remedy: nothing is guessed and
nothing is dropped. Every field remembers where it came from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from yarn_edge.config_file import ConfigFile
from yarn_edge.dialects import NOUS_LLAMA, ROPE_TYPES, Dialect, head_dim, recognise
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import FLAGS
from yarn_edge.scaling import Method, RopeScaling, yarn_attention_factor

DEFAULT_ROPE_THETA = 10000.0
# key in the block -> the field it sets; "" for keys that are read elsewhere in this module.
BLOCK_KEYS: dict[str, str] = {
    "rope_type": "", "type": "", "rope_theta": "", "partial_rotary_factor": "", "mscale": "", "mscale_all_dim": "",
    "attn_factor": "", "attention_factor": "", "factor": "", "original_max_position_embeddings": "",
    "beta_fast": "beta_fast", "beta_slow": "beta_slow", "extrapolation_factor": "ext_factor", "truncate": "truncate",
    "finetuned": "finetuned",
}  # fmt: skip
_SCALING_KEYS = frozenset(BLOCK_KEYS) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_scaling(config: ConfigFile, overrides: Mapping[str, Any] | None = None) -> RopeScaling:
    """The scaling a config asks for, with `overrides` (fields by RopeScaling's names, from flags) on top.

    Raises YarnEdgeError for anything unknown, missing, contradictory or not representable.
    """
    flags = {name: value for name, value in (overrides or {}).items() if value is not None}
    dialect = recognise(config)
    block = config.values.get(dialect.block) or {}
    if block and all(isinstance(v, dict) for v in block.values()):
        raise config.error(dialect.block, f"differs by layer type ({', '.join(block)}): that cannot be represented yet")
    reader = _Block(config, dialect, block)
    base = reader.base()
    method = reader.method()
    if method == "none" and not flags:
        return base
    if method == "none":
        return _from_flags(config, base, flags)
    if method != "yarn" and flags.keys() - {"original_context"}:
        raise config.error(dialect.block, f"asks for {method} scaling: the --yarn-… flags are for YaRN")
    return reader.scaled(base, method, flags)


class _Block:
    """One `rope_scaling` / `rope_parameters` object, read field by field."""

    def __init__(self, config: ConfigFile, dialect: Dialect, block: Mapping[str, Any]) -> None:
        self.config, self.dialect, self.block = config, dialect, block
        unknown = sorted(block.keys() - BLOCK_KEYS.keys())
        if unknown:
            raise self.error(
                unknown[0], f"is unknown here (value {one_line(repr(block[unknown[0]]), 60)}): not supported yet"
            )

    def source(self, key: str) -> str:
        return f"{self.config.short}: {self.dialect.block}.{key}"

    def error(self, key: str, what: str) -> YarnEdgeError:
        return self.config.error(f"{self.dialect.block}.{key}", what)

    def number(self, key: str) -> float | None:
        value = self.block.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is {one_line(repr(value), 60)}, not a number")
        return _as_float(value)

    def method(self) -> Method:
        kinds = {k: self.block[k] for k in ("rope_type", "type") if self.block.get(k) is not None}
        if not kinds:
            meaningful = sorted(self.block.keys() - {"rope_theta", "partial_rotary_factor"})
            if meaningful:
                raise self.error("rope_type", f"is missing, but {meaningful[0]} is there")
            return "none"
        if len(set(map(str, kinds.values()))) > 1:
            raise self.error(
                "rope_type", f"is {kinds['rope_type']!r} and type is {kinds['type']!r}: which one is meant?"
            )
        key, kind = next(iter(kinds.items()))
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise self.error(key, f"is {one_line(repr(kind), 60)}, which is unknown; known: {', '.join(ROPE_TYPES)}")
        method, reason = ROPE_TYPES[kind]
        if method is None:
            raise self.error(key, f"is {kind!r}: {reason}")
        left_over = [k for k in BLOCK_KEYS if k in _SCALING_KEYS and self.block.get(k) is not None]
        if method == "none" and left_over:
            raise self.error(
                key, f"is {kind!r}, but {left_over[0]} is there too: remove it, or name the type it belongs to"
            )
        return method

    def base(self) -> RopeScaling:
        """Plain RoPE of this config: base, rotated dimensions, context."""
        config = self.config
        spots = {self.source("rope_theta"): self.block.get("rope_theta"),
                 f"{config.short}: rope_theta": config.values.get("rope_theta")}  # fmt: skip
        where, theta = _the_one(spots) or ("transformers' default for rope_theta", DEFAULT_ROPE_THETA)
        key = "partial_rotary_factor"
        for place, partial in (
            (f"{config.short}: {key}", config.values.get(key)),
            (self.source(key), self.block.get(key)),
        ):
            if partial not in (None, 1):
                raise YarnEdgeError(f"{place} is {one_line(repr(partial), 60)}: partial rotation is not supported yet")
        name = "head_dim" if config.values.get("head_dim") is not None else "hidden_size / num_attention_heads"
        theta = _as_float(theta) if isinstance(theta, int) and not isinstance(theta, bool) else theta
        return RopeScaling(
            "none", theta, head_dim(config), config.required_integer("max_position_embeddings"),
            provenance={
                "method": self.source("rope_type") if self.block else f"{config.short}: no {self.dialect.block}",
                "rope_theta": where, "dim": f"{config.short}: {name}",
                "original_context": f"{config.short}: max_position_embeddings",
            },
        )  # fmt: skip

    def scaled(self, base: RopeScaling, method: Method, flags: Mapping[str, Any]) -> RopeScaling:
        values: dict[str, Any] = {"method": method}
        provenance = dict(base.provenance)
        self._take_origin_and_factor(method, values, provenance, flags)
        for key, field in BLOCK_KEYS.items():
            if field and self.block.get(key) is not None:
                values[field] = self.block[key] if field in ("truncate", "finetuned") else self.number(key)
                provenance[field] = self.source(key)
                if field in ("truncate", "finetuned") and not isinstance(values[field], bool):
                    raise self.error(key, f"is {one_line(repr(values[field]), 60)}, not true or false")
        if "truncate" in self.block and self.block["truncate"] is None:
            values["truncate"] = False
            provenance["truncate"] = f"{self.source('truncate')} (null, which transformers takes as false)"
        if self.block.get("extrapolation_factor") is not None and not self.dialect.attn_factor_multiplies:
            raise self.error("extrapolation_factor", "is read by the Nous code only; transformers ignores it: remove it, "
                             "or pass --yarn-ext-factor")  # fmt: skip
        for field, flag in FLAGS.items():
            if flags.get(field) is not None:
                values[field], provenance[field] = flags[field], flag
        for field in ("ext_factor", "beta_fast", "beta_slow", "truncate"):
            provenance.setdefault(field, f"the default of {self.dialect.name}")
        if "attention_factor" not in flags:
            values["attention_factor"], provenance["attention_factor"] = self._attention(
                method, values["factor"], flags
            )
        plain = {n: getattr(base, n) for n in ("rope_theta", "dim")}
        return RopeScaling(**{**plain, **values}, provenance=provenance)

    def _take_origin_and_factor(
        self, method: Method, values: dict[str, Any], provenance: dict[str, str], flags: Mapping[str, Any]
    ) -> None:
        config, key = self.config, "original_max_position_embeddings"
        longest = config.required_integer("max_position_embeddings")
        spots = {self.source(key): self.block.get(key), f"{config.short}: {key}": config.integer(key)}
        given = _the_one(spots)
        if given:
            provenance["original_context"], origin = given
            if isinstance(origin, float) and origin.is_integer():
                origin = int(origin)
            if isinstance(origin, bool) or not isinstance(origin, int) or origin <= 0:
                raise YarnEdgeError(f"{given[0]} is {one_line(repr(origin), 60)}, need a whole number above 0")
        elif self.dialect.requires_original and "original_context" not in flags:
            raise self.error(key, f"is missing; the {self.dialect.name} code needs it: add it, or pass --yarn-orig-ctx")
        elif method == "linear" and "original_context" not in flags:
            raise self.error(
                key, f"is missing, and max_position_embeddings {longest} may be the context before the scaling or after it: "
                "add it, or pass --yarn-orig-ctx"
            )  # fmt: skip
        else:
            origin = longest
            provenance["original_context"] = f"{config.short}: max_position_embeddings, as transformers does"
        factor = self.number("factor")
        provenance["factor"] = self.source("factor")
        if factor is None and "factor" not in flags:
            if "factor" not in self.block or not given:
                raise self.error("factor", "is missing: add it, or pass --yarn-factor")
            factor = longest / origin
            provenance["factor"] = f"{config.short}: max_position_embeddings / {key} (factor is null)"
        values["original_context"], values["factor"] = origin, factor
        if flags.keys() & {"factor", "original_context"}:
            return
        RopeScaling("linear", 10000.0, 2, origin, factor or 1.0, provenance=provenance)  # its checks come first
        if not origin <= longest <= round(origin * float(factor or 1)):
            raise config.error(
                "max_position_embeddings",
                f"is {longest}, but {self.source(key)} is {origin} and factor {factor:g} makes it "
                f"{round(origin * float(factor or 1))}: correct one of them, or pass --yarn-factor and --yarn-orig-ctx",
            )

    def _attention(self, method: Method, factor: float, flags: Mapping[str, Any]) -> tuple[float, str]:
        """(A, where it came from)."""
        if method != "yarn":
            for key in ("attention_factor", "attn_factor", "mscale", "mscale_all_dim"):
                if self.block.get(key) is not None:
                    raise self.error(key, f"has no meaning with rope type {method!r}")
            return 1.0, f"{method} has none"
        explicit, multiplier = self.number("attention_factor"), self.number("attn_factor")
        mscale, all_dim = self.number("mscale"), self.number("mscale_all_dim")
        default = yarn_attention_factor(factor, self.dialect.log_multiplier)
        formula = f"{self.dialect.log_multiplier} ln(factor) + 1 ({self.dialect.name})"
        if self.dialect is NOUS_LLAMA and self.config.values.get("model_type") == "mistral":
            raise self.error(
                "finetuned", "names the Nous code, whose Mistral form uses 0.07 ln s + 1 and not 0.1, but no modeling file "
                "tells which it was: pass --yarn-attention-factor"
            )  # fmt: skip
        if self.dialect.attn_factor_multiplies:
            for key in ("attention_factor", "mscale", "mscale_all_dim"):
                if self.block.get(key) is not None:
                    raise self.error(key, f"is not read by the {self.dialect.name} code, which this checkpoint names")
            if multiplier is None:
                return default, formula
            return default * multiplier, f"{self.source('attn_factor')} * ({formula})"
        if multiplier is not None:
            raise self.error(
                "attn_factor",
                f"is {multiplier!r}: transformers ignores it, the Nous code multiplies by it, so its meaning here is open; "
                "use attention_factor, or pass --yarn-attention-factor",
            )
        if explicit is not None:
            if "factor" in flags:
                raise self.error("attention_factor", f"is {explicit!r} and was made for another factor than "
                                 "--yarn-factor: pass --yarn-attention-factor too")  # fmt: skip
            return explicit, self.source("attention_factor")
        if mscale and all_dim:
            ratio = yarn_attention_factor(factor, 0.1 * mscale) / yarn_attention_factor(factor, 0.1 * all_dim)
            return ratio, f"{self.source('mscale')} / mscale_all_dim"
        return default, formula


def _as_float(value: float) -> float:
    """A number of JSON, where an integer may be too large for a float: infinite then, which RopeScaling refuses."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _the_one(spots: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(where, value) of the first place that has one, None where none has; the other places must say the same."""
    given = [(where, value) for where, value in spots.items() if value is not None]
    if any(value != given[0][1] for _where, value in given):
        raise YarnEdgeError(" and ".join(f"{where} is {value!r}" for where, value in given) + ": which one is meant?")
    return given[0] if given else None


def _from_flags(config: ConfigFile, base: RopeScaling, flags: Mapping[str, Any]) -> RopeScaling:
    """YaRN on a plain checkpoint, by flags alone."""
    missing = [FLAGS[field] for field in ("factor", "original_context") if field not in flags]
    if missing:
        raise YarnEdgeError(
            f"{config.short}: has no YaRN, so {missing[0]} is needed too (max_position_embeddings is {base.original_context})"
        )
    if flags["original_context"] > base.original_context:
        raise config.error(
            "max_position_embeddings",
            f"is {base.original_context}, below --yarn-orig-ctx {flags['original_context']}: the original context cannot be longer",
        )
    provenance = {field: flag for field, flag in FLAGS.items() if field in flags} | {"method": "--yarn-factor"}
    values = {"attention_factor": yarn_attention_factor(flags["factor"]), **flags}
    provenance.setdefault("attention_factor", "0.1 ln(factor) + 1")
    return RopeScaling("yarn", base.rope_theta, base.dim, **values, provenance={**base.provenance, **provenance})
