"""Ctrl-C, SIGTERM and SIGHUP at moments when no exception may be raised."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from yarn_edge.errors import raise_terminated

DEFERRED = tuple(n for n in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")) if n is not None)


@contextmanager
def deferred_ctrl_c(act: Callable[[], None] | None = None) -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C (and SIGTERM, SIGHUP): the signal calls `act`, and is raised at the end.

    For long calls into C: Python's own handlers would raise inside a callback (log, progress, abort), where ctypes prints and drops
    the exception. And for what must not be left half done: making, renaming and removing files.
    Yields a function that returns whether a signal came. Does nothing outside the main thread, or for signals that have
    other handlers than Python's and ours.
    """
    came: list[int] = []

    def handler(number: int, _frame: object) -> None:
        came.append(number)
        if act:
            act()

    ours: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        for number in DEFERRED:
            usual = signal.getsignal(number)
            if usual is signal.default_int_handler or usual is raise_terminated:
                ours[number] = usual
                signal.signal(number, handler)
                # llama.cpp's RPC client takes a call that was interrupted for a lost worker.
                signal.siginterrupt(number, False)
    try:
        yield lambda: bool(came)
    except KeyboardInterrupt:  # how an evaluation reports that it was stopped
        if not came:
            raise
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)
    if came:
        ours[came[0]](came[0], None)
