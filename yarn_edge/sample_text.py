"""A text for measurements: the books of Ruth and 1 Samuel (King James Version, public domain), about 15,000 tokens."""

from __future__ import annotations

from importlib import resources


def sample_text() -> str:
    """The bundled text, with paragraphs separated by blank lines."""
    return (resources.files("yarn_edge") / "data" / "ruth-samuel.txt").read_text(encoding="utf-8")
