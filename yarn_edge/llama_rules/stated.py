"""What a file's rope keys state, read without refusing anything: a value of the wrong kind counts as absent.

For the doctor, which must see contradictory files through; whoever runs a file reads it with `GGUFFile.number`.
"""

from __future__ import annotations

import math

from yarn_edge.gguf.file import GGUFFile


def stated_number(file: GGUFFile, name: str) -> float | None:
    """`{arch}.{name}` if it is a finite number, else None."""
    value = file.metadata.get(f"{file.architecture}.{name}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def scaling_key(file: GGUFFile, name: str) -> str:
    """The full name of `{arch}.rope.scaling.{name}`."""
    return f"{file.architecture}.rope.scaling.{name}"


def stated_type(file: GGUFFile) -> str | None:
    """The scaling type, None without one; what is no string is "", which llama.cpp knows as little as any other."""
    kind = file.metadata.get(scaling_key(file, "type"))
    return kind if kind is None or isinstance(kind, str) else ""


def stated_factor(file: GGUFFile) -> float:
    """The new key, else the old one, as llama.cpp reads it; 0 for none."""
    new = stated_number(file, "rope.scaling.factor")
    return (stated_number(file, "rope.scale_linear") if new is None else new) or 0.0


def stated_origin(file: GGUFFile) -> float:
    """The original context in tokens, 0 for none."""
    return stated_number(file, "rope.scaling.original_context_length") or 0.0


def stated_context(file: GGUFFile) -> float:
    """The context in tokens, 0 for none."""
    return stated_number(file, "context_length") or 0.0
