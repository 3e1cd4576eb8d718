"""Letting go of the pages of a mapped file that is read once and again: they stay in the system's cache, but count no more as ours."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_DONT_NEED = 4  # MADV_DONTNEED in sys/mman.h of Linux


class MappedFile:
    """A file that llama.cpp maps. Elsewhere than on Linux, where a process learns its mappings, nothing is done."""

    def __init__(self, path: Path) -> None:
        self._ranges = _ranges(os.fspath(path.resolve())) if sys.platform == "linux" else []
        self._advise = ctypes.CDLL(None).madvise if self._ranges else None
        if self._advise is not None:
            self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def let_go(self) -> None:
        """Its pages are read from the file again when they are needed."""
        for start, n_bytes in self._ranges:
            if self._advise is not None:
                self._advise(start, n_bytes, _DONT_NEED)


def _ranges(name: str) -> list[tuple[int, int]]:
    """(address, bytes) of each mapping of the file that is read alone and shared: of others, letting go would lose bytes."""
    found = []
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name and fields[1] == "r--s":
            start, end = (int(part, 16) for part in fields[0].split("-"))
            found.append((start, end - start))
    return found
