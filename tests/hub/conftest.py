"""A Hub with one tiny checkpoint, org/tiny, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import tiny
from support.hub_client import point_at
from support.hub_server import Hub, serving


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """org/tiny in shards, 1.5 MB."""
    root = tmp_path_factory.mktemp("hub")
    tiny.write_checkpoint(root / "org" / "tiny", form="shards", hidden_size=128, intermediate_size=256)
    return root


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, with this process pointed at it."""
    with serving(root) as hub:
        point_at(monkeypatch, hub, tmp_path / "cache")
        yield hub
