"""Models that tests share: made by the first that asks, once for all workers of a run."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


class Shelf:
    """A folder of one run. A thing on it is a folder, made under a lock, since every worker of pytest-xdist may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "shelf"
        self.folder.mkdir(exist_ok=True)

    def made_once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name` as `make` filled it. What failed half-way is made again by the next that asks."""
        path, done = self.folder / name, self.folder / f"{name}.done"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                done.touch()
        return path
