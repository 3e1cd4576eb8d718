"""The memory bandwidth of this machine: the ceiling of everything that reads a model's weights once for each token.

Python threads, each around one NumPy call that releases the GIL, over arrays larger than any cache. Of the calls that were tried
(sums, maxima, dot products, comparisons of every type, libc's memchr), a bitwise or of 64-bit integers was as fast as the best: it
waited for memory only. The best of several passes counts, since other programs on the machine can only make a pass slower.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.machine import available_bytes

CACHES = Path("/sys/devices/system/cpu")
MIN_ARRAY_BYTES, MAX_ARRAY_BYTES = 256 << 20, 4 << 30
TIMES_THE_CACHE = 8  # size of an array; at most an eighth of it stays in a cache between two passes
UNKNOWN_CACHE_BYTES = 64 << 20  # if the system does not say: more than laptops have
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Words = npt.NDArray[np.int64]


class Work(NamedTuple):
    """The work of one thread: `warm` once, then `measure` repeatedly."""

    warm: Callable[[], object]
    measure: Callable[[], object]


def read_bandwidth(threads: int, seconds: float = 0.15, times_the_cache: float = TIMES_THE_CACHE) -> float:
    """Bytes per second that `threads` threads together read from memory: the best of all passes within `seconds`.

    times_the_cache: size of the array in caches. A smaller array is filled sooner, but may seem faster than memory is.
    Raises YarnEdgeError if there is not enough free memory for the arrays.
    """
    parts = _parts(threads, _array_bytes(1, times_the_cache))
    works = [Work(_filler(part), _reader(part)) for part in parts]
    return sum(part.nbytes for part in parts) / _best_pass(works, seconds)


def copy_bandwidth(threads: int, seconds: float = 0.15) -> float:
    """Bytes per second that `threads` threads copy, counting bytes read and written. Errors as in `read_bandwidth`."""
    n_bytes = _array_bytes(2)
    sources, targets = _parts(threads, n_bytes), _parts(threads, n_bytes)
    works = [Work(_filler(a, b), _copier(a, b)) for a, b in zip(sources, targets, strict=True)]
    return 2 * sum(part.nbytes for part in sources) / _best_pass(works, seconds)


def last_level_cache_bytes() -> int | None:
    """Size of all last-level caches together, in bytes; None if the system does not say (not Linux)."""
    sizes: dict[tuple[int, str], int] = {}
    try:
        for index in CACHES.glob("cpu[0-9]*/cache/index[0-9]*"):
            level, size, shared = ((index / n).read_text("ascii").strip() for n in ("level", "size", "shared_cpu_list"))
            sizes[int(level), shared] = int(size[:-1]) * _UNITS[size[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    last = max((level for level, _shared in sizes), default=0)
    return sum(n_bytes for (level, _shared), n_bytes in sizes.items() if level == last) or None


def _array_bytes(arrays: int, times_the_cache: float = TIMES_THE_CACHE) -> int:
    """Size of each of `arrays` arrays: much larger than the caches, and together at most a quarter of the free memory."""
    cache = last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
    wanted = min(max(MIN_ARRAY_BYTES, round(times_the_cache * cache)), MAX_ARRAY_BYTES)
    free = available_bytes()
    if arrays * wanted > free // 4:
        raise YarnEdgeError(
            f"measuring the memory bandwidth takes {arrays * wanted / 2**20:.0f} MiB, but a quarter of the free memory is "
            f"{free / 2**22:.0f} MiB: close other programs"
        )
    return wanted


def _parts(threads: int, n_bytes: int) -> list[Words]:
    """An array, cut for the threads. It is not touched yet, so that each part is placed near the thread that uses it."""
    return np.array_split(np.empty(n_bytes // 8, np.int64), threads)


def _filler(*parts: Words) -> Callable[[], object]:
    """Writes every page: pages never written are all one page of zeros, which stays in a cache."""

    def fill() -> None:
        for part in parts:
            part.fill(-2)

    return fill


def _reader(part: Words) -> Callable[[], object]:
    return lambda: np.bitwise_or.reduce(part)


def _copier(source: Words, target: Words) -> Callable[[], object]:
    return lambda: np.copyto(target, source)


def _best_pass(works: Sequence[Work], seconds: float) -> float:
    """Seconds of the fastest pass, from the start of the first thread to the end of the last."""
    began: list[float] = []  # when all threads started a pass
    spans: list[list[tuple[float, float]]] = [[] for _ in works]
    gate = threading.Barrier(len(works), action=lambda: began.append(time.perf_counter()))

    def work(number: int) -> None:
        warm, measure = works[number]
        warm()
        while True:
            gate.wait()
            if len(began) > 1 and began[-1] - began[0] > seconds:
                return
            start = time.perf_counter()
            measure()
            spans[number].append((start, time.perf_counter()))

    helpers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(works))]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()
    passes = zip(*spans, strict=True)
    lengths: list[float] = [max(end for _start, end in one) - min(start for start, _end in one) for one in passes]
    return min(lengths)
