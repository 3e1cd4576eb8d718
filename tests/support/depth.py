"""How deep the tests go: `make test` is cut to minutes, `make test-all` (pytest --full) is not (docs/testing.md)."""

from __future__ import annotations

full = False  # set by conftest before the tests are collected
CUT_LAYERS, ALL_LAYERS = 4, 30


def smol_layers() -> int:
    """Layers of the real small model behind most tests. A wrong position shows in the first ones already."""
    return ALL_LAYERS if full else CUT_LAYERS
