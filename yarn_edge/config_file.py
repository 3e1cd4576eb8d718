"""config.json of a checkpoint and what lies beside it, read with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line, os_error

MAX_JSON_BYTES = 100_000_000
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class ConfigFile:
    """config.json and what lies beside it, as far as positions need it."""

    name: str
    values: Mapping[str, Any]
    siblings: frozenset[str] = frozenset()

    @property
    def short(self) -> str:
        """The file's name without its folder: for provenance, which travels with the GGUF."""
        return Path(self.name).name

    def error(self, key: str, what: str) -> YarnEdgeError:
        """An error that names this file and `key`."""
        return YarnEdgeError(f"{self.name}: {key} {what}")

    def integer(self, key: str) -> int | None:
        """A whole number above 0, or None where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.error(key, f"is {one_line(repr(value), 60)}, need a whole number above 0")
        return value

    def required_integer(self, key: str) -> int:
        """A whole number above 0 that must be there."""
        value = self.integer(key)
        if value is None:
            raise self.error(key, "is missing")
        return value


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse what Git LFS left in place of a file, by how it starts."""
    if start.startswith(POINTER):
        raise YarnEdgeError(f"{path}: is a pointer of Git LFS, not the file itself: run git lfs pull in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a YarnEdgeError that says what is wrong with it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise YarnEdgeError(f"{path}: {path.stat().st_size} bytes are too many for this file")
        data = path.read_bytes()
        refuse_pointer(path, data)
        value = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise os_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise YarnEdgeError(f"{path}: not valid JSON: {one_line(str(error), 120)}") from error
    if not isinstance(value, dict):
        raise YarnEdgeError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_config(folder: Path) -> ConfigFile:
    """config.json of a checkpoint folder."""
    if not folder.is_dir():
        what = "is a file, expected a checkpoint folder" if folder.exists() else "no such checkpoint folder"
        raise YarnEdgeError(f"{folder}: {what}")
    path = folder / "config.json"
    if not path.exists():
        raise YarnEdgeError(f"{folder}: has no config.json, so it is not a Hugging Face checkpoint")
    return ConfigFile(str(path), read_json(path), frozenset(p.name for p in folder.glob("*.py")))
