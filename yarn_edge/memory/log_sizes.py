"""The sizes of one context: what llama.cpp logs while it makes one, and what it does not log.

Caches of several parts (sliding windows, hybrid models) log a line for each part; the parts are added up.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.memory.weights import TOKEN_EMBEDDINGS
from yarn_edge.runtime.ggml import Device
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.load_log import MIB, buffers_in, bytes_of, flash_attention_in

_SIZE = re.compile(r"(?:llama_kv_cache|llama_memory_recurrent|llama_dsv4_comp_state): (?:.*, )?size = +([\d.]+) MiB")
_RECURRENT = re.compile(r"llama_memory_recurrent: (?:.*, )?size = +([\d.]+) MiB")
_CACHED_ON = re.compile(r"llama_(?:kv_cache|memory_recurrent): layer +\d+: dev = (\S+)")
_CELLS = re.compile(r"llama_kv_cache: size = .*\( *(\d+) cells")


@dataclass(frozen=True)
class ContextSizes:
    """The sizes of one context in bytes. recurrent: the part of `kv` that holds states; on_device: that of `compute` there; work: ggml's
    scratch memory; cells: their number. kv_on, compute_on: of a split model, the parts of `kv` by device, of `compute` by buffer type.
    """

    kv: int
    recurrent: int
    compute: int
    on_device: int
    output: int
    work: int
    cells: int
    kv_on: dict[str, int] = field(default_factory=dict)
    compute_on: dict[str, int] = field(default_factory=dict)

    def beyond(self, near: ContextSizes, more: float) -> ContextSizes:
        """These sizes and `more` times what they have more than those of `near`."""

        def grown(far: Any, before: Any) -> Any:
            if isinstance(far, dict):
                return {name: grown(value, before.get(name, value)) for name, value in far.items()}
            return far + round(more * (far - before))

        return ContextSizes(**{name: grown(value, getattr(near, name)) for name, value in vars(self).items()})


def context_sizes(
    log: str, file: GGUFFile, n_batch: int, threads: int, device: Device | LayerSplit | None
) -> ContextSizes:
    """The sizes of one context from its log. n_batch: tokens of one graph. device: that of layers and cache, None for the CPU."""
    buffers = buffers_in(log)
    compute = {where: size for where, what, size in buffers if what == "compute"}
    on_device = 0
    if device is not None:
        on_device = sum(size for where, size in compute.items() if where == device.name or not is_host(where))
    cells = [int(count) for count in _CELLS.findall(log)]
    work = _product_bytes(file, n_batch) + threads * MIB // 2  # plus a tile for each thread (tiled.cpp)
    if not flash_attention_in(log):  # the scores of the batch in half precision, to multiply the values with
        work += max(cells, default=0) * n_batch * _greatest(file, "attention.head_count") * 2
    kv = sum(map(bytes_of, _SIZE.findall(log)))
    recurrent = sum(map(bytes_of, _RECURRENT.findall(log)))
    output = sum(size for _where, what, size in buffers if what == "output")
    split = (_cache_by_device(log), compute) if isinstance(device, LayerSplit) else ()
    return ContextSizes(kv, recurrent, sum(compute.values()), on_device, output, work, sum(cells), *split)


def _cache_by_device(log: str) -> dict[str, int]:
    """Bytes of the caches by device: the layers of one cache share its size alike."""
    found: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for line in log.splitlines():
        if match := _CACHED_ON.search(line):
            layers[match[1]] += 1
        elif (match := _SIZE.search(line)) and layers:
            for device, n in layers.items():
                found[device] += bytes_of(match[1]) * n // layers.total()
            layers.clear()
    return dict(found)


def allocated_bytes(log: str) -> int:
    """Bytes of the buffers that llama.cpp allocates even in a simulation (`no_alloc`): logits, recurrent states."""
    return sum(size for _where, what, size in buffers_in(log) if what not in ("compute", "model", "KV"))


def is_host(name: str) -> bool:
    """Whether a buffer type of this name is in main memory."""
    return name == "CPU" or name.endswith("_Host")


def _product_bytes(file: GGUFFile, n_batch: int) -> int:
    """Bytes of the scratch buffer of ggml's CPU backend (ggml-cpu.c, ggml_graph_plan): the largest need of any node.

    That is a batch in the type that a weight is multiplied with (half precision, or 8 bits and scales). With experts it is
    one row for each chosen expert, plus the list of choices.
    """
    chosen = _greatest(file, "expert_used_count")
    largest = 0
    for tensor in file.tensors.values():
        if len(tensor.shape) < 2 or tensor.type_name == "F32" or tensor.name == TOKEN_EMBEDDINGS:
            continue
        of_experts = len(tensor.shape) > 2
        rows = n_batch * (chosen if of_experts else 1)
        size = round(tensor.shape[0] * rows * (2 if tensor.type_name in ("F16", "BF16") else 1.15))
        largest = max(largest, size + (tensor.shape[2] * (rows * 8 + 128) if of_experts else 0))
    return largest


def _greatest(file: GGUFFile, name: str) -> int:
    """The number under a key, or the largest one if there is one for each layer; at least 1."""
    return max(1, int(np.max(file.metadata.get(f"{file.architecture}.{name}", 1))))
