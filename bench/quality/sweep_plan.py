"""What a sweep runs: for each value the scaling it stands for, and the pieces of the documents that are evaluated with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_rules.rescale import with_factor
from yarn_edge.positions.scaling import RopeScaling

from ..scoring.variants import Variant, scaled
from ..scoring.windows import Window

OVER = ("attention-factor", "factor", "method")
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
    """One value of a sweep. number: the value itself, None for methods; scaling: what to run for a document of N tokens."""

    label: str
    number: float | None
    scaling: Callable[[int], RopeScaling]
    dynamic: bool = False


def values_of(over: str, base: RopeScaling, texts: Sequence[str] | None, ctx: int) -> list[Value]:
    """The values that `texts` name, or the defaults for None. Raises YarnEdgeError for what cannot be swept."""
    if over == "method":
        factor = base.factor if base.factor > 1 else ctx / base.original_context
        if factor <= 1:
            raise YarnEdgeError(
                f"--over method: the context of {ctx} tokens is not beyond the original {base.original_context}: pass a longer "
                "--ctx, or --yarn-factor"
            )
        return method_values(base, texts, factor)
    try:
        numbers = None if texts is None else sorted({float(t) for t in texts})
    except ValueError:
        raise YarnEdgeError(f"--values: {','.join(texts or ())!r} are not numbers") from None
    if numbers is not None and not all(0 < n < 1e6 for n in numbers):
        raise YarnEdgeError("--values: they must be above 0")
    if over == "factor" and numbers is not None and numbers[0] < 1:
        raise YarnEdgeError(f"--values: a factor of {numbers[0]:g} is below 1, which is plain RoPE")
    return attention_values(base, numbers) if over == "attention-factor" else factor_values(base, numbers, ctx)


def attention_values(base: RopeScaling, values: Sequence[float] | None) -> list[Value]:
    """Values of the attention factor A, by default around the paper's (A.2)."""
    if base.method != "yarn":
        raise YarnEdgeError("--over attention-factor needs YaRN: the file has none, so pass --yarn-factor")
    if values is None:
        reach = max(0.1, base.default_attention_factor - 1)
        grid = base.default_attention_factor + reach * np.linspace(-1, 1, 9)
        values = sorted({*np.round(grid, 4).tolist(), round(base.attention_factor, 4)})
    return [Value(f"{v:g}", v, lambda _n, v=v: replace(base, attention_factor=float(v))) for v in values]  # type: ignore[misc]


def factor_values(base: RopeScaling, values: Sequence[float] | None, ctx: int) -> list[Value]:
    """Values of the factor s, by default from plain RoPE to the file's own: what static YaRN costs short texts."""
    if values is None:
        most, doubled = max(base.factor, ctx / base.original_context, 2.0), [1.0]
        while doubled[-1] * 2 <= most:
            doubled.append(doubled[-1] * 2)
        values = sorted({*doubled, base.factor})
    return [Value(f"{v:g}", v, lambda _n, v=v: with_factor(base, v)) for v in values]  # type: ignore[misc]


def method_values(base: RopeScaling, names: Sequence[str] | None, factor: float) -> list[Value]:
    """The paper's methods at one factor; dynamic ones at the factor of each length."""
    values = []
    for name in names or DEFAULT_METHODS:
        if name not in METHODS:
            raise YarnEdgeError(f"--values: {name!r} is unknown; known: {', '.join(METHODS)}")
        method, own_attention = METHODS[name]

        def at(length: int, name: str = name, method: str = method, own: bool = own_attention) -> RopeScaling:
            needed = length / base.original_context if name in DYNAMIC else factor
            return with_factor(base, needed, method, own)

        values.append(Value(name, None, at, name in DYNAMIC))
    return values


@dataclass(frozen=True)
class SweepRun:
    """One evaluation: a variant, and its windows."""

    variant: Variant
    windows: tuple[Window, ...]


def runs_of(value: Value, variant: Variant, windows: Sequence[Window], original: int, step: int) -> list[SweepRun]:
    """One run for a static value. A dynamic value has a run for each length beyond the original context, `step` tokens apart; each
    run scores what the step adds, so that at each length the angles are those of that length.
    """
    if not value.dynamic:
        return [SweepRun(scaled(variant, value.scaling(0)), tuple(windows))]
    longest = max(len(w.tokens) for w in windows)
    ends = [min(original, longest), *range(original + step, longest, step)]
    ends += [longest] if longest > ends[-1] else []
    runs, before = [], 1
    for end in ends:
        part = [
            Window(w.document, w.start, w.tokens[:end], max(w.first, before)) for w in windows if len(w.tokens) > before
        ]
        part = [w for w in part if w.n_scored > 0]
        if part:
            runs.append(SweepRun(scaled(variant, value.scaling(end)), tuple(part)))
        before = end
    return runs
