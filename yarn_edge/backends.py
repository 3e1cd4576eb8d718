"""The backends by the names users know, and the devices of this build and machine that belong to each.

A backend that is not there is never replaced by another: callers get an empty list and say so.
"""

from __future__ import annotations

from yarn_edge import ggml

# --backend NAME -> the names that ggml's backend libraries give themselves.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPU",),
    "cuda": ("CUDA",),
    "metal": ("MTL", "Metal"),
    "vulkan": ("Vulkan",),
}


def devices_of(backend: str) -> list[ggml.Device]:
    """The devices of one backend, in ggml's order; empty where this build or machine has none."""
    return [d for d in ggml.devices() if d.backend in BACKENDS[backend]]


def missing(backend: str) -> str:
    """Why there is nothing to run on, with what there is."""
    have = ", ".join(f"{d.name} ({d.description})" for d in ggml.devices())
    return f"no {backend} device: this build of llama-cpp-python on this machine has {have}"
