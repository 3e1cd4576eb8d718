"""What adapters do to one weight of the base: products added, a magnitude, rows or the whole tensor replaced. Each is checked here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from yarn_edge.checkpoint.adapter_config import FLOAT32_MAX
from yarn_edge.errors import YarnEdgeError, one_line

from ..checkpoint import same_values
from ..stored import DTYPES, Tensor
from .parts import BIAS, MAGNITUDE, TOKENS, A, AdapterParts, B, ModuleParts
from .rows import (
    Factors,
    Floats,
    finite,
    finite_tensor,
    plus_product,
    plus_vector,
    stored_rows,
    view_of,
    with_column_norms,
    with_row_norms,
    with_rows,
)

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # whose rows are tokens: an adapter may bring more
_KEPT_FACTORS = 8  # threads work on a few neighboring weights at a time


@dataclass(frozen=True)
class Product:
    """scale * left @ right, to be added. factors: left (rows, rank), right (rank, width), in float32. alpha: of the adapter."""

    rank: int
    scale: float
    alpha: float
    factors: Factors


@dataclass
class WeightChange:
    """All that happens to one tensor, in this order. labels: the adapters' tensors, for messages.

    whole_from: the adapter that brings `whole`. magnitude: DoRA's lengths, of the columns if `of_columns`. tokens: (ids, a row
    for each).
    """

    whole: Tensor | None = None
    whole_from: Path | None = None
    products: list[Product] = field(default_factory=list)
    vectors: list[tuple[Tensor, float]] = field(default_factory=list)
    magnitude: Tensor | None = None
    of_columns: bool = False
    tokens: tuple[tuple[int, ...], Tensor] | None = None
    labels: list[str] = field(default_factory=list)

    def applied(self, base: Tensor) -> Tensor:
        """The base's tensor after the change. Shapes are checked before."""
        start = base if self.whole is None else replace(self.whole, name=base.name)
        what = f"{self.labels[0]}: merged with it, {one_line(base.name, 120)}" if self.labels else base.name
        if not (self.products or self.vectors or self.tokens):
            return start if self.whole is None else finite_tensor(start, what)
        rows = stored_rows(start)
        for product in self.products:
            rows = plus_product(rows, product.factors, product.scale)
        for vector, scale in self.vectors:
            rows = plus_vector(rows, stored_rows(vector), scale)
        if self.magnitude is not None and self.of_columns:
            rows = with_column_norms(rows, stored_rows(self.magnitude), *start.shape)
        elif self.magnitude is not None:
            rows = with_row_norms(rows, stored_rows(self.magnitude))
        if self.tokens is not None:
            rows = with_rows(rows, self.tokens[0], stored_rows(self.tokens[1]))
        return view_of(base.name, start.shape, finite(rows, what))


class Changes(dict[str, WeightChange]):
    """The changes of all adapters, by the name of the tensor. shared: as in `AdapterParts`."""

    def __init__(self, base: Mapping[str, Tensor], adapters: Sequence[AdapterParts]) -> None:
        super().__init__()
        self.shared: set[str] = set()
        self._base = base
        self._remembered = functools.lru_cache(maxsize=_KEPT_FACTORS)(lambda read: read())
        for parts in adapters:
            for name, tensor in parts.originals.items():
                if not same_values(tensor, self._original(parts, name, tensor)):
                    raise parts.error(tensor.name, "is not what the base has: the adapter belongs to another base")
            for name, tensor in parts.whole.items():
                self._replace(parts, name, tensor)
            for module, found in parts.modules.items():
                self._change(parts, module, found)

    def _of(self, parts: AdapterParts, name: str, tensor: Tensor) -> WeightChange:
        change = self.setdefault(name, WeightChange())
        change.labels.append(f"{parts.request.folder}: tensor {one_line(tensor.name, 120)}")
        return change

    def _original(self, parts: AdapterParts, name: str, tensor: Tensor) -> Tensor:
        """The base's tensor of this name."""
        if name not in self._base:
            raise parts.error(tensor.name, f"is for {one_line(name, 120)}, which the base does not have")
        original = self._base[name]
        if original.dtype not in DTYPES:
            raise parts.error(
                tensor.name,
                f"is for {one_line(name, 120)}, which the base keeps in {original.dtype}: take a base in floats",
            )
        return original

    def _replace(self, parts: AdapterParts, name: str, tensor: Tensor) -> None:
        """A tensor that was trained as a whole, or saved beside what was trained."""
        original = self._original(parts, name, tensor)
        if tensor.shape[1:] != original.shape[1:] or (tensor.shape != original.shape and name not in VOCABULARY):
            raise _other_base(parts, tensor, original)
        if same_values(tensor, original):
            return
        if parts.request.weight != 1 and name not in parts.shared:
            raise parts.error(
                tensor.name, f"is a whole tensor, which cannot be weighted by {parts.request.weight:g}: use 1"
            )
        change = self._of(parts, name, tensor)
        if len(change.labels) > 1:
            raise parts.error(tensor.name, f"replaces what {change.labels[0]} changes: merge these adapters one by one")
        change.whole, change.whole_from = tensor, parts.request.folder
        if name in parts.shared:
            self.shared.add(name)

    def _change(self, parts: AdapterParts, module: str, found: ModuleParts) -> None:
        """What an adapter has for one module."""
        name = f"{module}.weight"
        some = next(iter(found.tensors.values()))
        original = self._original(parts, name, some)
        change = self._of(parts, name, some)
        if change.whole is not None and change.whole_from != parts.request.folder:
            raise parts.error(some.name, f"changes what {change.labels[0]} replaces: merge these adapters one by one")
        if change.whole is not None and name not in parts.shared:
            raise parts.error(
                some.name,
                f"adds to a weight that {one_line(change.whole.name, 120)} of the same adapter replaces: keep one of them",
            )
        if TOKENS in found.tensors:
            change.tokens = self._tokens(parts, module, found, change)
            return
        if change.tokens is not None:
            raise parts.error(
                some.name, f"and {change.labels[0]} are of one weight: rows cannot be both trained and added to"
            )
        rank, scale = parts.config.scale_of(found.name)
        scale *= parts.request.weight
        if not abs(scale) <= FLOAT32_MAX:
            raise parts.config.file.error(
                "lora_alpha",
                f"and the weight {parts.request.weight:g} make a scale of {scale:g}, more than float32 holds",
            )
        product, embedding = self._product(parts, found, change.whole or original, rank, scale)
        magnitude = found.tensors.get(MAGNITUDE)
        if change.magnitude is not None or (magnitude is not None and change.products):
            raise parts.error(
                some.name, f"and {change.labels[0]} are of one weight, and one is DoRA: its lengths cannot be added"
            )
        change.products.append(product)
        if magnitude is not None:
            _check_magnitude(parts, magnitude, original.shape[1 if embedding else 0])
            change.magnitude, change.of_columns = magnitude, embedding
        if BIAS in found.tensors:
            self._bias(parts, module, found.tensors[BIAS], scale)

    def _bias(self, parts: AdapterParts, module: str, tensor: Tensor, scale: float) -> None:
        name = f"{module}.bias"
        original = self._original(parts, name, tensor)
        if tensor.shape != original.shape:
            raise _other_base(parts, tensor, original)
        self._of(parts, name, tensor).vectors.append((tensor, scale))

    def _tokens(
        self, parts: AdapterParts, module: str, found: ModuleParts, change: WeightChange
    ) -> tuple[tuple[int, ...], Tensor]:
        """The trained rows of an embedding."""
        values = found.tensors[TOKENS]
        original = change.whole or self._base[f"{module}.weight"]
        wanted = next((ids for name, ids in parts.config.tokens.items() if f".{module}".endswith(f".{name}")), ())
        if values.shape != (len(wanted), original.shape[1]) or max(wanted, default=0) >= original.shape[0]:
            raise parts.error(
                values.name,
                f"has the shape {list(values.shape)}, but trainable_token_indices names {len(wanted)} tokens up to "
                f"{max(wanted, default=0)}, and the base has {original.shape[0]} rows of {original.shape[1]}",
            )
        if len(found.tensors) > 1 or change.tokens is not None or change.products or parts.request.weight != 1:
            raise parts.error(values.name, f"are whole rows, which cannot be added to {change.labels[0]} or weighted")
        return wanted, values

    def _product(
        self, parts: AdapterParts, found: ModuleParts, original: Tensor, rank: int, scale: float
    ) -> tuple[Product, bool]:
        """(the product that a pair of matrices makes, whether it is of an embedding)."""
        a, b = found.one_of(A), found.one_of(B)
        if a is None or b is None:
            there = next(iter(found.tensors.values()))
            raise parts.error(
                there.name, f"has no {'lora_A' if a is None else 'lora_B'} beside it: save the adapter again"
            )
        embedding = "lora_embedding_A" in found.tensors
        if len(a.shape) != 2 or len(b.shape) != 2 or len(original.shape) != 2:
            raise parts.error(
                a.name, f"is of {list(a.shape)}, expected a matrix, for one: only linear layers can be merged"
            )
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise parts.error(
                a.name,
                f"and lora_B have rank {a.shape[0]} and {b.shape[1]}, but adapter_config.json says {rank} for it (r, rank_pattern)",
            )
        made = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
        if made != original.shape:
            raise _other_base(parts, a, original, f"makes {list(made)} with lora_B")
        return Product(
            rank, scale, parts.config.alpha, functools.partial(self._remembered, _reader(parts, a, b, embedding))
        ), embedding


def _reader(parts: AdapterParts, a: Tensor, b: Tensor, embedding: bool) -> Factors:
    def read() -> tuple[Floats, Floats]:
        values = a.float32(), b.float32()
        for tensor, array in zip((a, b), values, strict=True):
            if not np.isfinite(array).all():
                raise parts.error(tensor.name, "has values that are not finite numbers: the training diverged")
        first, second = values
        return (np.ascontiguousarray(first.T), np.ascontiguousarray(second.T)) if embedding else (second, first)

    return read


def _check_magnitude(parts: AdapterParts, magnitude: Tensor, n: int) -> None:
    if parts.request.weight != 1:
        raise parts.error(
            magnitude.name, f"is DoRA's lengths, which cannot be weighted by {parts.request.weight:g}: use 1"
        )
    if magnitude.shape != (n,):
        raise parts.error(magnitude.name, f"has the shape {list(magnitude.shape)}, expected {[n]}")


def _other_base(parts: AdapterParts, tensor: Tensor, original: Tensor, what: str = "") -> YarnEdgeError:
    of = parts.config.base and f" (it was trained on {one_line(parts.config.base, 100)})"
    return parts.error(
        tensor.name,
        f"{what or f'has the shape {list(tensor.shape)}'}, but {one_line(original.name, 120)} of the base is "
        f"{list(original.shape)}: the adapter belongs to another base{of}",
    )
