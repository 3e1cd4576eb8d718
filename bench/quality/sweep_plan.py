"""What a sweep runs: for each value the scaling it stands for, and the pieces of a document that are evaluated with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_rules.rescale import with_factor
from yarn_edge.positions.scaling import RopeScaling

from ..scoring.variants import Variant, scaled
from ..scoring.windows import Window

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
class SweepRun:
    """One evaluation: a variant, and its windows."""

    variant: Variant
    windows: tuple[Window, ...]


def runs_of(value: Value, variant: Variant, windows: Sequence[Window], original: int, step: int) -> list[SweepRun]:
    """One run for a static value. For a dynamic one a run for each length beyond the original context, in steps, that scores
    what the step adds: at each length the angles are those of that length.
    """
    if not value.dynamic:
        return [SweepRun(scaled(variant, value.scaling(0)), tuple(windows))]
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
            found.append(SweepRun(scaled(variant, value.scaling(end)), tuple(part)))
        before = end
    return found
