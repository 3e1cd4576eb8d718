"""This process as a client of a Hub on loopback: its address, its cache, small blocks and slices, and short waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from yarn_edge.convert import one_pass
from yarn_edge.hub import failures, read_ahead, weights

from support.hub_server import Hub

BLOCK_BYTES, START_BYTES = 1 << 14, 1 << 13


def point_at(patch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """Let huggingface_hub talk to `hub`, and keep what it downloads in `cache`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol has no place here
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(failures, "FIRST_WAIT_S", 0.001)
    patch.setattr(read_ahead, "BLOCK_BYTES", BLOCK_BYTES)
    patch.setattr(one_pass, "SLICE_WEIGHTS", 1 << 11)
    patch.setattr(weights, "_START_BYTES", START_BYTES)
    close_session()


def streamed_ranges(hub: Hub) -> int:
    """How many ranges were asked of the storage."""
    return sum(path.startswith("/cdn/") and bool(wanted) for _method, path, wanted, _token in hub.requests)
