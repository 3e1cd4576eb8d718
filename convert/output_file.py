"""A file that the pipeline fills: its room is reserved at once, and any thread writes to its place."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.gguf.fast_copy import disk_starter
from yarn_edge.runtime.ggml_types import GGMLType
from yarn_edge.writer import open_output

_DISK_STEP = 32 << 20  # bytes; telling the disk to begin after each slice took 0.3 s of the processor for 717 MB
_CANNOT_RESERVE = frozenset((errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS))


@dataclass(frozen=True)
class Output:
    """One file to fill: its types and absolute offsets by tensor name. header: its first bytes."""

    path: Path
    header: bytes
    file_bytes: int
    types: Mapping[str, GGMLType]
    offsets: Mapping[str, int]


class OutputFile:
    """An output that any thread writes to by position. keep: what is in it stays."""

    def __init__(self, output: Output, keep: bool) -> None:
        self.output = output
        self._file = open_output(output.path, "r+" if keep else "w")
        self._lock = threading.Lock()
        self._start_writing = disk_starter()
        self._waiting = 0  # bytes since the disk was last told to begin

    def begin(self) -> None:
        """Reserve the space if the system can, so that a full disk is reported now, and write the header."""
        size = self.output.file_bytes
        try:
            os.posix_fallocate(self._file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT_RESERVE:
                raise
            if os.fstat(self._file.fileno()).st_size < size:
                self._file.truncate(size)
        self.write(0, np.frombuffer(self.output.header, np.uint8))

    def write(self, at: int, data: npt.NDArray[np.uint8]) -> None:
        """Put `data` at byte `at`."""
        left = data.reshape(-1).data
        self._waiting += len(left)  # of two threads one may be lost: it is only a hint
        while left:
            done = self._write(at, left)
            left, at = left[done:], at + done
        if self._waiting >= _DISK_STEP:
            self._waiting = 0
            self._start_writing(self._file, 0, 0)  # the whole file

    def _write(self, at: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), data, at)
        with self._lock:
            self._file.seek(at)
            return self._file.write(data) or 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()
