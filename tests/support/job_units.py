"""Units for tests of workers: what a worker does by name is imported there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.jobs.unit import Unit, UnitResult


def squared(number: int) -> UnitResult:
    """The square, and who computed it."""
    return UnitResult({"square": np.array([number**2])}, {"pid": os.getpid()})


def killed_once(number: int, marks: str) -> UnitResult:
    """Kills its worker with SIGKILL, but only the first one."""
    mark = Path(marks) / f"killed-{number}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return squared(number)


def killed_always(_number: int) -> UnitResult:
    """Kills every worker."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refused(number: int) -> UnitResult:
    """An error of ours."""
    raise YarnEdgeError(f"{number}: no")


def divided_by_zero(number: int) -> UnitResult:
    """An error that nobody expects."""
    return UnitResult({}, {"x": number // 0})


def slow(number: int, mark: str) -> UnitResult:
    """Says who it is and works for a minute."""
    Path(mark).write_text(str(os.getpid()))
    time.sleep(60)
    return squared(number)


def unit_of(work: object, number: int, *rest: object) -> Unit:
    """A unit with a key of its own."""
    return Unit(work, (number, *rest), f"{number:064d}", f"unit {number}", 10)  # type: ignore[arg-type]
