"""Where a conversation runs, and with how much room: the device, the context and the cache type.

A request is met, or refused with what would fit; it is never silently reduced. Everything else is chosen by `choice`: a GPU
that holds the whole model and the context (or much of it), else the CPU; the whole context that the model was trained for; an
f16 cache, or q8_0 if f16 does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.memory.choice import ContextChoice, DoesNotFitError, choose_context
from yarn_edge.memory.plan import LEAST_CTX, Simulation
from yarn_edge.memory.splitting import SplitNeeds, check_parts, parts_line, split_place
from yarn_edge.progress import note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import Attention
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.machine import spare_bytes
from yarn_edge.runtime.model import Model
from yarn_edge.split_flags import NO_SPLIT, SplitRequest

ENOUGH_CTX = 8192  # a GPU with room for this many tokens is better than a CPU with room for more


@dataclass(frozen=True)
class Wanted:
    """The request; None for whatever may be chosen.

    needed_ctx: returns how many tokens a prompt and its answer take, given a model of which only the vocabulary is loaded.
    memory_bytes: the budget on the requested backend, or on the CPU. threads: how many will run.
    adapter_bytes: memory of what is added to the weights. split: how the layers are to be split, if at all.
    """

    backend: str | None = None
    ctx: int | None = None
    kv_type: str | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    attention: Attention = "auto"
    needed_ctx: Callable[[Model], int] | None = None
    adapter_bytes: int = 0
    split: SplitRequest = NO_SPLIT


@dataclass(frozen=True)
class Placement:
    """device: a split for several, None for the CPU. choice: context, cache type, bytes, and the reason for them.

    budgets: of a split, the bytes that may be used of each device.
    """

    device: ggml.Device | LayerSplit | None
    choice: ContextChoice
    budgets: Mapping[str, int] = field(default_factory=dict)


def place(path: Path, wanted: Wanted, gguf: GGUFFile | None = None) -> Placement:
    """The placement of a model. gguf: its header, if it has been read.

    Raises YarnEdgeError if the backend is missing, DoesNotFitError if the request is too large.
    """
    if wanted.split:
        return _on_several(path, wanted, gguf)
    *gpus, last = device_places(wanted.backend)
    for device in gpus:
        try:
            return _on(path, device, wanted, ENOUGH_CTX, gguf)
        except DoesNotFitError as refusal:
            note(f"not on {device.name if device else 'the CPU'}: {refusal}")
    return _on(path, last, wanted, 0, gguf)


def _on_several(path: Path, wanted: Wanted, gguf: GGUFFile | None) -> Placement:
    if wanted.backend is not None:
        raise YarnEdgeError("--backend puts all layers on one device: leave it out, or --rpc and --layers-on")
    needs = SplitNeeds(wanted.ctx, wanted.kv_type or "f16", wanted.memory_bytes, wanted.threads, wanted.attention)
    if wanted.ctx is None and wanted.needed_ctx is not None:
        with Model(path, vocab_only=True, gguf=gguf) as vocabulary:
            trained = vocabulary.gguf.required_int("context_length")
            needs = replace(needs, n_ctx=min(wanted.needed_ctx(vocabulary), trained))
    place = split_place(wanted.split, path, needs, gguf)
    if not place.split.parts:
        raise YarnEdgeError(f"--layers-on {place.split.name} puts all layers on the CPU: use --backend cpu instead")
    with Simulation(
        path, device=place.split, threads=wanted.threads, attention=wanted.attention, gguf=gguf, budgets=place.budgets
    ) as simulation:
        parts = simulation.plan(LEAST_CTX, needs.kv_type).parts
        check_parts(path, parts, place.budgets)
        budget = sum(place.budgets[part.device] for part in parts) - wanted.adapter_bytes
        choice = choose_context(simulation, budget, needs.n_ctx, wanted.kv_type)
    note(parts_line(choice.plan.parts))
    return Placement(place.split, choice, place.budgets)


def device_places(backend: str | None) -> list[ggml.Device | None]:
    """Devices for a model in order of preference: the GPUs, then the CPU (None). With `backend`, its first device only.

    Raises YarnEdgeError if that backend is missing.
    """
    if backend is None:
        return [*(gpu for gpu in ggml.gpus() if ggml.device_memory(gpu)[1]), None]
    devices = devices_of(backend)
    if not devices:
        raise YarnEdgeError(missing(backend))
    return [None if devices[0].kind == "cpu" else devices[0]]


def budget_bytes(device: ggml.Device | None, backend: str | None, given: int | None) -> int:
    """The memory budget there: the given one if it is for this device, else `spare_bytes`."""
    if given is not None and (device is None or backend is not None):
        return given
    return spare_bytes(None if device is None else ggml.device_memory(device)[0])


def _on(path: Path, device: ggml.Device | None, wanted: Wanted, enough: int, gguf: GGUFFile | None) -> Placement:
    """Raises DoesNotFitError if neither the whole context nor `enough` tokens would fit."""
    with Simulation(path, device=device, threads=wanted.threads, attention=wanted.attention, gguf=gguf) as simulation:
        ctx = wanted.ctx
        if ctx is None and wanted.needed_ctx is not None:
            ctx = min(wanted.needed_ctx(simulation.model), simulation.n_ctx_train)
        budget = max(0, budget_bytes(device, wanted.backend, wanted.memory_bytes) - wanted.adapter_bytes)
        choice = choose_context(simulation, budget, ctx, wanted.kv_type)
        if choice.n_ctx < min(enough, ctx or simulation.n_ctx_train):
            raise DoesNotFitError(choice.reason)
    return Placement(device, choice)
