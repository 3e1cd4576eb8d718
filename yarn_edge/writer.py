"""Writing files safely: to a partial file that becomes the real one only when it is complete.

A reader of the output folder sees either no file or a complete one: everything goes to `NAME.PID.partial` beside the target,
is flushed to the disk and renamed. Errors and Ctrl-C remove the partial file. kill -9 can leave the partial file, but never
one under the final name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, os_error


def check_output(output: Path, force: bool, sources: Iterable[Path] = ()) -> Path:
    """Refuse an output that cannot or must not be written, before any work. Returns the file that a link points to."""
    try:
        output = output.resolve() if output.is_symlink() else output
    except (OSError, RuntimeError) as error:
        raise YarnEdgeError(f"{output}: is a link that cannot be followed") from error
    if output.is_dir():
        raise YarnEdgeError(f"{output}: is a folder: give the name of a file")
    if output.exists() and not output.is_file():
        raise YarnEdgeError(f"{output}: is not a regular file, and cannot be replaced by one")
    if not output.parent.is_dir():
        raise YarnEdgeError(f"{output.parent}: no such folder for the output")
    if output.exists() and any(source.exists() and output.samefile(source) for source in sources):
        raise YarnEdgeError(f"{output}: is one of the files that are read")
    if output.exists() and not force:
        raise _exists(output)
    if not os.access(output.parent, os.W_OK):
        raise YarnEdgeError(f"{output.parent}: no permission to write there")
    return output


def _exists(output: Path) -> YarnEdgeError:
    return YarnEdgeError(f"{output}: exists already; --force overwrites it")


def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raise YarnEdgeError if the disk of `folder` has less than `n_bytes` free. what: what needs them, for the message."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise YarnEdgeError(
            f"{folder}: {what} needs {n_bytes / 1e9:.2f} GB on this disk, which has {free / 1e9:.2f} GB free"
        )


@contextmanager
def partial_file(output: Path, label: str = "") -> Iterator[Path]:
    """A path beside `output`, removed on leaving unless it was renamed."""
    partial = output.with_name(f"{output.name}.{os.getpid()}{label}.partial")
    try:
        yield partial
    except OSError as error:
        raise os_error(error, output) from error
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, output: Path, force: bool, flush: bool = True) -> None:
    """Give a finished partial file its final name; with `flush` it is on the disk first.

    Without `force`, raises YarnEdgeError if a file has appeared under that name in the meantime, and leaves it alone.
    """
    if flush:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    if force:
        partial.replace(output)
    else:
        try:
            output.hardlink_to(partial)  # unlike a rename, this fails if the name is taken
        except FileExistsError as error:
            raise _exists(output) from error
        except OSError:  # a file system without hard links
            if output.exists():
                raise _exists(output) from None
            partial.replace(output)
    if flush and hasattr(os, "O_DIRECTORY"):
        folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(output: Path, data: bytes | str, force: bool) -> None:
    """Write a small file whole or not at all, text as UTF-8. A link stays, and the file that it stands for is written.

    Raises YarnEdgeError if the file cannot be written, or if it exists and `force` is not set.
    """
    target = output.resolve() if output.is_symlink() else output
    with partial_file(target) as partial:
        if isinstance(data, str):
            partial.write_text(data, encoding="utf-8")
        else:
            partial.write_bytes(data)
        publish(partial, target, force)


def digest(path: Path, n_bytes: int | None = None) -> str:
    """BLAKE2b of a file, or of its first `n_bytes`."""
    hashed = hashlib.blake2b(digest_size=16)
    left = path.stat().st_size if n_bytes is None else n_bytes
    with path.open("rb") as file:
        while left > 0 and (data := file.read(min(left, 1 << 22))):
            hashed.update(data)
            left -= len(data)
    return hashed.hexdigest()
