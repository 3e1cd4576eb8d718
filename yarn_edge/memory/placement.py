"""Where a conversation runs and how much of it there is room for: the device, the context and the type of the cache.

What was asked for is taken or refused with what would fit, never made smaller in silence. What was not asked for is
chosen by `memory_plan`: a GPU that holds all of the model and of the context (or much of it), else the CPU; all of the
context that the model was made for; a cache in f16, or q8_0 where f16 does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.choice import ContextChoice, DoesNotFitError, choose_context
from yarn_edge.memory.plan import Simulation
from yarn_edge.progress import note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import FlashAttention
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.machine import spare_bytes
from yarn_edge.runtime.model import Model

ENOUGH_CTX = 8192  # a GPU with room for so many tokens is taken rather than a CPU with room for more


@dataclass(frozen=True)
class Wanted:
    """What was asked for, None for what may be chosen.

    needed_ctx: of a model (of which only the vocabulary is loaded) the tokens that a prompt and its answer take.
    memory_bytes: the budget on the backend that was asked for, or on the CPU. threads: that will run.
    """

    backend: str | None = None
    ctx: int | None = None
    kv_type: str | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    flash_attention: FlashAttention = "auto"
    needed_ctx: Callable[[Model], int] | None = None


@dataclass(frozen=True)
class Placement:
    """device: None for the CPU; choice: context, cache type, bytes and the reason."""

    device: ggml.Device | None
    choice: ContextChoice


def place(path: Path, wanted: Wanted) -> Placement:
    """The placement of a model. Raises YarnEdgeError for a backend that is not there, DoesNotFitError for too much."""
    *gpus, last = device_places(wanted.backend)
    for device in gpus:
        try:
            return _on(path, device, wanted, enough=ENOUGH_CTX)
        except DoesNotFitError as refusal:
            note(f"not on {device.name if device else 'the CPU'}: {refusal}")
    return _on(path, last, wanted, enough=0)


def device_places(backend: str | None) -> list[ggml.Device | None]:
    """Where a model may go, the first that is good enough: the GPUs, then the CPU (None); of one backend its first device.

    Raises YarnEdgeError where that backend is not there.
    """
    if backend is None:
        found = [d for d in ggml.devices() if d.kind in ("gpu", "igpu") and ggml.device_memory(d)[1]]
        return [*found, None]
    devices = devices_of(backend)
    if not devices:
        raise YarnEdgeError(missing(backend))
    return [None if devices[0].kind == "cpu" else devices[0]]


def budget_bytes(device: ggml.Device | None, backend: str | None, given: int | None) -> int:
    """What may be taken there: what was given for it, or what is free, less what others need."""
    if given is not None and (device is None or backend is not None):
        return given
    return spare_bytes(None if device is None else ggml.device_memory(device)[0])


def _on(path: Path, device: ggml.Device | None, wanted: Wanted, enough: int) -> Placement:
    """Raises DoesNotFitError where fewer tokens would fit than all of the context, and than `enough`."""
    with Simulation(path, device=device, threads=wanted.threads, flash_attention=wanted.flash_attention) as simulation:
        ctx = wanted.ctx
        if ctx is None and wanted.needed_ctx is not None:
            ctx = min(wanted.needed_ctx(simulation.model), simulation.n_ctx_train)
        budget = budget_bytes(device, wanted.backend, wanted.memory_bytes)
        choice = choose_context(simulation, budget, ctx, wanted.kv_type)
        if choice.n_ctx < min(enough, ctx or simulation.n_ctx_train):
            raise DoesNotFitError(choice.reason)
    return Placement(device, choice)
