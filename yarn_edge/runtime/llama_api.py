"""The llama_cpp module, imported and initialized once, and its log for error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_void_p
from typing import Any

from yarn_edge.errors import one_line
from yarn_edge.flags import MAX_THREADS

_LOG_LINES: list[tuple[int, str]] = []
_CAPTURES: list[list[str]] = []
_LOG_ERROR = 4  # ggml.h: enum ggml_log_level
_state: dict[str, Any] = {}


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
