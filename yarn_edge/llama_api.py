"""The llama_cpp module, imported and initialised once: its log as error messages, Ctrl-C around long calls into C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_void_p
from typing import Any

from yarn_edge.errors import one_line
from yarn_edge.flags import MAX_THREADS

_LOG_LINES: list[tuple[int, str]] = []
_LOG_ERROR = 4  # ggml.h: enum ggml_log_level
_state: dict[str, Any] = {}


def llama() -> Any:
    """The llama_cpp module, imported and initialised once, with its log kept for error messages."""
    if "api" not in _state:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort's backtrace would go to stdout
        import llama_cpp

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def log(level: int, text: bytes, _user_data: object) -> None:
            _LOG_LINES.append((level, text.decode("utf-8", errors="replace").rstrip()))
            del _LOG_LINES[:-200]

        _state["log"] = log  # must outlive every call into llama.cpp
        llama_cpp.llama_log_set(log, c_void_p(0))
        llama_cpp.llama_backend_init()
        _state["api"] = llama_cpp
    return _state["api"]


def clear_log() -> None:
    """Forget the log so far."""
    _LOG_LINES.clear()


def failure_reason() -> str:
    """The first error that llama.cpp logged (the later ones only pass it on), for a message."""
    errors = [text for level, text in _LOG_LINES if level == _LOG_ERROR and text]
    return one_line(errors[0].split(": ", 1)[-1], 300) if errors else "llama.cpp gave no reason"


def physical_threads() -> int:
    """Threads to use by default: the cores this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


@contextmanager
def deferred_ctrl_c(act: Callable[[], None] | None = None) -> Iterator[Callable[[], bool]]:
    """Around a long call into C: Ctrl-C calls `act`, and is raised as KeyboardInterrupt at the end.

    Python's own handler would raise inside a callback (log, progress, abort), where ctypes prints and drops it. Yields
    the question whether Ctrl-C was pressed. Off the main thread, or where someone else handles SIGINT: nothing.
    """
    pressed = False

    def handler(_number: int, _frame: object) -> None:
        nonlocal pressed
        pressed = True
        if act:
            act()

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def kv_overrides(api: Any, values: Mapping[str, str | bool | int | float]) -> Any:
    """A C array of llama_model_kv_override, ended by an empty key."""
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
