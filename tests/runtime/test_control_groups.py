"""Limits of control groups, in folders that look like those of Linux."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from yarn_edge.runtime import control_groups
from yarn_edge.runtime.machine import available_bytes, machine_bytes

GIB = 1 << 30
TOTAL, FREE = 64 * GIB, 40 * GIB
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNLIMITED = 9223372036854771712  # what version 1 says for "no limit"
# name -> (/proc/self/cgroup, folder -> (names, limit, used, inactive file cache), machine_bytes, available_bytes)
CASES: dict[str, tuple[str, dict[str, tuple[tuple[str, str, str], object, object, int]], int, int]] = {
    "none": ("", {}, TOTAL, FREE),
    "v2, a container's root": ("0::/\n", {"": (V2, 8 * GIB, 3 * GIB, GIB)}, 8 * GIB, 6 * GIB),
    "v2, no limit": ("0::/user.slice\n", {"user.slice": (V2, "max", 3 * GIB, GIB)}, TOTAL, FREE),
    "v2, above": ("0::/jobs/7\n", {"jobs/7": (V2, "max", GIB, 0), "jobs": (V2, 16 * GIB, 15 * GIB, 0)}, 16 * GIB, GIB),
    "v2, both, one of them nearly full": (
        "0::/jobs/7\n",
        {"jobs/7": (V2, 8 * GIB, GIB, 0), "jobs": (V2, 16 * GIB, 15 * GIB, 0)},
        8 * GIB,
        GIB,
    ),
    "v2, a path that the container does not see": ("0::/docker/abc\n", {"": (V2, 4 * GIB, GIB, 0)}, 4 * GIB, 3 * GIB),
    "v2, a group outside": ("0::/../other\n", {"": (V2, 4 * GIB, GIB, 0)}, 4 * GIB, 3 * GIB),
    "v1": (
        "5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n",
        {"memory/box": (V1, 8 * GIB, 7 * GIB, 2 * GIB), "memory": (V1, UNLIMITED, 30 * GIB, 0)},
        8 * GIB,
        3 * GIB,
    ),
    "v1, of another group": ("4:memory:/box\n", {"memory/other": (V1, GIB, 0, 0)}, TOTAL, FREE),
    "more than the machine": ("0::/\n", {"": (V2, 100 * GIB, GIB, 0)}, TOTAL, FREE),
    "more held than allowed": ("0::/\n", {"": (V2, 4 * GIB, 5 * GIB, 0)}, 4 * GIB, 0),
    "more cache than held": ("0::/\n", {"": (V2, 4 * GIB, GIB, 2 * GIB)}, 4 * GIB, 4 * GIB),
    "how much is held is not told": ("0::/\n", {"": (V2, 4 * GIB, "", 0)}, 4 * GIB, 4 * GIB),
}


@pytest.mark.parametrize("case", CASES)
def test_limits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, groups, total, free = CASES[case]
    (tmp_path / "own").write_text(own)
    for name, (names, limit, used, inactive) in groups.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_anon 7\n{names[2]} {inactive}\nactive_file 9\n")
    monkeypatch.setattr(control_groups, "OWN", tmp_path / "own")
    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "groups")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=TOTAL, available=FREE))
    assert (machine_bytes(), available_bytes()) == (total, free)
