"""The one error type that users see, a single line that names the file, the key, the value and the remedy; and signals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

MAX_MESSAGE = 2000


class YarnEdgeError(Exception):
    """Bad input, or something that cannot be represented. Shown as one line, exit code 2.

    The message is one printable line, whatever hostile text (keys, values, paths) went into it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, MAX_MESSAGE))


class YarnEdgeBug(YarnEdgeError):
    """An exception that nobody expected. Exit code 70."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised so that half-written files are cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_terminated(number: int, _frame: object) -> NoReturn:
    """The handler of those signals."""
    raise Terminated(number)


def one_line(text: str, limit: int = 600) -> str:
    """`text` without control characters and line breaks, at most `limit` characters, so that hostile metadata stays on its line."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> YarnEdgeError:
    """An error of the operating system (full disk, missing folder, no permission) as one of ours."""
    where = path if path is not None else error.filename
    reason = error.strerror or str(error)
    # A path may be so long that the reason would be cut off.
    return YarnEdgeError(f"{one_line(str(Path(os.fsdecode(where))), 1000)}: {reason}" if where else reason)


def as_ours(error: Exception) -> YarnEdgeError:
    """Any exception as one of ours: by the reason that the system gives, or as a bug."""
    if isinstance(error, YarnEdgeError):
        return error
    if isinstance(error, OSError):
        return os_error(error)
    if isinstance(error, MemoryError):
        return YarnEdgeError("out of memory")
    what = one_line(f"{type(error).__name__}: {error}", 300)
    return YarnEdgeBug(f"a bug in yarn-edge, please report it: {what} (--debug shows where)")
