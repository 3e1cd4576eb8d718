"""Whether several contexts fit into memory at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from yarn_edge.memory.plan import FAST_BYTES, Simulation
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.machine import available_bytes


def fit_together(contexts: Sequence[tuple[Simulation, ContextSettings]]) -> bool:
    """Whether the free memory, and that of each device, holds `bytes_together`. A device that reports no memory is not judged."""
    for device, needed in bytes_together(contexts).items():
        free, total = (available_bytes(), 1) if device is None else ggml.device_memory(device)
        if total and needed > free:
            return False
    return True


def bytes_together(contexts: Sequence[tuple[Simulation, ContextSettings]]) -> dict[ggml.Device | None, int]:
    """Bytes that these contexts will add to what this process holds, by device (None: the CPU).

    Contexts of the same simulation share its weights, which count once, and all of them the code of our attention kernels.
    """
    needed: Counter[ggml.Device | None] = Counter()
    loaded: list[Simulation] = []
    compiled = False
    for simulation, settings in contexts:
        plan = simulation.plan_of(settings)
        if isinstance(simulation.device, LayerSplit):
            places = (None, *(device for device, _n in simulation.device.parts))
            for device, part in zip(places, plan.parts, strict=True):
                needed[device] += part.total_bytes - (part.weights_bytes if simulation in loaded else 0)
            needed[None] -= simulation.process_bytes
            loaded.append(simulation)
            continue
        weights = plan.weights_bytes + plan.repacked_bytes
        added = plan.taken_bytes
        if simulation.device is None:
            added -= simulation.process_bytes + (FAST_BYTES if settings.fast and compiled else 0)
            compiled |= settings.fast
        else:
            weights = simulation.weights.on_device
        needed[simulation.device] += added - (weights if simulation in loaded else 0)
        loaded.append(simulation)
    return dict(needed)
