"""`RopeScaling`: one frozen description of how a model's positions are scaled.

All of yarn-edge describes positions by this one value: config dialects are parsed into it, the NumPy reference computes
from it, GGUF metadata is written from it and read back into it, and the checks compare it. Symbols are the paper's
(arXiv 2309.00071): base b = `rope_theta`, rotated dimensions D = `dim`, original context L = `original_context`, factor
s = `factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from yarn_edge.errors import YarnEdgeError

Method = Literal["none", "linear", "ntk", "ntk-by-parts", "yarn", "dynamic-ntk", "dynamic-yarn", "llama3", "longrope"]
Ramp = Literal["index", "turns"]

METHODS: tuple[Method, ...] = get_args(Method)
DYNAMIC_METHODS: frozenset[Method] = frozenset({"dynamic-ntk", "dynamic-yarn"})
# Plain RoPE with frequencies divided by a table, pair by pair.
TABLE_METHODS: frozenset[Method] = frozenset({"llama3", "longrope"})
RAMPED_METHODS: frozenset[Method] = frozenset({"ntk-by-parts", "yarn", "dynamic-yarn"})

# Scalings are the same if their fields agree to this relative difference: GGUF stores them as float32 (2^-24 = 6e-8).
SAME_RELATIVE = 1e-6

# Far beyond any model, yet small enough that no formula over the fields overflows or allocates without bound.
MAX_NUMBER = 1e15
MAX_DIM = 1 << 16
MAX_CONTEXT = (1 << 31) - 1  # ggml keeps the original context in an int32

_POSITIVE = ("rope_theta", "beta_fast", "beta_slow", "attention_factor", "softmax_factor")
_NUMBERS = ("rope_theta", "factor", "ext_factor", "beta_fast", "beta_slow", "attention_factor", "softmax_factor")
# Fields that few scalings have, with the value that means nothing: a description leaves them out then.
OPTIONAL: dict[str, Any] = {
    "finetuned": None,
    "frequency_factors": None,
    "softmax_factor": 1.0,
    "declared_context": None,
}


def yarn_attention_factor(factor: float, log_multiplier: float = 0.1) -> float:
    """A = log_multiplier * ln(s) + 1, the paper's section 3.4; 1 for s <= 1 (as in transformers and llama.cpp)."""
    return 1.0 if factor <= 1 else log_multiplier * math.log(factor) + 1.0


def _same_tables(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=SAME_RELATIVE) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class RopeScaling:
    """How positions become angles, complete and explicit: no field means "the default".

    attention_factor: A itself, the multiplier of cos and sin (so attention logits get A squared). It is *not* the multiplier
    that llama.cpp and the Nous code call `attn_factor`.
    frequency_factors: shape (D/2,). After the method, each pair's frequency is divided by its factor (the tensor
    `rope_freqs.weight` of a GGUF, Llama 3's rule, LongRoPE's tables).
    softmax_factor: multiplies attention logits in addition to A squared (DeepSeek: m(mscale_all_dim) squared).
    declared_context: the context in tokens that the model's makers state, if it is shorter than L * s. It changes no angle.
    provenance: where the value of each field came from, such as "config.json: rope_scaling.factor".

    The constructor raises YarnEdgeError for a value that makes no sense; the message names the field and its source.
    """

    method: Method
    rope_theta: float
    dim: int
    original_context: int
    factor: float = 1.0
    ext_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    ramp: Ramp = "index"
    finetuned: bool | None = None
    frequency_factors: tuple[float, ...] | None = None
    softmax_factor: float = 1.0
    declared_context: int | None = None
    provenance: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise YarnEdgeError(f"{self.source('method')}: unknown rope scaling method {self.method!r}")
        if not isinstance(self.ramp, str) or self.ramp not in get_args(Ramp):
            raise YarnEdgeError(f"{self.source('ramp')}: unknown ramp {self.ramp!r}, expected index or turns")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise YarnEdgeError(f"{self.source(name)}: {name} is {value!r}, not a finite number")
            if abs(value) > MAX_NUMBER:
                raise YarnEdgeError(f"{self.source(name)}: {name} is {value!r}, must be at most {MAX_NUMBER:g}")
        for name in _POSITIVE:
            if getattr(self, name) < 1 / MAX_NUMBER:
                raise YarnEdgeError(f"{self.source(name)}: {name} is {getattr(self, name)!r}, must be above 0")
        for name, limit in (("dim", MAX_DIM), ("original_context", MAX_CONTEXT)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise YarnEdgeError(f"{self.source(name)}: {name} is {value!r}, not a whole number")
            if not 0 < value <= limit:
                raise YarnEdgeError(f"{self.source(name)}: {name} is {value!r}, must be from 1 to {limit}")
        self._check_declared_context()
        for name in ("truncate", "finetuned"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "finetuned" and value is None):
                raise YarnEdgeError(f"{self.source(name)}: {name} is {value!r}, not true or false")
        if self.dim < 2 or self.dim % 2:
            raise YarnEdgeError(f"{self.source('dim')}: dim is {self.dim}; rotated dimensions come in pairs")
        self._check_frequency_factors()
        if self.rope_theta <= 1:
            raise YarnEdgeError(f"{self.source('rope_theta')}: rope_theta is {self.rope_theta!r}, must be above 1")
        if self.factor < 1:
            raise YarnEdgeError(
                f"{self.source('factor')}: factor is {self.factor!r}, below 1; it is the new context / the original context"
            )
        if self.original_context * self.factor > MAX_CONTEXT:
            raise YarnEdgeError(
                f"{self.source('factor')}: factor {self.factor!r} extends {self.original_context} tokens beyond {MAX_CONTEXT}"
            )
        if self.method == "none" and self.factor != 1:
            raise YarnEdgeError(f"{self.source('factor')}: factor {self.factor!r} without a scaling method")
        if not 0 <= self.ext_factor <= 1:
            hint = " (it looks like the factor itself)" if self.ext_factor == self.factor else ""
            raise YarnEdgeError(
                f"{self.source('ext_factor')}: ext_factor is {self.ext_factor!r}, a mix from 0 to 1{hint}"
            )
        if self.beta_fast < self.beta_slow:  # equal betas make a step: Kimi K2 has 1 and 1
            raise YarnEdgeError(
                f"{self.source('beta_fast')}: beta_fast {self.beta_fast!r} must not be below beta_slow {self.beta_slow!r}"
            )

    def _check_declared_context(self) -> None:
        value, most = self.declared_context, self.original_context * self.factor
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not self.original_context <= value <= most:
            raise YarnEdgeError(
                f"{self.source('declared_context')}: declared_context is {value!r}, must be a whole number from the original context "
                f"{self.original_context} to the extended one {most:g}"
            )

    def _check_frequency_factors(self) -> None:
        factors, where = self.frequency_factors, self.source("frequency_factors")
        if factors is None:
            if self.method in TABLE_METHODS:
                raise YarnEdgeError(f"{where}: {self.method} needs a factor for each of {self.dim // 2} pairs")
            return
        if not isinstance(factors, tuple) or len(factors) != self.dim // 2:
            have = len(factors) if isinstance(factors, tuple) else type(factors).__name__
            raise YarnEdgeError(f"{where}: {have} frequency factors for {self.dim // 2} pairs")
        for pair, value in enumerate(factors):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 1 / MAX_NUMBER < value < MAX_NUMBER
            ):
                raise YarnEdgeError(
                    f"{where}: the frequency factor of pair {pair} is {value!r}, expected a number above 0"
                )

    def source(self, name: str) -> str:
        """Where the value of field `name` came from, for messages."""
        return self.provenance.get(name, name)

    @property
    def extended_context(self) -> int:
        """L' = L * s in tokens, rounded to the nearest token, or the shorter context that the model's makers state."""
        if self.declared_context is not None:
            return self.declared_context
        return round(self.original_context * self.factor)

    @property
    def default_attention_factor(self) -> float:
        """The A that the method itself prescribes: 0.1 ln s + 1 for YaRN, 1 otherwise."""
        return yarn_attention_factor(self.factor) if self.method in ("yarn", "dynamic-yarn") else 1.0

    @property
    def is_static(self) -> bool:
        """Whether the angles of a position do not depend on the current length."""
        return self.method not in DYNAMIC_METHODS

    def effective_fields(self) -> dict[str, Any]:
        """The fields that change an angle under this method, so that descriptions are compared by their effect."""
        plain = self.method == "none" or self.method in TABLE_METHODS
        fields: dict[str, Any] = {"rope_theta": self.rope_theta, "dim": self.dim}
        fields["method"] = "none" if plain else self.method
        if not plain:
            fields["factor"] = self.factor
        if self.frequency_factors is not None:
            fields["frequency_factors"] = self.frequency_factors
        if self.method in RAMPED_METHODS:
            for name in ("original_context", "ext_factor", "beta_fast", "beta_slow", "truncate", "ramp"):
                fields[name] = getattr(self, name)
        if self.method == "dynamic-ntk":
            fields["original_context"] = self.original_context
        fields["attention_factor"], fields["softmax_factor"] = self.attention_factor, self.softmax_factor
        return fields

    def differences(self, other: RopeScaling) -> dict[str, tuple[Any, Any]]:
        """The fields by which two descriptions compute different angles, as {field: (self, other)}; empty if they run alike."""
        mine, theirs = self.effective_fields(), other.effective_fields()
        differing: dict[str, tuple[Any, Any]] = {}
        for name in mine.keys() | theirs.keys():
            a, b = mine.get(name), theirs.get(name)
            if isinstance(a, tuple) and isinstance(b, tuple):
                if not _same_tables(a, b):
                    differing[name] = (a, b)
            elif (
                isinstance(a, (int, float))
                and isinstance(b, (int, float))
                and (isinstance(a, float) or isinstance(b, float))
            ):
                if not math.isclose(a, b, rel_tol=SAME_RELATIVE):
                    differing[name] = (a, b)
            elif a != b:
                differing[name] = (a, b)
        return differing

    def with_overrides(self, source: str, **values: Any) -> RopeScaling:
        """A copy with `values`, whose provenance is `source`."""
        return replace(self, **values, provenance={**self.provenance, **dict.fromkeys(values, source)})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the provenance; OPTIONAL fields only if they mean something."""
        names = [n for n in self.__dataclass_fields__ if n != "provenance"]
        fields = {n: getattr(self, n) for n in names if n not in OPTIONAL or getattr(self, n) != OPTIONAL[n]}
        return fields | {"provenance": dict(self.provenance)}
