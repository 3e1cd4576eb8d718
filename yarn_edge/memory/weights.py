"""Bytes of a file's weights in memory: what stays mapped, and what the CPU backend repacks into a second copy.

Tensors of some types (Q4_K and Q4_0 with AVX2, more on ARM) are copied into an "extra" buffer type, in addition to the mapped
file. Whether that happens depends on type, shape, operation and processor. ggml is asked about each tensor in the same way as
llama.cpp asks it (llama-model-loader.cpp, weight_buft_supported).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.ggml import (
    TYPE_F32,
    TYPE_I32,
    check_struct,
    device_handle,
    devices,
    extra_buffers,
    function,
    tensor_context,
)
from yarn_edge.runtime.ggml_types import types

TOKEN_EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"
# llama-arch.cpp, LLM_TENSOR_INFOS: matrices whose rows are looked up, and stacks of the experts' matrices.
_LOOKED_UP = (
    TOKEN_EMBEDDINGS,
    "position_embd.weight",
    "token_types.weight",
    "per_layer_token_embd.weight",
    "attn_rel_b.weight",
    "_compressor_ape.weight",
    "ffn_gate_tid2eid.weight",
    "nextn.embed_tokens.weight",
)
_OF_EXPERTS = ("_exps.weight", "_chexps.weight")
PAGE = mmap.PAGESIZE
_N_TOKENS = 512  # of the operation that llama.cpp asks about


@dataclass(frozen=True)
class Repacked:
    """The names of the tensors that get a copy, and the bytes of all copies. Embeddings may be copied because they are the output."""

    names: frozenset[str]
    n_bytes: int


def repacked(file: GGUFFile, unused: Collection[str] = (), only: Collection[str] | None = None) -> Repacked:
    """What this build's CPU backend copies on this machine. unused: tensors that llama.cpp does not load. only: those on the CPU."""
    names, n_bytes = set(), 0
    tied = OUTPUT not in file.tensors
    for tensor in file.tensors.values() if only is None else map(file.tensors.__getitem__, only):
        size = 0 if tensor.name in unused else copy_bytes(tensor.name, tensor.shape, tensor.type_name, tied)
        if size:
            names.add(tensor.name)
            n_bytes += size
    return Repacked(frozenset(names), n_bytes)


def copy_bytes(name: str, shape: tuple[int, ...], type_name: str, tied: bool) -> int:
    """Bytes of the copy that this build's CPU backend makes of a tensor on this machine; 0 if it makes none.

    shape: in GGUF order. tied: the token embeddings are loaded again as the output matrix.
    """
    if len(shape) < 2 or not name.endswith(".weight"):
        return 0
    if name.endswith(_LOOKED_UP) and not (name == TOKEN_EMBEDDINGS and tied):
        return 0
    return _copy_bytes_of(types()[type_name].number, (*shape, 1, 1)[:4], name.endswith(_OF_EXPERTS))


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in memory. at_load: the whole file, mapped while it is loaded; mapped: what remains mapped.

    repacked: all copies; tensors: all tensors; embeddings: the token embeddings, which stay on the CPU even if all layers are
    on a device.
    """

    at_load: int
    mapped: int
    repacked: int
    tensors: int
    embeddings: int

    @property
    def on_device(self) -> int:
        """Bytes on a device that holds all layers: everything but the token embeddings."""
        return self.tensors - self.embeddings


def weights_in_memory(file: GGUFFile, unused: Collection[str] = ()) -> Weights:
    """The weights of a file, loaded as `Model` loads it. unused: tensors that llama.cpp does not load.

    After loading, llama.cpp unmaps everything before the first and after the last tensor that is used in place, in each shard
    (llama-model-loader.cpp, load_all_data): the header, and repacked tensors at the ends.
    """
    copies = repacked(file, unused)
    tied = OUTPUT not in file.tensors
    ends: dict[Path, tuple[int, int]] = {}
    for tensor in file.tensors.values():
        in_place = tensor.name not in copies.names or tensor.name == TOKEN_EMBEDDINGS
        if in_place and tensor.name not in unused:
            start, end = ends.get(tensor.path, (tensor.offset, 0))
            ends[tensor.path] = (min(start, tensor.offset), max(end, tensor.offset + tensor.n_bytes))
    mapped = sum(-(-end // PAGE) * PAGE - start // PAGE * PAGE for start, end in ends.values())
    at_load = sum(-(-shard.stat().st_size // PAGE) * PAGE for shard in file.shards)
    embeddings = file.tensors[TOKEN_EMBEDDINGS].n_bytes if TOKEN_EMBEDDINGS in file.tensors else 0
    used = sum(t.n_bytes for t in file.tensors.values() if t.name not in unused) + tied * embeddings
    return Weights(at_load, mapped, copies.n_bytes, used, embeddings)


@cache
def _copy_bytes_of(kind: int, ne: tuple[int, ...], of_experts: bool) -> int:
    """Bytes of the copy of a weight of this type and shape, in ggml's layout; 0 if there is none."""
    check_struct()
    cpu = next(d for d in devices() if d.kind == "cpu")
    for buffer_type in _extra_buffer_types():
        with tensor_context(8) as ctx, _empty_buffer(buffer_type) as buffer:
            weight = function("ggml_new_tensor_4d")(ctx, kind, *ne)
            operation = _operation(ctx, weight, ne, of_experts)
            weight.contents.buffer = buffer
            if function("ggml_backend_dev_supports_op")(device_handle(cpu), operation):
                weight.contents.buffer = None
                size = int(function("ggml_backend_buft_get_alloc_size")(buffer_type, weight))
                alignment = int(function("ggml_backend_buft_get_alignment")(buffer_type))
                return -(-size // alignment) * alignment
    return 0


def _operation(ctx: Any, weight: Any, ne: tuple[int, ...], of_experts: bool) -> Any:
    """The node that uses the weight."""
    if of_experts:
        rows = function("ggml_new_tensor_3d")(ctx, TYPE_F32, ne[0], 1, _N_TOKENS)
        chosen = function("ggml_new_tensor_3d")(ctx, TYPE_I32, 1, _N_TOKENS, 1)
        return function("ggml_mul_mat_id")(ctx, weight, rows, chosen)
    rows = function("ggml_new_tensor_4d")(ctx, TYPE_F32, ne[0], _N_TOKENS, ne[2], ne[3])
    return function("ggml_mul_mat")(ctx, weight, rows)


@contextmanager
def _empty_buffer(buffer_type: int) -> Iterator[Any]:
    """An empty buffer, to show the backend where the weight would be."""
    buffer = function("ggml_backend_buft_alloc_buffer")(buffer_type, 0)
    try:
        yield buffer
    finally:
        if buffer:
            function("ggml_backend_buffer_free")(buffer)


@cache
def _extra_buffer_types() -> tuple[int, ...]:
    """ggml_backend_buffer_type_t of the CPU backend's extra buffer types, in its order of preference."""
    if not extra_buffers():
        return ()
    cpu = device_handle(next(d for d in devices() if d.kind == "cpu"))
    library = function("ggml_backend_dev_backend_reg")(cpu)
    address = function("ggml_backend_reg_get_proc_address")(library, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return ()
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(cpu)
    buffer_types: list[int] = []
    while listed and listed[len(buffer_types)]:
        buffer_types.append(int(listed[len(buffer_types)]))
    return tuple(buffer_types)
