"""One `rope_scaling` or `rope_parameters` object of a config: its type, its numbers, and what every method reads from it.

Unknown keys, wrong types and contradictions are errors that name the file, the key, the value and the remedy.
`yarn_edge.checkpoint.methods` knows what the numbers mean to each method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole, shown
from yarn_edge.checkpoint.dialects import KNOWN_KEYS, PLAIN_KEYS, ROPE_TYPES, Dialect, RopeType
from yarn_edge.checkpoint.families import Family, rotated_dim
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS
from yarn_edge.positions.scaling import MAX_CONTEXT, RAMPED_METHODS, RopeScaling

ORIGINAL = "original_max_position_embeddings"
_READS_ORIGINAL = RAMPED_METHODS | {"llama3", "longrope"}
# Values that change nothing, whatever the type: A is then 1 by every reading.
_NEUTRAL = {"attention_factor": 1.0, "attn_factor": 1.0}


def as_float(value: Any) -> Any:
    """A JSON number as a float, other values unchanged. An integer too large for a float is infinity: RopeScaling refuses it."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def the_one(spots: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(place, value) of the first place that has a value, None if none has. The other places must agree with it."""
    given = [(where, as_float(value)) for where, value in spots.items() if value is not None]
    for where, value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise YarnEdgeError(f"{where} is {shown(value)}, not a finite number")
    if any(value != given[0][1] for _where, value in given):
        raise YarnEdgeError(
            " and ".join(f"{where} is {shown(spots[where])}" for where, _v in given) + ": which one is right?"
        )
    return given[0] if given else None


@dataclass(frozen=True)
class Block:
    """A block and everything that its reading depends on.

    label: the layer type that the block is for, "" for all. theta: (place, base) for a missing rope_theta, if it is neither the
    config's own nor the family's. flags: RopeScaling fields given by flags.
    """

    config: ConfigFile
    dialect: Dialect
    family: Family
    values: Mapping[str, Any]
    label: str = ""
    theta: tuple[str, float] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The block's key in the config, with its layer type."""
        return self.dialect.block + (f".{self.label}" if self.label else "")

    def where(self, key: str) -> str:
        """`key` of this block, for provenance."""
        return self.config.where(f"{self.name}.{key}")

    def error(self, key: str, what: str) -> YarnEdgeError:
        """An error that names the file and `key` of this block."""
        return self.config.error(f"{self.name}.{key}", what)

    def number(self, key: str) -> float | None:
        """A number; None if the key is absent or null."""
        value = as_float(self.values.get(key))
        if value is None or (isinstance(value, float) and not isinstance(value, bool)):
            return value
        raise self.error(key, f"is {shown(value)}, not a number")

    def needed(self, key: str) -> float:
        """A number; an error if the key is absent."""
        value = self.number(key)
        if value is None:
            raise self.error(key, "is missing: add it")
        return value

    def boolean(self, key: str) -> bool | None:
        """True or false by the rules of `ConfigFile.boolean`; None if the key is absent or null."""
        return replace(self.config, values=self.values, prefix=f"{self.config.prefix}{self.name}.").boolean(key)

    def _says_nothing(self, key: str, row: RopeType) -> bool:
        """Whether `key`, which the type does not read, has a value that would change nothing under any type."""
        value = as_float(self.values[key])
        if key in _NEUTRAL:
            return not isinstance(value, bool) and value == _NEUTRAL[key]
        if row.method != "none":
            return False
        if key == ORIGINAL:
            return is_whole(value) and value == self.config.integer("max_position_embeddings")
        return key == "finetuned" or (key == "factor" and not isinstance(value, bool) and value == 1)

    def rope_type(self) -> RopeType:
        """The row of the block's type. Checks the block's keys against that row."""
        kinds = {k: self.values[k] for k in ("rope_type", "type") if self.values.get(k) is not None}
        for key, kind in kinds.items():
            if not isinstance(kind, str) or kind not in ROPE_TYPES:
                raise self.error(key, f"is {shown(kind)}, which is unknown; known: {', '.join(ROPE_TYPES)}")
        names = {self.family.aliases.get(kind, kind) for kind in kinds.values()}
        if len(names) > 1:
            raise self.error(
                "rope_type", f"is {kinds['rope_type']!r} and type is {kinds['type']!r}: which one is right?"
            )
        key, name = next(iter(kinds)) if kinds else "rope_type", next(iter(names)) if names else "default"
        row = ROPE_TYPES[name]
        present = sorted(k for k, v in self.values.items() if v is not None and k not in PLAIN_KEYS)
        present = [k for k in present if k in row.keys or not self._says_nothing(k, row)]
        if not kinds and present:
            raise self.error("rope_type", f"is missing, but the block has {present[0][:60]}")
        if row.method is None:
            raise self.error(key, f"is {name!r}: {row.reason}")
        for extra in sorted(self.values.keys() - KNOWN_KEYS - self.family.extra_keys):
            raise self.error(extra[:60], f"is unknown here (value {shown(self.values[extra])}): not supported yet")
        for extra in present:
            if extra in row.keys or extra in self.family.extra_keys:
                continue
            if row.method == "none":
                raise self.error(
                    key, f"is {name!r}, but the block has {extra} too: remove it, or name the type it belongs to"
                )
            raise self.error(extra, f"is {shown(self.values[extra])} and has no meaning with rope type {name!r}")
        return row

    def plain(self) -> RopeScaling:
        """Plain RoPE with this config's base, rotated dimensions and context."""
        key = self.family.theta_key
        top = {} if self.theta else {self.config.where(key): self.config.values.get(key)}
        default = self.theta or (
            f"transformers' default for {self.family.model_type or 'rope_theta'}",
            self.family.rope_theta,
        )
        given = the_one({self.where("rope_theta"): self.values.get("rope_theta"), **top})
        if "rope_theta" in self.flags:
            where, theta = FLAGS["rope_theta"], self.flags["rope_theta"]
        elif given is None:
            self._refuse_null_theta(*default)
            where, theta = default
        else:
            where, theta = given
        if key != "rope_theta" and "rope_theta" not in self.flags:
            # The code of such a family does not read it, but it must not disagree.
            the_one({where: theta, self.config.where("rope_theta"): self.config.values.get("rope_theta")})
        own = self.values.get("partial_rotary_factor")
        dim, dim_source = rotated_dim(
            self.config, (self.where("partial_rotary_factor"), own), alone=bool(self.label) and own is not None
        )
        kind = next((key for key in ("rope_type", "type") if self.values.get(key) is not None), None)
        return RopeScaling(
            "none",
            theta,
            dim,
            self.config.required_integer("max_position_embeddings"),
            provenance={
                "method": self.where(kind) if kind else f"{self.config.short}: no {self.config.prefix}{self.name}",
                "rope_theta": where,
                "attention_factor": "plain RoPE has none",
                "dim": dim_source,
                "original_context": self.config.where("max_position_embeddings"),
            },
        )

    def _refuse_null_theta(self, source: str, default: float) -> None:
        """A base of null, which trainers leave, is not an absent one."""
        spots = [(self.where("rope_theta"), self.values, "rope_theta")]
        if not self.theta:
            spots.append((self.config.where(self.family.theta_key), self.config.values, self.family.theta_key))
        for where, values, key in spots:
            if key in values:
                flag = "" if self.label else f", or pass {FLAGS['rope_theta']}"
                raise YarnEdgeError(
                    f"{where} is null, which transformers fails on; without the key it is {default:g} ({source}): write the base "
                    f"that the model was trained with{flag}"
                )

    def origin(self, row: RopeType) -> tuple[str, int] | None:
        """(place, L) of the original context, None if the config does not have it."""
        top = self.config.integer(ORIGINAL)
        spots = {self.where(ORIGINAL): self.values.get(ORIGINAL), self.config.where(ORIGINAL): top}
        if self.family.original_context is not None and top is None:
            spots[f"transformers' default for {self.family.model_type} without {ORIGINAL} at the top"] = (
                self.family.original_context
            )
        for where, value in spots.items():
            whole = not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value % 1 == 0)
            )
            if value is not None and not (whole and value > 0):
                raise YarnEdgeError(f"{where} is {shown(value)}, expected a whole number above 0")
            if value is not None and value > MAX_CONTEXT:
                raise YarnEdgeError(f"{where} is {shown(value)}, must be from 1 to {MAX_CONTEXT}")
        given = the_one(spots)
        stated = any(values.get(ORIGINAL) is not None for values in (self.values, self.config.values))
        if not stated and row.method in _READS_ORIGINAL and "original_context" not in self.flags:
            for where, values in (
                (self.where(ORIGINAL), self.values),
                (self.config.where(ORIGINAL), self.config.values),
            ):
                if ORIGINAL in values:
                    longest = shown(self.config.values.get("max_position_embeddings"))
                    flag = f", or pass {FLAGS['original_context']}" if row.method in RAMPED_METHODS else ""
                    raise YarnEdgeError(
                        f"{where} is null, which transformers 5 fails on; without the key it is max_position_embeddings {longest}: "
                        f"write the context before the extension{flag}"
                    )
        if given:
            return given[0], int(given[1])
        by_code = self.dialect.requires_original and row.method in RAMPED_METHODS
        if (by_code or row.requires_original) and "original_context" not in self.flags:
            reader = f"the {self.dialect.name} code" if by_code else "its rope type"
            raise self.error(ORIGINAL, f"is missing; {reader} needs it: add it, or pass --yarn-orig-ctx")
        return None

    def reach(self, row: RopeType, longest: int) -> dict[str, tuple[Any, str]]:
        """original_context, factor and, if there is one, declared_context, with their sources.

        They are checked against `longest`, which is max_position_embeddings.
        """
        given, declared = self.origin(row), dict[str, tuple[Any, str]]()
        if self.leaves_context_open(row):
            return self._linear_reach(longest)
        source, origin = given or (self.config.where("max_position_embeddings, as transformers does"), longest)
        factor, factor_source = self.number("factor"), self.where("factor")
        if factor is None and "factor" not in self.flags:
            if "factor" not in self.values or not given:
                raise self.error("factor", "is missing: add it, or pass --yarn-factor")
            factor = longest / origin
            factor_source = self.config.where(f"max_position_embeddings / {ORIGINAL} (factor is null)")
        if not self.flags.keys() & {"factor", "original_context"}:
            assert factor is not None
            # The checks of RopeScaling come first.
            RopeScaling(
                "linear", 10000.0, 2, origin, factor, provenance={"original_context": source, "factor": factor_source}
            )
            if not origin <= longest <= round(origin * factor):
                raise self.config.error(
                    "max_position_embeddings",
                    f"is {longest}, but {self.where(ORIGINAL)} is {origin} and factor {factor:g} makes it "
                    f"{round(origin * factor)}: correct one of them, or pass --yarn-factor and --yarn-orig-ctx",
                )
            if self.family.declares_context and origin < longest < round(origin * factor):
                declared["declared_context"] = longest, self.config.where("max_position_embeddings")
        return {"original_context": (origin, source), "factor": (factor, factor_source)} | declared

    def leaves_context_open(self, row: RopeType) -> bool:
        """Whether this is linear scaling without an original context, whose angles do not depend on it."""
        return row.method == "linear" and "original_context" not in self.flags and self.origin(row) is None

    def _linear_reach(self, longest: int) -> dict[str, tuple[Any, str]]:
        """`reach` if max_position_embeddings is the context after scaling, as for every other method."""
        factor, source = self.needed("factor"), self.where("factor")
        RopeScaling("linear", 10000.0, 2, 1, factor, provenance={"factor": source})  # its checks of the factor
        origin = max(1, round(longest / factor))
        if origin > 1 and round(origin * factor) > longest:
            origin -= 1
        where = self.config.where(f"max_position_embeddings / factor (no {ORIGINAL})")
        return {"original_context": (origin, where), "factor": (factor, source)}
