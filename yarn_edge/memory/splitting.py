"""Which layers go on which device: as the user says, or as memory suggests.

Automatically, the GPUs of this machine are filled first, because nothing is faster; what remains is shared by the workers in proportion
to their memory; only what fits on neither stays on the CPU. The workers come first in llama.cpp's order, so that the logits of the last
device need not cross the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.memory.choice import DoesNotFitError, gib
from yarn_edge.memory.parts import PartPlan
from yarn_edge.memory.plan import Simulation
from yarn_edge.progress import note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import Attention
from yarn_edge.runtime.layer_split import LayerSplit, given_split
from yarn_edge.runtime.machine import spare_bytes
from yarn_edge.runtime.workers import connect
from yarn_edge.split_flags import AUTO, SplitRequest


@dataclass(frozen=True)
class SplitPlace:
    """A split, and the bytes that may be used of each of its devices, by name; the CPU's is always among them."""

    split: LayerSplit
    budgets: dict[str, int]


@dataclass(frozen=True)
class SplitNeeds:
    """What a split is chosen for."""

    n_ctx: int | None = None
    kv_type: str = "f16"
    memory_bytes: int | None = None
    threads: int | None = None
    attention: Attention = "auto"


ANY_NEEDS = SplitNeeds()


def split_place(
    request: SplitRequest, path: Path, needs: SplitNeeds = ANY_NEEDS, gguf: GGUFFile | None = None
) -> SplitPlace:
    """Where the layers of this file go. Connects the workers. Raises YarnEdgeError, DoesNotFitError if no split can hold it."""
    file = gguf or read_gguf(path)
    n_layer = file.required_int("block_count")
    workers = connect(request.workers, request.insecure) if request.workers else []
    devices = [*workers, *ggml.gpus()]
    budgets = {device.name: _budget(device) for device in devices}
    budgets[ggml.cpu_device().name] = spare_bytes() if needs.memory_bytes is None else needs.memory_bytes
    if request.layers_on != AUTO:
        return SplitPlace(given_split(request.layers_on, n_layer, devices, path), budgets)
    split = _automatic(file, n_layer, devices, budgets, needs)
    note(f"--layers-on {split.name}")
    return SplitPlace(split, budgets)


def _budget(device: ggml.Device) -> int:
    """A worker says how much it lends; of a GPU, something is left for others."""
    free = ggml.device_memory(device)[0]
    return free if device.backend == "RPC" else spare_bytes(free)


def _automatic(
    file: GGUFFile, n_layer: int, devices: Sequence[ggml.Device], budgets: dict[str, int], needs: SplitNeeds
) -> LayerSplit:
    """Shares by memory first; then layers move away from devices that the simulation says are too full, at last to the CPU."""
    room = [budgets[d.name] for d in devices]
    counts = first_counts(n_layer, room, [d.backend != "RPC" for d in devices], file.weight_bytes // max(1, n_layer))
    for _ in range(n_layer * (len(devices) + 1)):
        split = LayerSplit(n_layer - sum(counts), tuple((d, n) for d, n in zip(devices, counts, strict=True) if n))
        if not split.parts:
            raise DoesNotFitError(
                f"{file.path}: not one layer fits on the devices: give workers more memory, or leave --rpc out"
            )
        with Simulation(
            file.path, device=split, threads=needs.threads, attention=needs.attention, gguf=file, budgets=budgets
        ) as simulation:
            n_ctx = needs.n_ctx or simulation.n_ctx_train
            parts = {part.device: part for part in simulation.plan(n_ctx, needs.kv_type).parts}
        full = [i for i, d in enumerate(devices) if counts[i] and parts[d.name].total_bytes > budgets[d.name]]
        if not full:
            return split
        counts = moved(
            counts, full[0], [_room(parts.get(d.name), budgets[d.name]) for d in devices], _layer_bytes(parts)
        )
    raise YarnEdgeError(f"{file.path}: no split was found: give one with --layers-on")


def _room(part: PartPlan | None, budget: int) -> int:
    return budget - (part.total_bytes if part else 0)


def _layer_bytes(parts: dict[str, PartPlan]) -> int:
    """The most that a layer takes on any device, with its cache."""
    return max((p.weights_bytes + p.kv_bytes) // p.layers for p in parts.values() if p.layers)


def first_counts(n_layer: int, room: Sequence[int], near: Sequence[bool], layer_bytes: int) -> list[int]:
    """Layers by device from its room in bytes: devices of this machine (near) as many as fit, the others in proportion."""
    counts, left = [0] * len(room), n_layer
    for i, is_near in enumerate(near):
        if is_near:
            counts[i] = min(left, room[i] // max(1, layer_bytes))
            left -= counts[i]
    far = [i for i, is_near in enumerate(near) if not is_near]
    total = sum(room[i] for i in far)
    if not total:
        return counts
    done, given = 0, 0
    for i in far:
        done += room[i]
        counts[i] = (2 * left * done + total) // (2 * total) - given  # rounded
        given += counts[i]
    return counts


def moved(counts: Sequence[int], full: int, room: Sequence[int], layer_bytes: int) -> list[int]:
    """The counts with one layer less on the device `full`: it goes where the most room is, to the CPU if nowhere is enough."""
    changed = list(counts)
    changed[full] -= 1
    best = max((i for i in range(len(counts)) if i != full), key=lambda i: room[i], default=None)
    if best is not None and room[best] >= layer_bytes:
        changed[best] += 1
    return changed


def check_parts(path: Path, parts: Sequence[PartPlan], budgets: dict[str, int]) -> None:
    """Raises DoesNotFitError if a device has no room for its part."""
    for part in parts:
        if part.total_bytes > budgets[part.device]:
            raise DoesNotFitError(
                f"{path}: {part.layers} layers do not fit on {part.device} ({part.description}): they take {gib(part.total_bytes)} even "
                f"with a short context, and {gib(budgets[part.device])} may be used there: give it fewer with --layers-on"
            )


def parts_line(parts: Sequence[PartPlan]) -> str:
    """What goes where, in one line."""
    return "; ".join(
        f"{p.device} ({p.description}): {p.layers} layers, {gib(p.total_bytes)} (weights {gib(p.weights_bytes)}, cache "
        f"{gib(p.kv_bytes)}, buffers {gib(p.compute_bytes)})"
        for p in parts
    )
