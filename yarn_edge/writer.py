"""Writing files safely: to a partial file that becomes the real one only when it is complete.

A reader of the output folder sees either no file or a complete one: everything goes to `NAME.RANDOM.partial` beside the target,
is flushed to the disk and renamed. Two runs with one output therefore never write into one file: the last to finish has the name.
Errors, Ctrl-C, SIGTERM and SIGHUP remove the partial file. kill -9 can leave it, but never one under the final name; a partial
file is locked as long as its run lives, so the next run with this output removes it.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.regular_file import NO_FOLLOW
from yarn_edge.signals import deferred_ctrl_c

if sys.platform != "win32":
    import fcntl

_PARTIAL = ".partial"
PARTIAL_NAME = re.compile(r"(?P<output>.+)\.[0-9a-f]{8}\.partial", re.DOTALL)
LeftOver = Callable[[Path], "tuple[Path, int | None] | None"]  # output -> (a partial file, its lock)
_OTHERS_WAIT_S = 60.0  # for another run to rename its files


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
    disk = shutil.disk_usage(folder)
    if not disk.total:  # /proc and its like
        raise YarnEdgeError(f"{folder}: is on a file system of size 0, which cannot hold {what}: choose another folder")
    if disk.free < n_bytes:
        raise YarnEdgeError(
            f"{folder}: {what} needs {n_bytes / 1e9:.2f} GB on this disk, which has {disk.free / 1e9:.2f} GB free"
        )


@contextmanager
def partial_file(
    output: Path,
    mode: int = 0o666,
    left_over: LeftOver = lambda _output: None,
    keeps: Callable[[BaseException], bool] = lambda _error: False,
) -> Iterator[Path]:
    """A new, empty file beside `output`, removed on leaving unless it was renamed. mode: its permissions, less the umask.

    left_over: finds the file of an earlier run to go on with, instead of a new one. keeps: the errors that leave it so.
    """

    def make(path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, mode))

    with _claimed(output, make, lambda path: path.unlink(missing_ok=True), left_over, keeps) as partial:
        yield partial


@contextmanager
def partial_folder(
    output: Path,
    left_over: LeftOver = lambda _output: None,
    keeps: Callable[[BaseException], bool] = lambda _error: False,
    mode: int = 0o777,
) -> Iterator[Path]:
    """A new folder beside `output`, removed on leaving unless it was renamed. left_over, keeps, mode: see `partial_file`."""
    with _claimed(
        output, lambda path: path.mkdir(mode), lambda path: shutil.rmtree(path, ignore_errors=True), left_over, keeps
    ) as partial:
        yield partial


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent` (None: among the system's temporary files), for this user alone, removed on leaving."""
    folder: Path | None = None
    try:
        with deferred_ctrl_c():
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        yield folder
    finally:
        with deferred_ctrl_c():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _claimed(
    output: Path,
    make: Callable[[Path], None],
    remove: Callable[[Path], None],
    left_over: LeftOver,
    keeps: Callable[[BaseException], bool],
) -> Iterator[Path]:
    """A name that nobody had, made by `make`, or what is left over; locked while open, removed at the end unless an error keeps it."""
    partial: Path | None = None
    lock: int | None = None
    kept = False
    try:
        with deferred_ctrl_c():
            partial, lock = left_over(output) or (None, None)
        remove_stale(output.parent, output.name.__eq__)
        if partial is None:
            with deferred_ctrl_c():
                partial, lock = _claim(output, make)
        try:
            yield partial
        except BaseException as error:
            kept = keeps(error)
            raise
    except OSError as error:
        raise os_error(error, output) from error
    finally:
        with deferred_ctrl_c():
            if partial is not None and not kept:
                remove(partial)
            unlock(lock)


def _claim(output: Path, make: Callable[[Path], None]) -> tuple[Path, int | None]:
    while True:
        partial = beside(output, _PARTIAL)
        try:
            make(partial)
        except FileExistsError:
            continue
        with suppress(BlockingIOError, FileNotFoundError):  # before it was locked, another run took it for stale
            lock = lock_path(partial)
            if os.path.lexists(partial):
                return partial, lock
            unlock(lock)


def beside(path: Path, suffix: str) -> Path:
    """A name in the same folder that nobody can foresee."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{suffix}")


def lock_path(path: Path) -> int | None:
    """Lock a file or a folder until the descriptor is closed; None where there are no locks. Raises BlockingIOError if it is
    locked already."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | NO_FOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def remove_stale(folder: Path, is_output: Callable[[str], bool]) -> None:
    """Remove the partial files and folders that killed runs left for these outputs: those that nobody locks."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = PARTIAL_NAME.fullmatch(path.name)
            if match is not None and is_output(match["output"]):
                with suppress(OSError):
                    _remove_unlocked(path, path.lstat())


def _remove_unlocked(path: Path, state: os.stat_result) -> None:
    is_folder = stat.S_ISDIR(state.st_mode)
    if not (is_folder or stat.S_ISREG(state.st_mode)) or (hasattr(os, "geteuid") and state.st_uid != os.geteuid()):
        return
    lock = lock_path(path)
    if lock is not None:
        try:
            shutil.rmtree(path) if is_folder else path.unlink()
        finally:
            unlock(lock)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Held by one run at a time, while it renames several files in `folder` that belong together; always free where folders
    have no locks. Raises YarnEdgeError if another program holds it for a minute."""
    lock: int | None = None
    deadline = time.monotonic() + _OTHERS_WAIT_S
    while True:
        try:
            lock = lock_path(folder)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise YarnEdgeError(f"{folder}: another program has locked this folder") from None
            time.sleep(0.02)
    try:
        yield
    finally:
        unlock(lock)


def open_output(path: Path, mode: str = "w") -> io.FileIO:
    """A file to write, not buffered; a link that was put in its place is an error. mode: "w", "a" to append, "r+" to keep what is there."""
    return io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | NO_FOLLOW, 0o666))


def publish(partial: Path, output: Path, force: bool, flush: bool = True) -> None:
    """Give a finished partial file its final name; with `flush` it is on the disk first.

    Without `force`, raises YarnEdgeError if a file has appeared under that name in the meantime, and leaves it alone. A file
    that replaces another is readable for nobody who could not read that one.
    """
    if flush:
        flush_file(partial)
    if force:
        with suppress(FileNotFoundError):
            partial.chmod(stat.S_IMODE(partial.stat().st_mode) & stat.S_IMODE(output.lstat().st_mode))
        partial.replace(output)
    else:
        try:
            output.hardlink_to(partial)  # unlike a rename, this fails if the name is taken
        except FileExistsError as error:
            raise _exists(output) from error
        except OSError:  # a file system without hard links
            if os.path.lexists(output):
                raise _exists(output) from None
            partial.replace(output)
    if flush and hasattr(os, "O_DIRECTORY"):
        folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def flush_file(path: Path) -> None:
    """Wait until the disk has all of a file."""
    descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, folder: Path, force: bool) -> None:
    """Give a finished folder its name. With `force` it takes the place of a folder of that name, otherwise at most of an empty
    one; OSError if it cannot."""
    old = beside(folder, ".replaced") if force and folder.exists() else None
    if old is not None:
        folder.rename(old)
    partial.rename(folder)
    if old is not None:
        shutil.rmtree(old)


def write_file(output: Path, data: bytes | str, force: bool, follow_links: bool = True) -> None:
    """Write a small file whole or not at all, text as UTF-8. A link stays, and the file that it stands for is written; without
    `follow_links` the file takes the link's place.

    Raises YarnEdgeError if the file cannot be written, or if it exists and `force` is not set.
    """
    target = output.resolve() if follow_links and output.is_symlink() else output
    with partial_file(target) as partial:
        with io.BufferedWriter(open_output(partial)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
        publish(partial, target, force)
