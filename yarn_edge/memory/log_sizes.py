"""The sizes of one context: read in llama.cpp's log of making it, and what it does not log.

Formats: llama-kv-cache.cpp, llama-memory-recurrent.cpp, llama-kv-cache-dsv4.cpp and llama-context.cpp of llama-cpp-python
0.3.36. Caches of several parts (sliding windows, hybrid models) log a line for each, which add up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.memory.weights import TOKEN_EMBEDDINGS
from yarn_edge.runtime.ggml import Device

MIB = 2**20
_SIZE = re.compile(r"(?:llama_kv_cache|llama_memory_recurrent|llama_dsv4_comp_state): (?:.*, )?size = +([\d.]+) MiB")
_CELLS = re.compile(r"llama_kv_cache: size = .*\( *(\d+) cells")
_BUFFER = re.compile(r": +(\S+) +(compute|output|RS|DSV4 \S+ state) buffer size = +([\d.]+) MiB")
_FLASH = re.compile(r"Flash Attention enabled|enabling flash_attn since it is required")


@dataclass(frozen=True)
class ContextSizes:
    """What llama.cpp logs of one context, in bytes. on_device: of `compute`; work: ggml's scratch; cells: a number."""

    kv: int
    compute: int
    on_device: int
    output: int
    work: int
    cells: int


def context_sizes(
    log: Sequence[str], file: GGUFFile, n_batch: int, threads: int, device: Device | None
) -> ContextSizes:
    """The sizes in the log of one context. device: where layers and cache are, None for the CPU."""
    compute = {name: size for name, what, size in _buffers(log) if what == "compute"}
    on_device = 0
    if device is not None:
        on_device = sum(size for name, size in compute.items() if name == device.name or not _is_host(name))
    cells = [int(m[1]) for m in map(_CELLS.search, log) if m]
    work = _product_bytes(file, n_batch) + threads * MIB // 2  # and a tile for each thread (tiled.cpp)
    if not any(map(_FLASH.search, log)):  # the scores of the batch in half precision, to be multiplied with the values
        work += max(cells, default=0) * n_batch * _greatest(file, "attention.head_count") * 2
    kv = sum(_bytes(m[1]) for m in map(_SIZE.search, log) if m)
    output = sum(size for _name, what, size in _buffers(log) if what == "output")
    return ContextSizes(kv, sum(compute.values()), on_device, output, work, sum(cells))


def allocated_bytes(log: Sequence[str]) -> int:
    """Of the buffers in the log those that llama.cpp allocates even without allocating (`no_alloc`): logits, states."""
    return sum(size for _name, what, size in _buffers(log) if what != "compute")


def _buffers(log: Sequence[str]) -> list[tuple[str, str, int]]:
    """(buffer type, what for, bytes)."""
    return [(m[1], m[2], _bytes(m[3])) for m in map(_BUFFER.search, log) if m]


def _is_host(name: str) -> bool:
    """Whether a buffer type of this name is memory of the machine."""
    return name == "CPU" or name.endswith("_Host")


def _product_bytes(file: GGUFFile, n_batch: int) -> int:
    """The scratch buffer of ggml's CPU backend (ggml-cpu.c, ggml_graph_plan) is the largest need of any node.

    That is a batch in the type that a weight is multiplied with (half precision, or 8 bits and scales); with experts
    one row for each choice, and the list of choices.
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


def _bytes(mib: str) -> int:
    return round(float(mib) * MIB)


def _greatest(file: GGUFFile, name: str) -> int:
    """The number under a key, or the greatest of one for each layer; at least 1."""
    return max(1, int(np.max(file.metadata.get(f"{file.architecture}.{name}", 1))))
