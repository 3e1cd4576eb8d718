"""A file of weights while it is read: opened once, read by position, and checked to stay the same file throughout.

Weights are read, not mapped. If a mapped file shrinks, the process ends (SIGBUS); a read that fails is an error with a name,
and what was read does not count as this process's memory.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any, Protocol, cast

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.regular_file import open_regular


def changed(path: Path) -> YarnEdgeError:
    """The error for a source whose size or modification time has changed."""
    return YarnEdgeError(f"{path}: was changed while it was read; run this again when the file is complete")


class ByteSource(Protocol):
    """A file of weights, wherever it lies."""

    path: Path
    size: int

    def place(self, offset: int) -> int:
        """Where byte `offset` is in the stream that the file comes from; 0 if any order of reading is as good."""
        ...

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill `buffer` from byte `offset` on. Raises YarnEdgeError."""

    def read(self, n_bytes: int, offset: int = 0) -> bytes:
        """`n_bytes` from byte `offset` on. Raises YarnEdgeError."""
        ...

    def check_unchanged(self) -> None:
        """Raise YarnEdgeError unless all that was read is of the file as it was when it was opened."""


class SourceFile:
    """An open file, with its size and modification time. Any thread may read. Raises YarnEdgeError if it cannot be opened.

    size, mtime_ns: the file's state when its header was read earlier; a different state now is an error.
    """

    def __init__(self, path: Path, *, size: int | None = None, mtime_ns: int | None = None) -> None:
        self.path = path
        self._file = cast(io.FileIO, open_regular(path).detach())
        state = os.fstat(self._file.fileno())
        self.size = state.st_size if size is None else size
        self.mtime_ns = state.st_mtime_ns if mtime_ns is None else mtime_ns
        self._lock = threading.Lock()
        try:
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def place(self, _offset: int) -> int:
        """0: any order of reading is as good."""
        return 0

    def check_unchanged(self) -> None:
        """Raise YarnEdgeError if the file has changed since it was opened."""
        state = os.fstat(self._file.fileno())
        if (state.st_size, state.st_mtime_ns) != (self.size, self.mtime_ns):
            raise changed(self.path)

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill `buffer` from byte `offset` on. Raises YarnEdgeError if the file ends too early or cannot be read."""
        view = memoryview(buffer).cast("B")
        try:
            while view:
                done = self._read(view, offset)
                if not done:
                    raise changed(self.path)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise os_error(error, self.path) from error

    def _read(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def read(self, n_bytes: int, offset: int = 0) -> bytes:
        """`n_bytes` from byte `offset` on."""
        data = bytearray(n_bytes)
        self.read_into(data, offset)
        return bytes(data)

    @property
    def raw(self) -> io.FileIO:
        """The open file, for copies within the kernel."""
        return self._file

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
