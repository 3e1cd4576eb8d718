"""What a sweep runs: for each value the scaling it stands for, and the pieces of a document that are evaluated with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from yarn_edge.convert.patch import from_file
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf_file import GGUFFile
from yarn_edge.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor

from .variants import Variant, scaled
from .windows import Window

# name -> (RopeScaling method, whether A is YaRN's); the paper's sections 2.2 to 3.4 and B.3
METHODS: dict[str, tuple[str, bool]] = {
    "plain": ("none", False),
    "pi": ("linear", False),
    "ntk": ("ntk", False),
    "ntk-by-parts": ("ntk-by-parts", False),
    "yarn": ("yarn", True),
    "dynamic-ntk": ("ntk", False),
    "dynamic-yarn": ("yarn", True),
}
DYNAMIC = ("dynamic-ntk", "dynamic-yarn")
DEFAULT_METHODS = ("plain", "pi", "ntk", "ntk-by-parts", "yarn")


@dataclass(frozen=True)
class Value:
    """One value of a sweep. number: itself, None for methods; scaling: what to run for a document of so many tokens."""

    label: str
    number: float | None
    scaling: Callable[[int], RopeScaling]
    dynamic: bool = False


def base_scaling(file: GGUFFile, overrides: Mapping[str, Any]) -> RopeScaling:
    """The file's own scaling with `overrides` on top; a file without one is taken at its context_length as the original.

    Raises YarnEdgeError where there is nothing to sweep around: frequency tables, a softmax factor of its own.
    """
    given = dict(overrides)
    if not given.keys() >= {"factor", "original_context"}:
        own: RopeScaling = from_file(file, {})
        if given and own.method != "yarn":
            given.setdefault("original_context", own.original_context)
            given.setdefault("factor", max(1.0, own.factor))
    found: RopeScaling = from_file(file, given)
    if found.frequency_factors is not None and not all(abs(f - 1) <= SAME_RELATIVE for f in found.frequency_factors):
        raise YarnEdgeError(
            f"{file.path}: its frequencies come from a table (Llama 3, LongRoPE): no other can be put in its place"
        )
    if abs(found.softmax_factor - 1) > SAME_RELATIVE:
        raise YarnEdgeError(
            f"{file.path}: its softmax factor {found.softmax_factor:.6g} belongs to its own factor: it cannot be swept"
        )
    return found


def with_factor(base: RopeScaling, factor: float, method: str = "yarn", own_attention: bool = True) -> RopeScaling:
    """Another method or factor around the same base and original context.

    A is the method's own default; of YaRN times what the base's A is of the default for its own factor.
    """
    if factor <= 1 or method == "none":
        return replace(base, method="none", factor=1.0, attention_factor=1.0)
    ratio = base.attention_factor / base.default_attention_factor if base.method == "yarn" else 1.0
    attention = yarn_attention_factor(factor) * ratio if own_attention else 1.0
    return replace(base, method=method, factor=float(factor), attention_factor=attention)  # type: ignore[arg-type]


def attention_values(base: RopeScaling, values: Sequence[float] | None) -> list[Value]:
    """A itself, around the default (the paper's A.2)."""
    if base.method != "yarn":
        raise YarnEdgeError("--over attention-factor needs YaRN: the file has none, so give --yarn-factor")
    if values is None:
        reach = max(0.1, base.default_attention_factor - 1)
        grid = base.default_attention_factor + reach * np.linspace(-1, 1, 9)
        values = sorted({*np.round(grid, 4).tolist(), round(base.attention_factor, 4)})
    return [Value(f"{v:g}", v, lambda _n, v=v: replace(base, attention_factor=float(v))) for v in values]  # type: ignore[misc]


def factor_values(base: RopeScaling, values: Sequence[float] | None, ctx: int) -> list[Value]:
    """s, from plain RoPE to the file's own: the price that short texts pay for static YaRN."""
    if values is None:
        most, found = max(base.factor, ctx / base.original_context, 2.0), [1.0]
        while found[-1] * 2 <= most:
            found.append(found[-1] * 2)
        values = sorted({*found, base.factor})
    return [Value(f"{v:g}", v, lambda _n, v=v: with_factor(base, v)) for v in values]  # type: ignore[misc]


def method_values(base: RopeScaling, names: Sequence[str] | None, factor: float) -> list[Value]:
    """The paper's methods at one factor; dynamic ones at the factor of each length."""
    found = []
    for name in names or DEFAULT_METHODS:
        if name not in METHODS:
            raise YarnEdgeError(f"--values: {name!r} is unknown; known: {', '.join(METHODS)}")
        method, own_attention = METHODS[name]

        def at(length: int, name: str = name, method: str = method, own: bool = own_attention) -> RopeScaling:
            needed = length / base.original_context if name in DYNAMIC else factor
            return with_factor(base, needed, method, own)

        found.append(Value(name, None, at, name in DYNAMIC))
    return found


@dataclass(frozen=True)
class Run:
    """One evaluation: a variant, and its windows."""

    variant: Variant
    windows: tuple[Window, ...]


def runs_of(value: Value, variant: Variant, windows: Sequence[Window], original: int, step: int) -> list[Run]:
    """One run for a static value. For a dynamic one a run for each length beyond the original context, in steps, that scores
    what the step adds: at each length the angles are those of that length.
    """
    if not value.dynamic:
        return [Run(scaled(variant, value.scaling(0)), tuple(windows))]
    longest = max(len(w.tokens) for w in windows)
    ends = [min(original, longest), *range(original + step, longest, step)]
    ends += [longest] if longest > ends[-1] else []
    found, before = [], 1
    for end in ends:
        part = [
            Window(w.document, w.start, w.tokens[:end], max(w.first, before)) for w in windows if len(w.tokens) > before
        ]
        part = [w for w in part if w.n_scored > 0]
        if part:
            found.append(Run(scaled(variant, value.scaling(end)), tuple(part)))
        before = end
    return found
