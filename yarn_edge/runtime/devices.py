"""Backends by the names that users know, and the devices of this build and machine that belong to each of them.

A missing backend is never replaced by another one: callers get an empty list and report it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yarn_edge.flags import BACKENDS

if TYPE_CHECKING:
    from yarn_edge.runtime.ggml import Device


def devices_of(backend: str) -> list[Device]:
    """The devices of one backend, in ggml's order; empty if this build or machine has none."""
    from yarn_edge.runtime import ggml

    return [d for d in ggml.devices() if d.backend in BACKENDS[backend]]


def backend_of(device: Device) -> str:
    """The key of BACKENDS for a device; ggml's own name if there is no such key."""
    return next((name for name, own in BACKENDS.items() if device.backend in own), device.backend)


def missing(backend: str) -> str:
    """The error message for a missing backend, with the devices that there are."""
    from yarn_edge.runtime import ggml

    have = ", ".join(f"{d.name} ({d.description})" for d in ggml.devices())
    return f"no {backend} device: this build of llama-cpp-python on this machine has {have}"
