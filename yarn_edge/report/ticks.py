"""Ticks of an axis at round numbers, written without exponents; on an axis of tokens, at powers of two."""

from __future__ import annotations

import math
from typing import Any


def set_ticks(axis: Any, limits: tuple[float, float], log: bool, tokens: bool) -> None:
    """Set the ticks of a matplotlib axis. On an axis of tokens 1024 is written 1k."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    write = token_count if tokens else plain_number
    low, high = sorted(limits)
    axis.set_major_formatter(FuncFormatter(lambda value, _position: write(value)))
    axis.set_minor_locator(NullLocator())
    if tokens:
        axis.set_major_locator(FixedLocator(token_ticks(low, high, log)))
    elif log:
        ticks = log_ticks(low, high)
        axis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(10, steps=[1, 2, 5, 10]))


def plain_number(value: float) -> str:
    """1000 rather than 10^3; 2.5M; 0.001; 1e-05 below 0.0001."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.10g}"


def token_count(value: float) -> str:
    """512, 2k (2048), 1.5k (1536), 1M (1048576), 10000."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if abs(value) >= size and value % (size / 8) == 0:
            return f"{value / size:.10g}{unit}"
    return f"{value:.10g}"


def token_ticks(low: float, high: float, log: bool) -> list[float]:
    """At most ten ticks in [low, high]: powers of two, or on a linear axis multiples of a power of two."""
    if log:
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return [2.0**power for power in powers[:: math.ceil(len(powers) / 10) or 1]]
    step = max(1.0, 2.0 ** math.ceil(math.log2((high - low) / 9)))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers in [low, high]: powers of ten, or multiples of them by 1, 3 or by 1, 2, 5; [] if that is too few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**exponent for exponent in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 10)]
    return []
