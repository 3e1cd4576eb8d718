"""Runs the inputs of a kind in processes of their own, under limits of time and memory, and counts what came out."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar

HANG_S = 5.0
MEMORY = 1 << 30  # beyond what the process holds and twice the input
TRACED = 20  # of one input in so many, every allocation is counted
# Python's objects for a string or a number of the file take some dozen times its bytes; gguf's tables are the rest.
ALLOWED_BYTES, ALLOWED_TIMES = 16 << 20, 64
_CHUNK = 500


@dataclass(frozen=True)
class Failure:
    """An input that did what no input may."""

    kind: str
    number: int
    what: str


@dataclass(frozen=True)
class Case:
    """An input: its size in bytes and what reads it. An action may return a word for the record in place of "read"."""

    size: int
    action: Callable[[], str | None]


class Kind(Protocol):
    """Inputs of one kind. name: in records and of the random numbers; in_process: whether allocations of an action are its own."""

    name: str
    in_process: bool

    def case(self, rng: random.Random, scratch: Path) -> Case:
        """The input of these random numbers. scratch: a folder of this process."""
        ...


class _Hang(BaseException):
    pass


def one(kind: Kind, seed: int, number: int, scratch: Path) -> tuple[str, Failure | None]:
    """(outcome, failure) of one input."""
    rng = random.Random(f"{seed}-{kind.name}-{number}")
    case = kind.case(rng, scratch)
    traced = kind.in_process and number % TRACED == 0

    def fails(what: str) -> Failure:
        return Failure(kind.name, number, what)

    def ring(_signal: int, _frame: object) -> None:
        raise _Hang

    previous = signal.signal(signal.SIGALRM, ring)
    if traced:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    used = 0
    try:
        with _memory_limit(2 * case.size):
            outcome = case.action() or "read"
    except YarnEdgeError as error:
        outcome = "refused"
        if not str(error).isprintable():
            return outcome, fails(f"a message that is not one printable line: {str(error)[:100]!r}")
    except _Hang:
        return "hang", fails(f"took over {HANG_S:g} s")
    except BaseException as error:
        return "exception", fails(f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if traced:
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if used > ALLOWED_BYTES + ALLOWED_TIMES * case.size:
        return outcome, fails(f"allocated {used} bytes for an input of {case.size}")
    return outcome, None


class _memory_limit:
    """RLIMIT_AS while open: what the process has, and MEMORY more. Past it, allocations fail."""

    def __init__(self, more: int) -> None:
        self.more = more

    def __enter__(self) -> None:
        with suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            self.before = resource.getrlimit(resource.RLIMIT_AS)
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY + self.more
            resource.setrlimit(resource.RLIMIT_AS, (limit, self.before[1]))

    def __exit__(self, *_error: object) -> None:
        with suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(resource.RLIMIT_AS, self.before)


def run(
    kind: Kind, n_inputs: int, seed: int, scratch: Path, n_workers: int, first: int = 0
) -> tuple[Counter[str], list[Failure], float]:
    """Inputs first … first + n_inputs - 1. Returns (outcomes, failures, the longest in seconds)."""
    context = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    longest = 0.0
    numbers = [range(at, min(at + _CHUNK, first + n_inputs)) for at in range(first, first + n_inputs, _CHUNK)]
    with bar(f"Fuzzing: {kind.name}", n_inputs) as advance:
        running: list[tuple[Any, Any, Any, range]] = []
        while numbers or running:
            while numbers and len(running) < n_workers:
                chunk = numbers.pop(0)
                results, at = context.SimpleQueue(), context.Value("q", -1)
                process = context.Process(target=_chunk, args=(kind, seed, chunk, scratch, results, at))
                process.start()
                running.append((process, results, at, chunk))
            process, results, at, chunk = running.pop(0)
            if process.is_alive() and results.empty():
                running.append((process, results, at, chunk))
                process.join(0.02)
                continue
            if results.empty():
                failures.append(Failure(kind.name, at.value, f"ended the process (exit code {process.exitcode})"))
                counts["ended the process"] += 1
                numbers.insert(0, range(at.value + 1, chunk.stop))
            else:
                found, failed, slowest = results.get()
                counts += found
                failures += failed
                longest = max(longest, slowest)
            process.join()
            advance(len(chunk))
    return counts, failures, longest


def _chunk(kind: Kind, seed: int, numbers: range, scratch: Path, results: Any, at: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # notes
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    own = scratch / f"{kind.name}-{os.getpid()}".replace(" ", "-")
    own.mkdir()
    slowest = 0.0
    for number in numbers:
        at.value = number
        began = time.monotonic()
        outcome, failure = one(kind, seed, number, own)
        slowest = max(slowest, time.monotonic() - began)
        counts[outcome] += 1
        if failure is not None:
            failures.append(failure)
    results.put((counts, failures, slowest))
