"""The weights of a checkpoint on the Hub, as files that a conversion reads: headers at once, then everything as one stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line

from .ranges import RangeReader
from .read_ahead import ReadAhead, StreamedFile, StreamState
from .repository import Repository

_START_BYTES = 1 << 17  # holds the header of most shards


class RemoteFile:
    """A file of the Hub in place of a local one (`source_file.ByteSource`). Before the stream starts, ranges are fetched as needed."""

    def __init__(self, weights: RemoteWeights, reader: RangeReader, position: int) -> None:
        self.path = Path(reader.label)
        self.size = reader.size
        self.reader = reader
        self.start = b""
        self._weights, self._base = weights, position

    def place(self, offset: int) -> int:
        """Where byte `offset` is in the stream."""
        return self._base + offset

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill `buffer` from byte `offset` on. Raises YarnEdgeError."""
        view = memoryview(buffer).cast("B")
        if offset + len(view) > self.size:
            raise YarnEdgeError(f"{self.path}: ends before byte {offset + len(view)}")
        stream = self._weights.stream
        if stream is not None:
            stream.read_into(view, self._base + offset)
        elif offset <= len(self.start):  # headers, from the front
            self._begin(offset + len(view))
            view[:] = self.start[offset : offset + len(view)]
        else:
            self.reader.read_into(view, offset)

    def _begin(self, end: int) -> None:
        missing = max(end, min(self.size, _START_BYTES)) - len(self.start)
        if missing > 0:
            more = bytearray(missing)
            self.reader.read_into(more, len(self.start))
            self.start += bytes(more)

    def read(self, n_bytes: int, offset: int = 0) -> bytes:
        """`n_bytes` from byte `offset` on. Raises YarnEdgeError."""
        data = bytearray(n_bytes)
        self.read_into(data, offset)
        return bytes(data)

    def check_unchanged(self) -> None:
        """Read what is left of the stream, if it was started. Raises HubError unless the hashes are the Hub's."""
        if self._weights.stream is not None:
            self._weights.stream.finish()


class RemoteWeights:
    """Files of a repository that are not in the cache. stream: once it was started."""

    def __init__(self, repository: Repository, names: Iterable[str]) -> None:
        self._repository = repository
        self.names = frozenset(names)
        self.stream: ReadAhead | None = None
        self._opened: dict[str, RemoteFile] = {}

    @property
    def opened(self) -> bool:
        """Whether there is anything to stream."""
        return bool(self._opened)

    def open(self, name: str) -> RemoteFile:
        """A file. The stream will have the files in the order in which they are opened."""
        entry = self._repository.entries[name]
        if not entry.sha256:
            raise YarnEdgeError(
                f"{self._repository.label}: {one_line(name, 100)} has no SHA-256 on the Hub, as weights have"
            )
        position = sum(file.size for file in self._opened.values())
        self._opened[name] = RemoteFile(self, RangeReader(self._repository, entry), position)
        return self._opened[name]

    def identity(self) -> bytes:
        """A hash of what is read: the same for the same files, with the same first bytes."""
        hashed = hashlib.sha256()
        for name, file in self._opened.items():
            entry = self._repository.entries[name]
            hashed.update(f"{name}\0{entry.size}\0{entry.sha256}\0".encode() + hashlib.sha256(file.start).digest())
        return hashed.digest()

    def start(self, state: StreamState | None) -> ReadAhead:
        """Start the stream, from `state` on if there is one."""
        files = [
            StreamedFile(file.reader, self._repository.entries[name].sha256, file.start)
            for name, file in self._opened.items()
        ]
        self.stream = ReadAhead(files)
        self.stream.start(state)
        return self.stream
