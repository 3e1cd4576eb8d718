"""The sizes of a model, by the names that rows use for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """A size that only some families have. keys: of the config, any of which may state it. gguf: its key `{arch}.{gguf}`, if any.

    optional: null is no error, but 0 and no key; so is an absent key, if the family has no default for it.
    """

    keys: tuple[str, ...]
    gguf: str = ""
    optional: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """The hyper-parameters that determine the shapes of the tensors.

    others: those of `Size`, by name. by_layer: sizes that differ by layer, one number for each; in the field is then the largest.
    """

    n_layer: int
    hidden: int
    ffn: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab: int
    others: Mapping[str, int] = field(default_factory=dict)
    by_layer: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def in_layer(self, layer: int | None) -> ModelSizes:
        """The sizes of one layer."""
        if layer is None or not self.by_layer:
            return self
        here: dict[str, Any] = {name: numbers[layer] for name, numbers in self.by_layer.items()}
        return replace(self, **here, by_layer={})

    def dimension(self, expression: str) -> int:
        """A dimension as rows write it: names and numbers with * and +, "q+2*kv"; a quotient in one word, "a/b". A name is a field,
        one of `others`, or q or kv: the values of all heads."""
        return sum(math.prod(map(self._factor, term.split("*"))) for term in expression.split("+"))

    def _factor(self, name: str) -> int:
        if name.isdecimal():
            return int(name)
        if "/" in name:
            whole, _, parts = name.partition("/")
            return self._factor(whole) // self._factor(parts)
        if name in ("q", "kv"):
            return self.head_dim * (self.n_head if name == "q" else self.n_kv_head)
        return self.others[name] if name in self.others else int(getattr(self, name))
