"""A mapped file whose pages are let go of takes no memory of the process, and reads as before."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest

from yarn_edge.convert.moments.mapped import MappedFile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its mappings")
BYTES = 1 << 20


def resident_kib(path: Path) -> int:
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.search(re.escape(f"{path}\n") + r"(?:.*\n)*?Rss:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1])


def test_pages_are_let_go(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(bytes(range(256)) * (BYTES // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        whole = mapped[:]
        assert resident_kib(path) == BYTES >> 10
        MappedFile(path).let_go()
        assert resident_kib(path) == 0
        assert mapped[:] == whole


def test_a_private_mapping_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(BYTES))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:5] = b"bytes"
        MappedFile(path).let_go()
        assert mapped[:5] == b"bytes"
