"""Plain English for measuring: the books of Ruth and 1 Samuel (King James Version, public domain), about 15,000 tokens."""

from __future__ import annotations

from importlib import resources


def sample_text() -> str:
    """The text that comes with the package, paragraphs separated by blank lines."""
    return (resources.files("yarn_edge") / "data" / "ruth-samuel.txt").read_text(encoding="utf-8")
