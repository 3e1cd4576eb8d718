"""Opening what is read: regular files only, of bounded size, so that a pipe or a device in their place is an error, not a wait.

Links to regular files are followed (the Hub's cache consists of them). Only a text that a user names may also be a pipe, such as
bash's <(…).
"""

from __future__ import annotations

import hashlib
import io
import os
import select
import stat
import time
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, os_error

WRITER_WAIT_S = 2.0  # for a program to open its end of a named pipe
_STEP_BYTES = 1 << 20
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFLNK: "link",
}
# Without them a terminal or a pipe that takes a file's place after it was looked at would stop the process. Windows has neither.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: Path, *, follow_links: bool = True) -> io.BufferedReader:
    """A regular file, open for reading. Raises YarnEdgeError if it cannot be opened or is anything else."""

    def opener(name: str, flags: int) -> int:
        _refuse_others(path, path.stat(follow_symlinks=follow_links).st_mode)  # some devices act when they are opened
        return os.open(name, flags | _NO_WAIT | (0 if follow_links else NO_FOLLOW))

    try:
        file = io.FileIO(path, opener=opener)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise YarnEdgeError(
                f"{path}: is a link to a file that is not there: restore it, or remove the link"
            ) from error
        raise os_error(error, path) from error
    try:
        _refuse_others(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(file)


def _refuse_others(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise YarnEdgeError(
            f"{path}: is not a regular file but a {_KINDS.get(stat.S_IFMT(mode), 'thing of another kind')}"
        )


def refuse_special_files(folder: Path) -> None:
    """Raise YarnEdgeError if a folder has a pipe, a socket or a device: before a library opens its files by itself."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            _refuse_others(path, path.stat().st_mode)


def is_named(path: Path) -> bool:
    """Whether the folder has this name, be it of a link to nothing: opening that is an error, not an absent file."""
    return os.path.lexists(path)


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file. Raises YarnEdgeError if it has more than `limit`, is anything else, or cannot be read."""
    parts: list[bytes] = []
    left = limit
    with open_regular(path) as file:
        try:
            if os.fstat(file.fileno()).st_size > limit:
                raise _too_large(path, limit)
            while part := file.read(_STEP_BYTES):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise _too_large(path, limit)
        except OSError as error:
            raise os_error(error, path) from error
    return b"".join(parts)


def read_file_or_pipe(path: Path, limit: int) -> bytes:
    """`read_regular`, also of a pipe: for what a user names. A pipe that no program writes to is an error."""
    try:
        return _read_pipe(path, limit) if path.is_fifo() else read_regular(path, limit)
    except OSError as error:
        raise os_error(error, path) from error


def _read_pipe(path: Path, limit: int) -> bytes:
    parts: list[bytes] = []
    left, has_writer, deadline = limit, False, time.monotonic() + WRITER_WAIT_S
    pipe = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        while left >= 0:
            try:
                part = os.read(pipe, 1 << 16)
            except BlockingIOError:  # somebody will write: wait, however long it takes
                has_writer = True
                select.select([pipe], [], [])
                continue
            if part:
                has_writer = True
                parts.append(part)
                left -= len(part)
            elif has_writer:
                return b"".join(parts)
            elif time.monotonic() > deadline:
                raise YarnEdgeError(f"{path}: is a pipe that no program writes to")
            else:
                time.sleep(0.01)
    finally:
        os.close(pipe)
    raise _too_large(path, limit)


def _too_large(path: Path, limit: int) -> YarnEdgeError:
    size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit} bytes"
    return YarnEdgeError(f"{path}: is larger than {size}, the most that is read of such a file")


def path_of(file: io.BufferedReader, path: Path) -> Path:
    """A path that names the open `file` itself, whatever has taken its name since; `path` where the system has none."""
    own = Path(f"/dev/fd/{file.fileno()}")
    return own if own.exists() else path


def digest(file: io.BufferedReader, n_bytes: int | None = None) -> str:
    """BLAKE2b of an open file, or of its first `n_bytes`."""
    hashed = hashlib.blake2b(digest_size=16)
    file.seek(0)
    left = os.fstat(file.fileno()).st_size if n_bytes is None else n_bytes
    while left > 0 and (data := file.read(min(left, 1 << 22))):
        hashed.update(data)
        left -= len(data)
    file.seek(0)
    return hashed.hexdigest()
