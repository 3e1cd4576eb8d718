"""The folder for files that programs can rebuild: `chat` and `serve` keep states there, loading keeps what has been loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_folder() -> Path:
    """This system's folder for files that programs can rebuild."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "yarn-edge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "yarn-edge"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yarn-edge"
