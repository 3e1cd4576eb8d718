"""Layers of one model on several devices.

llama.cpp takes them in order (llama-model.cpp, load_tensors): the first layers on the CPU, then each device's share, and the output
on the last device. The token embeddings are always on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime import ggml
from yarn_edge.runtime.ggml import Device
from yarn_edge.split_flags import layer_numbers


@dataclass(frozen=True)
class LayerSplit:
    """cpu_layers: how many stay on the CPU; parts: each device and its number of layers, at least one."""

    cpu_layers: int
    parts: tuple[tuple[Device, int], ...]
    kind = "split"
    backend = "split"

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device that has layers, the CPU first."""
        cpu = (ggml.cpu_device(),) if self.cpu_layers else ()
        return (*cpu, *(device for device, _n in self.parts))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of layers on each of `devices`."""
        return (*((self.cpu_layers,) if self.cpu_layers else ()), *(n for _device, n in self.parts))

    @property
    def name(self) -> str:
        """As --layers-on takes it: "cpu=10,rpc0=20"."""
        pairs = zip(self.devices, self.counts, strict=True)
        return ",".join(f"{device.name.lower()}={n}" for device, n in pairs)

    @property
    def description(self) -> str:
        """The devices, with their descriptions."""
        return ", ".join(f"{device.name}: {device.description}" for device in self.devices)

    def device_of(self, layer: int) -> Device:
        """Where a layer is."""
        for device, n in zip(self.devices, self.counts, strict=True):
            if layer < n:
                return device
            layer -= n
        return self.devices[-1]  # the output


def given_split(text: str, n_layer: int, devices: Sequence[Device], path: object) -> LayerSplit:
    """The split that --layers-on asks for. Layers that it does not name stay on the CPU. Raises YarnEdgeError."""
    numbers = layer_numbers(text)
    cpu = numbers.pop("cpu", None)
    by_name = {device.name.lower(): device for device in devices if device.kind in ("gpu", "igpu")}
    unknown = next((name for name in numbers if name not in by_name), None)
    if unknown is not None:
        names = ", ".join(["cpu", *by_name])
        raise YarnEdgeError(f"--layers-on {text}: there is no device {unknown} here: there are {names}")
    total = sum(numbers.values())
    if total + (cpu or 0) > n_layer or (cpu is not None and total + cpu < n_layer):
        raise YarnEdgeError(
            f"--layers-on {text}: {total + (cpu or 0)} layers in all, but {path} has {n_layer} (those that no device is given stay on "
            "the CPU)"
        )
    parts = tuple((by_name[name], n) for name, n in numbers.items() if n)
    return LayerSplit(n_layer - total, parts)
