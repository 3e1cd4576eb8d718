"""Which files llama.cpp has loaded on this machine before: empty files in the user's cache folder, named by a digest.

A file is recognized by what its file system says of it, which costs nothing, and otherwise by its content
(`yarn_edge.gguf.identity`), so that a copy or a renamed file is not unknown.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from yarn_edge.cache_folder import user_cache_folder
from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.identity import model_identity
from yarn_edge.progress import note
from yarn_edge.writer import write_file

Part = Literal["vocabulary", "model"]

MAX_RECORDS = 2000
_FORMAT = 1  # to be raised when more is tried in the first load
_known: set[str] = set()  # by this process, also where the folder cannot be written


def is_known(file: GGUFFile, part: Part, version: str) -> bool:
    """Whether `part` of the file, or all of it, was loaded by this version of llama.cpp."""
    parts: tuple[Part, ...] = ("model",) if part == "model" else ("model", "vocabulary")
    if any(_recorded(_by_state(file, p, version)) for p in parts):
        return True
    identity = model_identity(file)
    for p in parts:
        if _recorded(_digest(identity, p, version)):
            _record([_by_state(file, p, version)])
            return True
    return False


def remember(file: GGUFFile, part: Part, version: str) -> None:
    """Record that `part` of the file was loaded. Says so if that is not possible."""
    _record([_by_state(file, part, version), _digest(model_identity(file), part, version)])


def _folder() -> Path:
    return user_cache_folder() / "loaded"


def _digest(*what: object) -> str:
    return hashlib.sha256(repr((_FORMAT, *what)).encode("utf-8", "surrogateescape")).hexdigest()


def _by_state(file: GGUFFile, part: Part, version: str) -> str:
    """The time of the last change of the inode is among it, which nobody can set."""
    states = [path.stat() for path in file.shards or (file.path,)]
    return _digest([(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states], part, version)


def _recorded(name: str) -> bool:
    return name in _known or (_folder() / name).is_file()


def _record(names: list[str]) -> None:
    _known.update(names)
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            write_file(folder / name, b"", force=True)
        _forget_oldest(folder)
    except (OSError, YarnEdgeError) as error:
        why = os_error(error, folder) if isinstance(error, OSError) else error
        note(f"not remembered, so the next start checks the file again: {why}")


def _forget_oldest(folder: Path) -> None:
    records = list(folder.iterdir())
    if len(records) > MAX_RECORDS:
        for path in sorted(records, key=lambda p: p.stat().st_mtime_ns)[: len(records) - MAX_RECORDS]:
            path.unlink(missing_ok=True)
