"""The llama_cpp module, imported and initialized once; its log for error messages; Ctrl-C during long calls into C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_void_p
from types import FrameType
from typing import Any

from yarn_edge.errors import one_line, raise_terminated
from yarn_edge.flags import MAX_THREADS

_LOG_LINES: list[tuple[int, str]] = []
_CAPTURES: list[list[str]] = []
_LOG_ERROR = 4  # ggml.h: enum ggml_log_level
_state: dict[str, Any] = {}
DEFERRED = tuple(n for n in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")) if n is not None)


def llama() -> Any:
    """The llama_cpp module, imported and initialized once. Its log is kept for error messages."""
    if "api" not in _state:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # the backtrace of an abort would go to stdout
        import llama_cpp

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def log(level: int, text: bytes, _user_data: object) -> None:
            line = text.decode("utf-8", errors="surrogateescape")
            _LOG_LINES.append((level, line.rstrip()))
            del _LOG_LINES[:-200]
            for captured in _CAPTURES:
                captured.append(line)

        _state["log"] = log  # must outlive every call into llama.cpp
        llama_cpp.llama_log_set(log, c_void_p(0))
        llama_cpp.llama_backend_init()
        _state["api"] = llama_cpp
    return _state["api"]


def clear_log() -> None:
    """Discard the log so far."""
    _LOG_LINES.clear()


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Everything that llama.cpp logs while open, one unchanged item per call. `failure_reason` then reports on this part only."""
    clear_log()
    lines: list[str] = []
    _CAPTURES.append(lines)
    try:
        yield lines
    finally:
        _CAPTURES.remove(lines)


def failure_reason() -> str:
    """The first error that llama.cpp logged, for a message; later ones only pass it on."""
    errors = [text for level, text in _LOG_LINES if level == _LOG_ERROR and text]
    return one_line(errors[0].split(": ", 1)[-1], 300) if errors else "llama.cpp gave no reason"


def physical_threads() -> int:
    """The default number of threads: one per physical core (a second one would only wait), of those that this process may use."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable, MAX_THREADS)


@contextmanager
def deferred_ctrl_c(act: Callable[[], None] | None = None) -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C (and SIGTERM, SIGHUP) during a long call into C: the signal calls `act`, and is raised at the end.

    Python's own handlers would raise inside a callback (log, progress, abort), where ctypes prints and drops the exception.
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


def kv_overrides(api: Any, values: Mapping[str, str | bool | int | float]) -> Any:
    """A C array of llama_model_kv_override, terminated by an empty key."""
    array = (api.llama_model_kv_override * (len(values) + 1))()
    for item, (key, value) in zip(array, values.items(), strict=False):
        item.key = key.encode()
        if isinstance(value, bool):
            item.tag, item.value.val_bool = api.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            item.tag, item.value.val_i64 = api.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            item.tag, item.value.val_f64 = api.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            item.tag, item.value.val_str = api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return array
