"""A unit of work, what it gives, and what a worker does with it. This module is all that an executor sends by name.

A worker computes one unit at a time and keeps what it opened for the next one: with the same key, nothing is loaded again.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar, cast

import numpy.typing as npt

from yarn_edge import __version__
from yarn_edge.errors import YarnEdgeBug, YarnEdgeError, as_ours
from yarn_edge.progress import set_quiet

T = TypeVar("T")


@dataclass(frozen=True)
class UnitResult:
    """What a unit gives. arrays: by name; facts: values that JSON holds; earlier: whether an earlier run computed it."""

    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    earlier: bool = False


@dataclass(frozen=True)
class Unit:
    """One unit: `work(*arguments)`, which any worker computes to the same digits.

    work: a public function of a module. key: SHA-256 of what determines the result. label: for people. cost: for the progress
    bar, in tokens.
    """

    work: Callable[..., UnitResult]
    arguments: tuple[Any, ...]
    key: str
    label: str
    cost: int


@dataclass(frozen=True)
class Attempt:
    """A unit that came back from a worker: with a result, or with the message of an error. worker: host and process."""

    worker: str
    result: UnitResult | None
    error: str = ""
    bug: bool = False

    def unwrap(self) -> UnitResult:
        """The result. Raises YarnEdgeError, naming the worker."""
        if self.result is None:
            raise (YarnEdgeBug if self.bug else YarnEdgeError)(f"worker {self.worker}: {self.error}")
        return self.result


_working = threading.Lock()  # a worker of Dask may have several threads
_kept: list[tuple[object, object, ExitStack]] = []


def kept_open(key: object, open_it: Callable[[], AbstractContextManager[T]]) -> T:
    """What `open_it` opens, kept until another key is asked for."""
    if _kept and _kept[0][0] == key:
        return cast(T, _kept[0][1])
    close_kept()
    with ExitStack() as stack:
        opened = stack.enter_context(open_it())
        _kept.append((key, opened, stack.pop_all()))
    return opened


def close_kept() -> None:
    """Close what is kept."""
    while _kept:
        _kept.pop()[2].close()


def software() -> str:
    """The versions that decide on digits."""
    return f"yarn-edge {__version__} and llama-cpp-python {version('llama-cpp-python')}"


def attempt(units: Sequence[Unit], wanted: str) -> list[Attempt]:
    """On a worker: compute the units. Errors are returned, because each executor changes what is raised.

    wanted: the `software` of the command; a worker with another one refuses.
    """
    with _working:
        set_quiet(True)
        return [_attempt(unit, wanted) for unit in units]


def _attempt(unit: Unit, wanted: str) -> Attempt:
    worker = f"{socket.gethostname()}:{os.getpid()}"
    try:
        if software() != wanted:
            raise YarnEdgeError(f"has {software()}, the command {wanted}: install the same versions there")
        return Attempt(worker, unit.work(*unit.arguments))
    except Exception as error:
        close_kept()
        ours = as_ours(error)
        return Attempt(worker, None, str(ours), isinstance(ours, YarnEdgeBug))
