"""What each device takes of a model that is split over several: weights, cache and buffers, in bytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.memory.log_sizes import ContextSizes, is_host
from yarn_edge.memory.weights import OUTPUT, TOKEN_EMBEDDINGS, repacked
from yarn_edge.runtime import ggml
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.load_log import MIB

_LAYER = re.compile(r"blk\.(\d+)\.")
# llama-arch.cpp, LLM_TENSOR_LAYER_INPUT: always on the CPU.
_INPUT = (TOKEN_EMBEDDINGS, "token_types.weight", "position_embd.weight", "per_layer_token_embd.weight")
_INPUT_NORM = "token_embd_norm."
# On a GPU of this machine: kernels, cuBLAS and its workspace. 92 to 94 MiB on an H200 with CUDA 13, whatever the model (docs/cuda.md).
# A worker's process has them apart from what it lends.
DEVICE_FIRST_RUN_BYTES = 100 * MIB


@dataclass(frozen=True)
class PartPlan:
    """What one device takes. layers: their number; other_bytes: scratch memory and kernels, on the CPU the process."""

    device: str
    description: str
    layers: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.other_bytes


def split_parts(
    split: LayerSplit, weights: Mapping[str, int], sizes: ContextSizes, of_process: tuple[int, int]
) -> tuple[PartPlan, ...]:
    """Every device's part, that of the CPU first even if it has no layers.

    weights: of `weights_by_device`. of_process: (output, process) bytes. On the CPU only tensors that stay there count: while the file
    is sent to the devices, it is mapped, and the system can drop its pages at any time.
    """
    cpu = ggml.cpu_device()
    compute = compute_by_device(split, sizes.compute_on)
    parts = []
    for device, layers in ((cpu, split.cpu_layers), *split.parts):
        other = sum(of_process) if device == cpu else sizes.work if device.backend == "RPC" else DEVICE_FIRST_RUN_BYTES
        held = weights.get(device.name, 0), sizes.kv_on.get(device.name, 0), compute.get(device.name, 0)
        parts.append(PartPlan(device.name, device.description, layers, *held, other))
    return tuple(parts)


def weights_by_device(file: GGUFFile, unused: Collection[str], split: LayerSplit) -> dict[str, int]:
    """Bytes of the weights on each device, on the CPU with the copies that it rearranges."""
    cpu, last = ggml.cpu_device(), split.devices[-1]
    found: dict[str, int] = {}
    of_cpu = []
    for tensor in file.tensors.values():
        if tensor.name in unused:
            continue
        match = _LAYER.match(tensor.name)
        if match:
            device = split.device_of(int(match[1]))
        else:
            device = cpu if tensor.name in _INPUT or tensor.name.startswith(_INPUT_NORM) else last
        found[device.name] = found.get(device.name, 0) + tensor.n_bytes
        if device == cpu and tensor.name != TOKEN_EMBEDDINGS:
            of_cpu.append(tensor.name)
    if OUTPUT not in file.tensors and TOKEN_EMBEDDINGS in file.tensors:  # tied: loaded again as the output
        found[last.name] = found.get(last.name, 0) + file.tensors[TOKEN_EMBEDDINGS].n_bytes
    if of_cpu:
        found[cpu.name] += repacked(file, unused, of_cpu).n_bytes
    return found


def compute_by_device(split: LayerSplit, compute_on: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the compute buffers by device. compute_on: by the names of buffer types."""
    names = {ggml.memory_name(device): device.name for device in split.devices}
    found: dict[str, int] = {}
    for where, size in compute_on.items():
        name = ggml.cpu_device().name if is_host(where) else names.get(where, where)
        found[name] = found.get(name, 0) + size
    return found


def fullest_share(parts: Sequence[PartPlan], budgets: Mapping[str, int]) -> int:
    """The bytes of all budgets together that correspond to the fullest device; without budgets, the sum of the parts."""
    if not budgets:
        return sum(part.total_bytes for part in parts)
    share = max(part.total_bytes / max(1, budgets[part.device]) for part in parts)
    return round(share * sum(budgets[part.device] for part in parts))
