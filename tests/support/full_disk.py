"""A disk that is full after half of what is written."""

from __future__ import annotations

import io
from typing import Any


class FullDisk(io.FileIO):
    """An output on it, in place of `yarn_edge.writer.open_output`."""

    def write(self, data: Any) -> int:
        super().write(memoryview(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")
