"""A limit on the memory that a device lends, put into the library's own device and buffer type.

llama.cpp's server allocates whatever clients ask for, and reports all memory of the machine as free. Two function pointers are
replaced (ggml-backend-impl.h): what a device reports, and what allocates a buffer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import psutil

from yarn_edge.progress import note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.ggml import Device
from yarn_edge.runtime.load_log import MIB
from yarn_edge.runtime.machine import map_large_blocks

_GET_MEMORY = 2  # ggml_backend_device_i: get_name, get_description, get_memory, …
_ALLOC_BUFFER = 1  # ggml_backend_buffer_type_i: get_name, alloc_buffer, …
_SIZES = ctypes.POINTER(ctypes.c_size_t)
_Memory = ctypes.CFUNCTYPE(None, ctypes.c_void_p, _SIZES, _SIZES)
_Alloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_kept: list[Any] = []  # callbacks must outlive every call into the library


def limit_device(device: Device, limit: int) -> None:
    """Let `device` lend at most `limit` bytes. Call it once, before the server starts."""
    handle = ggml.device_handle(device)
    used = _used_here() if device.kind == "cpu" else _used_on(device)

    @_Memory  # type: ignore[untyped-decorator]
    def memory(_device: int, free: Any, total: Any) -> None:
        free[0], total[0] = max(0, limit - used()), limit

    buffer_type = ggml.memory_type(device)
    original = _Alloc(_slots(buffer_type)[_ALLOC_BUFFER])

    @_Alloc  # type: ignore[untyped-decorator]
    def allocate(kind: int, size: int) -> int | None:
        if used() + size > limit:
            note(f"{device.name}: refused {size / MIB:.0f} MiB: {used() / MIB:.0f} of {limit / MIB:.0f} MiB are in use")
            return None
        address = original(kind, size)
        return None if address is None else int(address)

    for place, slot, made in ((handle, _GET_MEMORY, memory), (buffer_type, _ALLOC_BUFFER, allocate)):
        _slots(place)[slot] = ctypes.cast(made, ctypes.c_void_p).value
    _kept.extend((memory, allocate, original))


def _slots(address: int) -> Any:
    """The function pointers at the beginning of a struct of ggml."""
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))


def _used_here() -> Callable[[], int]:
    """Counts what this process allocates from now on. Large blocks must go back to the system when they are freed."""
    map_large_blocks()
    process = psutil.Process()

    def held() -> int:
        memory = process.memory_info()
        return int(getattr(memory, "data", memory.vms))

    before = held()
    return lambda: max(0, held() - before)


def _used_on(device: Device) -> Callable[[], int]:
    before = ggml.device_memory(device)[0]
    handle = ggml.device_handle(device)
    original = _Memory(_slots(handle)[_GET_MEMORY])
    _kept.append(original)

    def used() -> int:
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        original(handle, ctypes.byref(free), ctypes.byref(total))
        return max(0, before - free.value)

    return used
