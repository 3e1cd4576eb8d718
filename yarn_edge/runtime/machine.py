"""Memory in bytes: what the machine has, what is free, and what this process holds."""

from __future__ import annotations

from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
RESERVED_BYTES = 1 << 30  # for the rest of the system; llama-fit-params leaves as much on each device


def available_bytes() -> int:
    """Memory that a new program can have without swapping, in bytes."""
    return int(psutil.virtual_memory().available)


def machine_bytes() -> int:
    """Memory of the machine, in bytes."""
    return int(psutil.virtual_memory().total)


def spare_bytes(free: int | None = None) -> int:
    """What a model may take of the free memory (the machine's, or a device's) so that the rest of the system goes on.

    That is all but 1 GiB, or but an eighth where that is less.
    """
    free = available_bytes() if free is None else free
    return free - min(RESERVED_BYTES, free // 8)


def resident_bytes() -> int:
    """Bytes of memory that this process holds now, its own pages and those of mapped files."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most that `resident_bytes` ever was."""
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
