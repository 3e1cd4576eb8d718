"""Numbers between two bounds as grammars of digits. Bounded numbers have at most six digits after the point."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

PLACES = 6
_UNIT = 10**PLACES
MOST_INTEGER, MOST_NUMBER = 10**18, 10**9
INTEGER = '"-"? ("0" | [1-9] [0-9]{0,15})'
NUMBER = rf'{INTEGER} ("." [0-9]{{1,16}})? ([eE] [+\-]? [0-9]{{1,2}})?'


def integers(
    low: Fraction | int | None, high: Fraction | int | None, open_low: bool = False, open_high: bool = False
) -> str | None:
    """An expression for the whole numbers between bounds, as of `numbers`. Clipped to 18 digits."""
    if low is None and high is None:
        return INTEGER
    return _signed(low, high, open_low, open_high, 1, MOST_INTEGER, _naturals)


def numbers(low: Fraction | None, high: Fraction | None, open_low: bool, open_high: bool) -> str | None:
    """An expression for the numbers between bounds, which belong to it unless open; None if there is none."""
    if low is None and high is None:
        return NUMBER
    if (low is not None and low > MOST_NUMBER) or (high is not None and high < -MOST_NUMBER):
        return integers(low, high, open_low, open_high)
    return _signed(low, high, open_low, open_high, _UNIT, MOST_NUMBER * _UNIT, _fixed)


def _signed(
    low: Fraction | int | None,
    high: Fraction | int | None,
    open_low: bool,
    open_high: bool,
    unit: int,
    most: int,
    unsigned: Callable[[int, int], str],
) -> str | None:
    """What both have in common. unit: how many steps there are to 1; most: steps at which bounds are clipped; unsigned: writes the
    numbers from 0 <= its first argument to its second one, in steps.
    """
    first = -most if low is None else max(-most, math.floor(low * unit) + 1 if open_low else math.ceil(low * unit))
    last = most if high is None else min(most, math.ceil(high * unit) - 1 if open_high else math.floor(high * unit))
    ways = []
    if first < 0 and first <= last:
        ways.append(f'"-" ({unsigned(max(1, -last), -first)})')
    if last >= 0 and max(first, 0) <= last:
        ways.append(unsigned(max(first, 0), last))
    return " | ".join(ways) or None


def _naturals(low: int, high: int) -> str:
    """From 0 <= low to high."""
    ways = []
    for length in range(len(str(low)), len(str(high)) + 1):
        a = max(low, 10 ** (length - 1) if length > 1 else 0)
        b = min(high, 10**length - 1)
        ways.append(_between(str(a), str(b)))
    return " | ".join(ways)


def _between(a: str, b: str) -> str:
    """Digit strings of one length from a to b."""
    n = len(a)
    if set(a) == {"0"} and set(b) == {"9"}:
        return f"[0-9]{{{n}}}"
    if n == 1:
        return f"[{a}-{b}]"
    if a[0] == b[0]:
        return f'"{a[0]}" ({_between(a[1:], b[1:])})'
    ways, low, high = [], int(a[0]), int(b[0])
    if set(a[1:]) != {"0"}:
        ways.append(f'"{low}" ({_between(a[1:], "9" * (n - 1))})')
        low += 1
    if set(b[1:]) != {"9"}:
        high -= 1
    if low <= high:
        ways.append(f"[{low}-{high}] [0-9]{{{n - 1}}}")
    if high < int(b[0]):
        ways.append(f'"{b[0]}" ({_between("0" * (n - 1), b[1:])})')
    return " | ".join(ways)


def _fixed(first: int, last: int) -> str:
    """Numbers from 0 <= first to last, both in units of the last place."""
    (a, after_a), (b, after_b) = divmod(first, _UNIT), divmod(last, _UNIT)
    if a == b:
        return f"({_naturals(a, a)}) {_point(after_a, after_b)}"
    ways = [f"({_naturals(a, a)}) {_point(after_a, _UNIT - 1)}", f"({_naturals(b, b)}) {_point(0, after_b)}"]
    if b - a > 1:
        ways.append(f"({_naturals(a + 1, b - 1)}) {_point(0, _UNIT - 1)}")
    return " | ".join(ways)


def _point(low: int, high: int) -> str:
    digits = _places(f"{low:0{PLACES}}", f"{high:0{PLACES}}")
    return f'("." ({digits})){"" if low else "?"}'


def _places(a: str, b: str) -> str:
    """One to len(a) digits after the point, from a to b, where missing ones are zeros."""
    n = len(a)
    if set(a) == {"0"} and set(b) == {"9"}:
        return f"[0-9]{{1,{n}}}"
    if n == 1:
        return f"[{a}-{b}]"

    def after(digit: str, rest_a: str, rest_b: str) -> str:
        return f'"{digit}" ({_places(rest_a, rest_b)}){"" if int(rest_a) else "?"}'

    if a[0] == b[0]:
        return after(a[0], a[1:], b[1:])
    ways, low, high = [], int(a[0]), int(b[0])
    if int(a[1:]):
        ways.append(after(a[0], a[1:], "9" * (n - 1)))
        low += 1
    if set(b[1:]) != {"9"}:
        ways.append(after(b[0], "0" * (n - 1), b[1:]))
        high -= 1
    if low <= high:
        ways.append(f"[{low}-{high}] [0-9]{{0,{n - 1}}}")
    return " | ".join(ways)
