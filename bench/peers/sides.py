"""Contexts of one loaded model that take turns behind the same cached tokens, and what a side's turns say next to another's."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.progress import bar
from yarn_edge.report.report import Table
from yarn_edge.report.tables import table_text
from yarn_edge.runtime.context import Context

from ..speed.rank_test import not_rejected

GENERATING, DRAFTS, READING = "generating", "checking drafts", "reading"
N_GENERATED, N_DRAFTS, N_READ = 32, 8, 512


def turn_seconds(context: Context, tokens: list[int], depth: int, test: str, n: int) -> float:
    """Seconds of a turn: n tokens from `depth` on, one by one or at once; drafts all get logits."""
    context.keep(depth)
    start = time.perf_counter()
    if test == GENERATING:
        for at in range(depth, depth + n):
            context.evaluate([tokens[at]], at)
    else:
        context.evaluate(tokens[depth : depth + n], depth, "all" if test == DRAFTS else "last")
    return time.perf_counter() - start


def turns(
    sides: Mapping[str, Context], tokens: list[int], depth: int, test: tuple[str, int], repeat: int
) -> dict[str, list[float]]:
    """Seconds of every side's turns after a warm-up, in an order that turns round each time."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    name_of_test, n = test
    with bar(f"{name_of_test} {n} behind {depth}", repeat) as advance:
        for i in range(repeat + 1):
            for name in list(sides) if i % 2 else list(sides)[::-1]:
                took = turn_seconds(sides[name], tokens, depth, name_of_test, n)
                if i:
                    seconds[name].append(took)
            if i:
                advance(1)
    return seconds


def compared(first: list[float], own: list[float]) -> dict[str, float]:
    """The median of first / own by turns, and its interval (sign test, 95 %)."""
    ratios = [a / b for a, b in zip(first, own, strict=True)]
    sign_test = [math.comb(len(ratios), k) / 2 ** len(ratios) for k in range(len(ratios) + 1)]
    low, high = not_rejected(sorted(ratios), sign_test) or (min(ratios), max(ratios))
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def copy_cache(source: Context, target: Context, n: int, *, transposed: bool) -> None:
    """Fill `target` with the n cached tokens of `source`. transposed: it keeps values by column, as plain attention wants them."""
    api, size = source.api, source.api.llama_state_seq_get_size(source.handle, 0)
    state = np.empty(size, np.uint8)
    api.llama_state_seq_get_data(source.handle, state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), size, 0)
    if transposed:
        state = _transposed(state)
    target.clear()
    data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if not api.llama_state_seq_set_data(target.handle, data, len(state), 0):
        raise RuntimeError(f"a state of {n} tokens cannot be copied")


def _transposed(state: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A state of a half-precision cache with its values by column (llama-kv-cache.cpp, state_write_data)."""
    at, parts = 0, []

    def take(n_bytes: int) -> npt.NDArray[np.uint8]:
        nonlocal at
        at += n_bytes
        return state[at - n_bytes : at]

    def word() -> int:
        return int(take(4).view(np.uint32)[0])

    parts.append(take(12))  # magic, sequence, streams
    cells = word()
    parts += [state[at - 4 : at], take(12 * cells)]  # position, sequences, extension of each cell
    if word():
        raise RuntimeError("the values are by column already")
    layers = word()
    parts += [np.array([1, layers], np.uint32).view(np.uint8)]
    for _ in range(layers):
        head = take(12)
        parts += [head, take(int(head[4:].view(np.uint64)[0]) * cells)]
    for _ in range(layers):
        head = take(12)
        row = int(head[4:].view(np.uint64)[0])
        values = take(row * cells).view(np.uint16).reshape(cells, row // 2)
        parts += [head[:4], np.array([2, row // 2], np.uint32).view(np.uint8)]
        parts.append(np.ascontiguousarray(values.T).view(np.uint8).reshape(-1))
    parts.append(state[at:])
    return np.concatenate(parts)


def generating_and_reading(
    sides: Mapping[str, Context], tokens: list[int], depth: int, repeat: int
) -> Iterator[dict[str, Any]]:
    """A row for each of the two tests and each side, behind `depth` tokens that every side reads first; ratios are to the first side."""
    for context in sides.values():
        context.clear()
        context.evaluate(tokens[:depth] or tokens[:1], 0, "none")
    for test, n in ((GENERATING, N_GENERATED), (READING, N_READ)):
        seconds = turns(sides, tokens, depth, (test, n), repeat)
        first = seconds[next(iter(sides))]
        for name, own in seconds.items():
            yield row(f"{test} {n}", depth, name, n, own, compared(first, own))


def row(test: str, depth: int, name: str, n: int, seconds: list[float], ratio: Mapping[str, float]) -> dict[str, Any]:
    """A line of results."""
    return {"test": test, "depth": depth, "side": name, "tok_per_s": n / statistics.median(seconds), **ratio}


def rows_text(rows: Sequence[Mapping[str, Any]], side: str, ratio: str) -> str:
    """A line for each row. side, ratio: headings of these columns."""
    columns = {"test": "test", "depth": "depth", "side": side, "tok_per_s": "tok/s", "ratio": ratio}
    columns |= {"low": "from", "high": "to (95 %)"}
    cells = tuple(tuple(each[key] for key in columns) for each in rows)
    return table_text(Table("", tuple(columns.values()), cells, digits=4))
