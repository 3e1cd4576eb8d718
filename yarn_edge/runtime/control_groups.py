"""The memory limits of Linux control groups: a container, a slice or a batch job may have less than the machine.

Source: the kernel's admin-guide, cgroup-v2.rst (memory.max, memory.current, memory.stat) and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """What a group may hold, and what is left of that, in bytes. File cache that was not used for long counts as free."""

    limit_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups keeps its values. controller: in the lines of OWN. inactive: in memory.stat."""

    folder: str
    controller: str
    limit: str
    used: str
    inactive: str


_VERSIONS = (
    _Version("", "", "memory.max", "memory.current", "inactive_file"),
    _Version("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_limits() -> list[MemoryLimit]:
    """The limits of this process's groups and of all above them; [] without limits, and where there are no control groups."""
    return [
        limit
        for version in _VERSIONS
        for folder in _groups(version)
        for limit in [_limit(folder, version)]
        if limit is not None
    ]


def _groups(version: _Version) -> Iterator[Path]:
    """The folders of this process's group and of those above it.

    A container may see its own group as the root, and not the path that OWN names: what is not there is passed.
    """
    top = ROOT / version.folder
    for line in _text(OWN).splitlines():
        _id, controllers, path = [*line.split(":", 2), "", ""][:3]
        if version.controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # the group is outside of what this process may see
            parts = []
        for n in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:n])
        return


def _limit(folder: Path, version: _Version) -> MemoryLimit | None:
    limit = _text(folder / version.limit).strip()
    if not limit.isdecimal():  # "max", or no such file
        return None
    used = _text(folder / version.used).strip()
    words = _text(folder / "memory.stat").split()
    inactive = int(dict(zip(words[::2], words[1::2], strict=False)).get(version.inactive, 0))
    held = int(used) - inactive if used.isdecimal() else 0
    return MemoryLimit(int(limit), max(0, int(limit) - max(0, held)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
