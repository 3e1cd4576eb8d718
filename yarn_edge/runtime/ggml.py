"""ggml through ctypes, in one place: its functions, its tensor struct, its devices.

The functions come from the libggml* that llama-cpp-python installs. The struct is the one in ggml.h of the pinned version;
`check_struct` verifies the layout before anything is read through it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.runtime.llama_api import llama
from yarn_edge.signals import deferred_ctrl_c

TYPE_F32, TYPE_I32 = 0, 26  # ggml.h: enum ggml_type
DEVICE_TYPES = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}  # enum ggml_backend_dev_type
_P, _I64, _SIZE, _INT, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int, ctypes.c_float


class TensorStruct(ctypes.Structure):
    """struct ggml_tensor."""


TensorStruct._fields_ = [
    ("type", _INT), ("buffer", _P), ("ne", _I64 * 4), ("nb", _SIZE * 4), ("op", _INT),
    ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.POINTER(TensorStruct) * 10),
    ("view_src", _P), ("view_offs", _SIZE), ("data", _P), ("name", ctypes.c_char * 64), ("extra", _P),
    ("padding", ctypes.c_char * 8),
]  # fmt: skip
TensorPointer = ctypes.POINTER(TensorStruct)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool)]


# name -> (result type, argument types)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_tensor_1d": (TensorPointer, [_P, _INT, _I64]),
    "ggml_new_tensor_3d": (TensorPointer, [_P, _INT, _I64, _I64, _I64]),
    "ggml_new_tensor_4d": (TensorPointer, [_P, _INT, _I64, _I64, _I64, _I64]),
    "ggml_set_name": (TensorPointer, [TensorPointer, ctypes.c_char_p]),
    "ggml_op_name": (ctypes.c_char_p, [_INT]),
    "ggml_type_size": (_SIZE, [_INT]),
    "ggml_rope_ext": (TensorPointer, [_P, TensorPointer, TensorPointer, TensorPointer, *[_INT] * 3, *[_F] * 6]),
    "ggml_rope_multi": (
        TensorPointer,
        [_P, TensorPointer, TensorPointer, TensorPointer, _INT, ctypes.POINTER(_INT), *[_INT] * 2, *[_F] * 6],
    ),
    "ggml_mul_mat": (TensorPointer, [_P, TensorPointer, TensorPointer]),
    "ggml_mul_mat_id": (TensorPointer, [_P, TensorPointer, TensorPointer, TensorPointer]),
    "ggml_flash_attn_ext": (TensorPointer, [_P, *[TensorPointer] * 4, *[_F] * 3]),
    "ggml_soft_max_ext": (TensorPointer, [_P, TensorPointer, TensorPointer, _F, _F]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, TensorPointer]),
    "ggml_backend_alloc_ctx_tensors": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_graph_compute": (_INT, [_P, _P]),
    "ggml_backend_tensor_set": (None, [TensorPointer, _P, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [TensorPointer, _P, _SIZE, _SIZE]),
    "ggml_backend_supports_op": (ctypes.c_bool, [_P, TensorPointer]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_dev_count": (_SIZE, []),
    "ggml_backend_dev_get": (_P, [_SIZE]),
    "ggml_backend_dev_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_dev_description": (ctypes.c_char_p, [_P]),
    "ggml_backend_dev_type": (_INT, [_P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_dev_memory": (None, [_P, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_P, TensorPointer]),
    "ggml_backend_dev_buffer_type": (_P, [_P]),
    "ggml_backend_reg_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_reg_by_name": (_P, [ctypes.c_char_p]),
    "ggml_backend_register": (None, [_P]),
    "ggml_backend_buffer_get_type": (_P, [_P]),
    "ggml_set_abort_callback": (_P, [_P]),
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_commit": (ctypes.c_char_p, []),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _SIZE]),
    "ggml_backend_buft_get_alignment": (_SIZE, [_P]),
    "ggml_backend_buft_get_alloc_size": (_SIZE, [_P, TensorPointer]),
    "ggml_backend_buffer_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, [_P]),
    "ggml_backend_dev_init": (_P, [_P, ctypes.c_char_p]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _P, _P, _I64, _I64, _I64, _P]),
    "ggml_blck_size": (_I64, [_INT]),
    "ggml_type_name": (ctypes.c_char_p, [_INT]),
    "ggml_get_type_traits": (_P, [_INT]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_INT]),
    "ggml_validate_row_data": (ctypes.c_bool, [_INT, _P, _SIZE]),
    "ggml_fp16_to_fp32_row": (None, [_P, _P, _I64]),
    "ggml_bf16_to_fp32_row": (None, [_P, _P, _I64]),
    "ggml_cpu_has_amx_int8": (_INT, []),
}


@cache
def function(name: str) -> Callable[..., Any]:
    """An exported ggml function, with its types. Raises YarnEdgeError if this build does not export it."""
    from llama_cpp import _ggml
    from llama_cpp._ctypes_extensions import load_shared_library

    for library in ("ggml", "ggml-base", "ggml-cpu"):
        try:
            found = getattr(load_shared_library(library, _ggml.libggml_base_path), name)
        except (AttributeError, FileNotFoundError):
            continue
        found.restype, found.argtypes = _SIGNATURES[name]
        return found  # type: ignore[no-any-return]
    raise YarnEdgeError(f"this build of llama-cpp-python does not export {name}")


@cache
def check_struct() -> None:
    """Verify that TensorStruct has the layout of the library's ggml_tensor. Raises YarnEdgeError if it does not."""
    with tensor_context(2) as ctx:
        tensor = function("ggml_new_tensor_3d")(ctx, TYPE_F32, 6, 5, 4)
        function("ggml_set_name")(tensor, b"layout")
        fields = tensor.contents
        seen = (list(fields.ne), list(fields.nb), fields.name, fields.op)
        if seen != ([6, 5, 4, 1], [4, 24, 120, 480], b"layout", 0):
            raise YarnEdgeError("this llama-cpp-python has another layout of ggml_tensor: install the pinned version")


@cache
def op_number(name: bytes) -> int:
    """The number (enum ggml_op) of an operation by its name, such as b"ROPE"."""
    return next(op for op in range(128) if function("ggml_op_name")(op) == name)


def new_arena(n_tensors: int) -> Any:
    """A ggml_context * with room for the descriptions of `n_tensors` tensors and one graph, but not for data; ggml_free frees it."""
    size = n_tensors * function("ggml_tensor_overhead")() + function("ggml_graph_overhead")()
    arena = function("ggml_init")(_InitParams(size, None, True))
    if not arena:
        raise YarnEdgeError("ggml cannot create a context")
    return arena


@contextmanager
def tensor_context(n_tensors: int) -> Iterator[Any]:
    """`new_arena`, freed on leaving."""
    ctx = new_arena(n_tensors)
    try:
        yield ctx
    finally:
        function("ggml_free")(ctx)


@dataclass(frozen=True)
class Device:
    """One of ggml's devices. name: such as "CPU" or "CUDA0"; backend: the name of its library; kind: cpu, gpu, igpu or accel."""

    name: str
    backend: str
    kind: str
    description: str
    index: int


def devices() -> list[Device]:
    """The devices of this build on this machine."""
    llama()  # captures the log: a GPU backend introduces itself on first use
    found = []
    for index in range(function("ggml_backend_dev_count")()):
        handle = function("ggml_backend_dev_get")(index)
        name, text = (function(f"ggml_backend_dev_{what}")(handle).decode() for what in ("name", "description"))
        backend = function("ggml_backend_reg_name")(function("ggml_backend_dev_backend_reg")(handle)).decode()
        kind = DEVICE_TYPES.get(function("ggml_backend_dev_type")(handle), "other")
        found.append(Device(name, backend, kind, text, index))
    return found


def cpu_device() -> Device:
    """The processor."""
    return next(device for device in devices() if device.kind == "cpu")


def gpus() -> list[Device]:
    """The GPUs of this machine; those that workers lend are not among them."""
    return [d for d in devices() if d.kind in ("gpu", "igpu") and d.backend != "RPC"]


def device_handle(device: Device) -> Any:
    """ggml_backend_dev_t."""
    return function("ggml_backend_dev_get")(device.index)


def memory_type(device: Device) -> int:
    """ggml_backend_buffer_type_t of a device's own memory."""
    return int(function("ggml_backend_dev_buffer_type")(device_handle(device)))


def memory_name(device: Device) -> str:
    """What the names of a device's buffers begin with: its own name, or for a worker's, such as "RPC0[127.0.0.1:50052]"."""
    if device.backend != "RPC":
        return device.name
    return str(function("ggml_backend_buft_name")(memory_type(device)).decode(errors="replace"))


@contextmanager
def started(device: Device) -> Iterator[Any]:
    """The device's ggml_backend_t, freed on leaving."""
    backend = function("ggml_backend_dev_init")(device_handle(device), None)
    if not backend:
        raise YarnEdgeError(f"device {device.name} cannot be started")
    try:
        yield backend
    finally:
        function("ggml_backend_free")(backend)


@cache
def has_amx() -> bool:
    """Whether the CPU backend was built with AMX kernels, which work on weights repacked into "extra" buffers.

    GCC's _tile_loadconfig declares only 8 of the 64 bytes that it reads, so the compiler optimizes the tile configuration
    away and the first use ends the process (llama.cpp issue 20824, seen with GCC 12). Which compiler was used is not known.
    """
    return bool(function("ggml_cpu_has_amx_int8")())


def device_memory(device: Device) -> tuple[int, int]:
    """(free, total) bytes of a device's memory, as its backend reports them; (0, 0) if it reports none."""
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    with deferred_ctrl_c():
        function("ggml_backend_dev_memory")(device_handle(device), ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def read_tensor(tensor: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A live tensor's values, from whichever device holds it: shape (ne3, ne2, ne1, ne0), with its strides applied."""
    fields = tensor.contents
    item = np.dtype(dtype).itemsize
    ne, nb = list(fields.ne), list(fields.nb)
    if function("ggml_type_size")(fields.type) != item:
        raise YarnEdgeError(f"tensor {fields.name.decode(errors='replace')} has an unexpected type")
    span = sum((n - 1) * step for n, step in zip(ne, nb, strict=True)) + item
    raw = np.empty(span, dtype=np.uint8)
    with deferred_ctrl_c():
        function("ggml_backend_tensor_get")(tensor, raw.ctypes.data, 0, span)
    view = np.ndarray(tuple(reversed(ne)), dtype=dtype, buffer=raw, strides=tuple(reversed(nb)))
    return view.copy()


@cache
def extra_buffers() -> bool:
    """Whether weights may be repacked: not by a build with AMX, which is noted once."""
    if has_amx():
        note(
            "this llama-cpp-python has AMX kernels, which crash if GCC compiled them: they are not used, and no weights are "
            "repacked for any kernel, which is slower (README, Limits: how to build without them)"
        )
    return not has_amx()
