"""Code that Numba compiles for the live graph: compiled once, and then read from Numba's cache."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from yarn_edge.progress import note
from yarn_edge.runtime.ggml import TensorStruct
from yarn_edge.runtime.llama_api import llama
from yarn_edge.signals import deferred_ctrl_c

_NOTICE_S = 3.0


def from_cache(build: Callable[..., Any], *what: Any, sources: Iterable[str], name: str, takes: str) -> Any:
    """`build(*what, version, keep)`, with keep for Numba's cache; without it if the cache cannot be used (no folder, a full disk, …).

    version: changes with `what`, with the files `sources` and with the layout of a node; build must put it into the name of the
    outermost function (`named_by`), which is all that Numba looks at when it reads its cache. name, takes: for a note, such as "8 s".
    """
    version = _version_of(what, sources)
    notice = threading.Timer(_NOTICE_S, note, (f"compiling {name}, which is needed once: about {takes}",))
    notice.daemon = True
    notice.start()
    try:
        with deferred_ctrl_c():  # LLVM calls Python back, where an exception would be lost
            try:
                return build(*what, version, True)
            except Exception:  # no writable folder, a full disk, a damaged file
                return build(*what, version, False)
    finally:
        notice.cancel()


def named_by(version: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name of its own, and so with files of its own in Numba's cache.

    Numba numbers the code of one function in one index. Two processes that compile two versions at once both take the next number,
    and the index can end up with one version's name for the other's code.
    """
    function.__qualname__ = f"{function.__name__}_{version:x}"
    return function


def as_callback(compiled: Any) -> Any:
    """A Numba cfunc as llama.cpp takes it for cb_eval, which keeps its code."""
    callback = ctypes.cast(compiled.address, llama().ggml_backend_sched_eval_callback)
    callback.compiled = compiled
    return callback


def _version_of(what: Any, sources: Iterable[str]) -> int:
    fields = [(name, getattr(TensorStruct, name).offset) for name, *_ in TensorStruct._fields_]
    digest = hashlib.sha256(repr((what, fields)).encode())
    for source in sources:
        digest.update(Path(source).read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")
