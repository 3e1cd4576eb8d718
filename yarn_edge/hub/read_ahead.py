"""Files of a repository as one stream: read ahead while others compute, hashed on the way, never on the disk.

The files follow one another. Connections fetch blocks of them in order, never more than a window ahead of what was read last. Of
every block that arrives in order the file's SHA-256 is told, and at the end of a file it must be the Hub's. A block is dropped
when it was read, or when there is no more room; one that is needed again is fetched again, and compared with what was hashed.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from yarn_edge.errors import as_ours

from .failures import HubError
from .ranges import RangeReader
from .sha256 import Sha256

BLOCK_BYTES = 4 << 20
_CONNECTIONS, _AHEAD, _BEHIND = 4, 7, 6  # the latter two in blocks
_PARTING_S, _HASH_WAIT_S = 0.2, 1.0
_BUFFERS = 11  # 44 MiB, made once: memory that is freed block by block comes back in pieces


@dataclass(frozen=True)
class StreamedFile:
    """A file of the stream. start: its first bytes, as they were read before; they must come again."""

    reader: RangeReader
    sha256: str
    start: bytes


@dataclass(frozen=True)
class StreamState:
    """Where a later run goes on: the block, and the hash of its file up to there. None: the hash begins with the file.

    until, until_hashed: the same of a later block of that file, which the bytes that come again must lead to; -1 for none.
    """

    block: int
    hashed: bytes | None
    until: int = -1
    until_hashed: bytes | None = None


class ReadAhead:
    """The stream of `files`. Any thread may read; positions are counted over all files. `start` before reading, `close` after."""

    def __init__(self, files: Sequence[StreamedFile]) -> None:
        self._files = files
        self._begins = [0]
        self._blocks = [0]  # a file's first block
        for file in files:
            self._begins.append(self._begins[-1] + file.reader.size)
            self._blocks.append(self._blocks[-1] + -(-file.reader.size // BLOCK_BYTES))
        self._change = threading.Condition()
        self._free = [bytearray(BLOCK_BYTES) for _ in range(_BUFFERS)]
        self._buffers: dict[int, bytearray] = {}  # of the blocks that are fetched or ready
        self._ready: dict[int, memoryview] = {}
        self._digests: dict[int, bytes] = {}
        self._states: dict[int, StreamState] = {}
        self._crew: list[threading.Thread] = []
        self._hash = Sha256()
        self._hashing = False
        self._next = self._hashed = self._low = self._read = self._needed = 0
        self._origin = StreamState(0, None)
        self._error: Exception | None = None
        self._stopped = False

    def start(self, state: StreamState | None = None) -> None:
        """Begin to fetch, from the first block or from where an earlier run's `state` was taken."""
        if state is not None:
            self._origin = state
            block, hashed = state.block, state.hashed
            index = self._index_of(block)
            try:
                self._hash = Sha256(hashed)
            except ValueError:
                hashed = None
            if hashed is None:  # bytes that were computed are fetched once more, for the hash
                block = self._blocks[index]
            self._next = self._hashed = self._low = self._read = self._needed = block
        for number in range(_CONNECTIONS):
            thread = threading.Thread(target=self._work, name=f"hub-{number}", daemon=True)
            self._crew.append(thread)
            thread.start()

    def read_into(self, buffer: Any, position: int) -> None:
        """Fill `buffer` from `position` on, within one file. Raises HubError."""
        view = memoryview(buffer).cast("B")
        index = bisect_right(self._begins, position) - 1
        inside = position - self._begins[index]
        while view:
            block, at = self._blocks[index] + inside // BLOCK_BYTES, inside % BLOCK_BYTES
            part = min(len(view), BLOCK_BYTES - at)
            with self._change:
                if block > self._read:
                    self._read = block
                    self._drop()
                while block >= self._low and block not in self._ready and self._error is None and not self._stopped:
                    self._change.wait()
                self._raise_error()
                held = self._ready.get(block)
                if held is not None:
                    view[:part] = held[at : at + part]
            if held is None:
                view[:part] = self._again(block)[at : at + part]
            view, inside = view[part:], inside + part

    def release(self, position: int) -> None:
        """Nothing before `position` is read any more. Blocks are kept until then, as long as there is room for them."""
        with self._change:
            self._needed = max(self._needed, self._block_of(position))
            self._drop()

    def _index_of(self, block: int) -> int:
        return bisect_right(self._blocks, block) - 1

    def _block_of(self, position: int) -> int:
        index = bisect_right(self._begins, position) - 1
        return self._blocks[index] + (position - self._begins[index]) // BLOCK_BYTES

    def finish(self) -> None:
        """Read the rest of all files. Raises HubError unless every file had the Hub's hash."""
        with self._change:
            self._read = self._needed = self._blocks[-1]
            self._drop()
            while self._hashed < self._blocks[-1] and self._error is None and not self._stopped:
                self._change.wait()
            self._raise_error()

    def state_at(self, position: int, end: int) -> StreamState | None:
        """Where a run goes on that needs nothing before `position`, and has used nothing from `end` on.

        None if what it has used is not hashed yet: another run could not know whether it was right.
        """
        block, last = self._block_of(position), self._block_of(max(0, end - 1))
        with self._change:
            if not self._change.wait_for(lambda: self._hashed > last, _HASH_WAIT_S):
                return None
            for old in sorted(b for b in self._states if b <= block)[:-1]:
                del self._states[old]
            first = min(self._states, default=block + 1)
            state = self._states[first] if first <= block else self._origin
            until = max((b for b in self._states if b > last), default=-1)
            if until < 0 or self._index_of(until) != self._index_of(state.block):
                return state  # the file's own hash has the last word
            return replace(state, until=until, until_hashed=self._states[until].hashed)

    def stop(self) -> None:
        """Let everybody who waits for bytes fail."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def close(self) -> None:
        """Stop. A connection that is waiting for the network ends by itself."""
        self.stop()
        for thread in self._crew:
            thread.join(_PARTING_S)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise HubError("the stream was stopped")

    def _work(self) -> None:
        """Fetch blocks until there are no more."""
        try:
            while (block := self._claim()) is not None:
                data = self._fetch(block, self._buffers[block])
                with self._change:
                    if self._stopped:
                        return
                    self._ready[block] = data
                    self._change.notify_all()
                self._hash_ready()
        except Exception as error:
            with self._change:
                self._error = self._error or as_ours(error)
                self._change.notify_all()

    def _claim(self) -> int | None:
        with self._change:
            while (
                (self._next > self._read + _AHEAD or not self._free)
                and self._next < self._blocks[-1]
                and not self._stopped
            ):
                self._change.wait()
            if self._stopped or self._error is not None or self._next >= self._blocks[-1]:
                return None
            block, self._next = self._next, self._next + 1
            self._buffers[block] = self._free.pop()
            return block

    def _fetch(self, block: int, buffer: bytearray) -> memoryview:
        """A block, in `buffer`."""
        index = self._index_of(block)
        reader, offset = self._files[index].reader, (block - self._blocks[index]) * BLOCK_BYTES
        data = memoryview(buffer)[: min(BLOCK_BYTES, reader.size - offset)]
        reader.read_into(data, offset, lambda: self._stopped)
        return data

    def _hash_ready(self) -> None:
        """Hash what has arrived in order, in one thread at a time."""
        while True:
            with self._change:
                block = self._hashed
                if self._hashing or block not in self._ready:
                    return
                self._hashing = True
                data = self._ready[block]
            self._add(block, data)
            with self._change:
                self._hashing = False
                self._hashed = block + 1
                if block + 1 < self._blocks[self._index_of(block) + 1]:
                    self._states[block + 1] = StreamState(block + 1, self._hash.state)
                self._drop()

    def _add(self, block: int, data: memoryview) -> None:
        index = self._index_of(block)
        file = self._files[index]
        offset = (block - self._blocks[index]) * BLOCK_BYTES
        if offset == 0:
            self._hash = Sha256()
        before = file.start[offset : offset + len(data)]
        if data[: len(before)] != before:
            raise HubError(f"{file.reader.label}: the server sends other bytes than before: run this again")
        with self._change:
            self._states[block] = StreamState(block, self._hash.state)
        if block == self._origin.until and offset and self._hash.state != self._origin.until_hashed:
            raise HubError(
                f"{file.reader.label}: the server sends other bytes than in an earlier run: remove the partial file"
            )
        self._hash.update(data)
        self._digests[block] = hashlib.blake2b(data, digest_size=16).digest()
        if block + 1 == self._blocks[index + 1] and self._hash.hexdigest() != file.sha256:
            raise HubError(
                f"{file.reader.label}: its SHA-256 is {self._hash.hexdigest()}, but the Hub states {file.sha256}: nothing was written"
            )

    def _drop(self) -> None:
        """Forget the blocks that reading has passed. The caller holds the lock."""
        low = min(max(self._needed, self._read - _BEHIND), self._read, self._hashed)
        while self._low < low:
            if self._low in self._buffers:
                del self._ready[self._low]
                self._free.append(self._buffers.pop(self._low))
            self._low += 1
        self._change.notify_all()

    def _again(self, block: int) -> memoryview:
        """A block that was dropped, as it was hashed."""
        data, index = self._fetch(block, bytearray(BLOCK_BYTES)), self._index_of(block)
        if block not in self._digests:
            raise HubError(
                f"{self._files[index].reader.label}: cannot be resumed: remove the partial file, and run this again"
            )
        if hashlib.blake2b(data, digest_size=16).digest() != self._digests[block]:
            raise HubError(
                f"{self._files[index].reader.label}: the server sends other bytes than before: run this again"
            )
        return data
