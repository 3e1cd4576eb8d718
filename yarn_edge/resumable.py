"""A partial file that a later run goes on with: behind its bytes it carries a record of how far it is.

The record has two places, written in turn, each with a number and a hash, so that a run that is killed while it writes one leaves
the other. It counts only for the same work: its key. When the file is complete, the records are cut off.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yarn_edge.progress import note
from yarn_edge.writer import PARTIAL_NAME, lock_path, open_output, partial_file, unlock

_MAGIC = b"yarn-edge resume"
_SLOT_BYTES = 1024
_HEAD = struct.Struct("<16s32sQI")  # magic, key, number, length of the record
_MAX_RECORD = _SLOT_BYTES - _HEAD.size - 32


class ResumableFile:
    """A partial file of `n_bytes`. record: what `save` was given last for this key; None in a new file."""

    def __init__(self, path: Path, n_bytes: int, key: bytes) -> None:
        self.path = path
        self.n_bytes = n_bytes
        self._key = key
        found = read_record(path, n_bytes, key)
        self._number = found[0] if found else 0
        self.record: bytes | None = found[1] if found else None

    def save(self, record: bytes) -> None:
        """Keep `record`, once everything that was written is on the disk."""
        if len(record) > _MAX_RECORD:
            raise ValueError(f"a record of {len(record)} bytes")
        with open_output(self.path, "r+") as file:
            _flush(file.fileno())
            head = _HEAD.pack(_MAGIC, self._key, self._number + 1, len(record))
            file.seek(self.n_bytes + self._number % 2 * _SLOT_BYTES)
            file.write((head + hashlib.sha256(head + record).digest() + record).ljust(_SLOT_BYTES, b"\0"))
            _flush(file.fileno())
        self._number += 1
        self.record = record

    def complete(self) -> None:
        """Cut the records off."""
        os.truncate(self.path, self.n_bytes)


def _flush(descriptor: int) -> None:
    (getattr(os, "fdatasync", None) or os.fsync)(descriptor)


def read_record(path: Path, n_bytes: int, key: bytes) -> tuple[int, bytes] | None:
    """(number, record) of the newest record for `key`; None if the file has none."""
    with path.open("rb") as file:
        file.seek(n_bytes)
        slots = [file.read(_SLOT_BYTES) for _ in range(2)]
    found = []
    for slot in slots:
        if len(slot) < _HEAD.size + 32:
            continue
        magic, its_key, number, length = _HEAD.unpack_from(slot)
        digest, record = slot[_HEAD.size : _HEAD.size + 32], slot[_HEAD.size + 32 :][:length]
        if magic == _MAGIC and its_key == key and hashlib.sha256(slot[: _HEAD.size] + record).digest() == digest:
            found.append((number, record))
    return max(found, default=None)


def left_over_bytes(output: Path) -> int:
    """What partial files of an output take on the disk: the next run goes on with them, or removes them."""
    with suppress(OSError):
        matches = [(path, PARTIAL_NAME.fullmatch(path.name)) for path in output.parent.iterdir()]
        return sum(
            512 * getattr(path.lstat(), "st_blocks", 0)
            for path, match in matches
            if match and match["output"] == output.name
        )
    return 0


def find_left_over(
    output: Path, is_kind: Callable[[Path], bool], fits: Callable[[Path], bool]
) -> tuple[Path, int | None] | None:
    """A partial file or folder of `output` that nobody locks and that `fits`, locked; None if there is none. is_kind: which of them."""
    for path in sorted(output.parent.iterdir()):
        match = PARTIAL_NAME.fullmatch(path.name)
        if match is None or match["output"] != output.name or path.is_symlink() or not is_kind(path):
            continue
        with suppress(OSError):
            lock = lock_path(path)
            if fits(path):
                return path, lock
            unlock(lock)
    return None


@contextmanager
def resumable_file(
    output: Path, n_bytes: int, key: bytes, keeps: Callable[[BaseException], bool]
) -> Iterator[ResumableFile]:
    """A partial file beside `output`: that of an earlier run with the same `key`, or a new one. keeps: errors that leave it."""
    left: ResumableFile | None = None

    def keep(error: BaseException) -> bool:
        kept = keeps(error) and left is not None and left.record is not None
        if kept:
            with suppress(OSError):
                note(f"note: {left.path if left else output} stays: run the same command again to go on, or remove it")
        return kept

    def find(output: Path) -> tuple[Path, int | None] | None:
        return find_left_over(output, Path.is_file, lambda path: read_record(path, n_bytes, key) is not None)

    with partial_file(output, left_over=find, keeps=keep) as partial:
        left = ResumableFile(partial, n_bytes, key)
        yield left
