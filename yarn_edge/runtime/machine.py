"""Memory in bytes: of the machine or of the container in it, free, and held by this process."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

from yarn_edge.runtime.control_groups import memory_limits

STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD = -3  # malloc.h
RESERVED_BYTES = 1 << 30  # for the rest of the system; llama-fit-params leaves the same amount on each device


def available_bytes() -> int:
    """Memory that a new program can use without swapping, in bytes: of the machine's, what its control groups leave."""
    return min([int(psutil.virtual_memory().available), *(limit.free_bytes for limit in memory_limits())])


def machine_bytes() -> int:
    """Memory of the machine, in bytes, or the limit of this process's control groups if that is less."""
    return min([int(psutil.virtual_memory().total), *(limit.limit_bytes for limit in memory_limits())])


def spare_bytes(free: int | None = None) -> int:
    """How much of the free memory (of the machine, or of a device) a model may take: all but 1 GiB or an eighth, whichever is less.

    The remainder is for the rest of the system.
    """
    free = available_bytes() if free is None else free
    return free - min(RESERVED_BYTES, free // 8)


def resident_bytes() -> int:
    """Resident memory of this process in bytes: its own pages and those of mapped files."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The peak of `resident_bytes`."""
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024


def map_large_blocks() -> None:
    """Make glibc map every block of 1 MiB and more by itself, so that it goes back to the system when it is freed.

    By default glibc raises that limit to 32 MiB as such blocks are freed; then they lie among smaller ones that stay, and what a model's
    layers need one after another adds up. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
