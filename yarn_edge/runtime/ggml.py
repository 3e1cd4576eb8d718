"""The one door into ggml by ctypes: its tensor struct, its rope kernel on any device.

Functions come from the libggml* that llama-cpp-python installs; the struct is that of ggml.h in the pinned version, and
`check_struct` proves the layout before anything is read through it.
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
from yarn_edge.positions.rope import Pairing
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor
from yarn_edge.progress import note
from yarn_edge.runtime.llama_api import llama

TYPE_F32, TYPE_I32 = 0, 26  # ggml.h: enum ggml_type
ROPE_MODES: dict[Pairing, int] = {"interleaved": 0, "half": 2}  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX
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
    "ggml_mul_mat": (TensorPointer, [_P, TensorPointer, TensorPointer]),
    "ggml_mul_mat_id": (TensorPointer, [_P, TensorPointer, TensorPointer, TensorPointer]),
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
    "ggml_backend_reg_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _SIZE]),
    "ggml_backend_buft_get_alignment": (_SIZE, [_P]),
    "ggml_backend_buft_get_alloc_size": (_SIZE, [_P, TensorPointer]),
    "ggml_backend_buffer_name": (ctypes.c_char_p, [_P]),
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
    """An exported ggml function, typed. Raises YarnEdgeError where this build does not export it."""
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
    """Prove that TensorStruct is laid out like the library's ggml_tensor; YarnEdgeError if not."""
    with tensor_context(2) as ctx:
        tensor = function("ggml_new_tensor_3d")(ctx, TYPE_F32, 6, 5, 4)
        function("ggml_set_name")(tensor, b"layout")
        fields = tensor.contents
        seen = (list(fields.ne), list(fields.nb), fields.name, fields.op)
        if seen != ([6, 5, 4, 1], [4, 24, 120, 480], b"layout", 0):
            raise YarnEdgeError("this llama-cpp-python lays out ggml_tensor differently: install the pinned version")


@contextmanager
def tensor_context(n_tensors: int) -> Iterator[Any]:
    """ggml_context * with room for the descriptions of `n_tensors` tensors and of one graph, not for data."""
    size = n_tensors * function("ggml_tensor_overhead")() + function("ggml_graph_overhead")()
    ctx = function("ggml_init")(_InitParams(size, None, True))
    if not ctx:
        raise YarnEdgeError("ggml cannot make a context")
    try:
        yield ctx
    finally:
        function("ggml_free")(ctx)


@dataclass(frozen=True)
class RopeArguments:
    """What a ROPE node carries: the arguments of ggml_rope_ext. attn_factor is *before* ggml's own 0.1 ln s + 1."""

    n_dims: int
    mode: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float

    @classmethod
    def from_node(cls, op_params: ctypes.Array[ctypes.c_int32]) -> RopeArguments:
        """From a node's op_params (ggml.c, ggml_rope_impl)."""
        raw = np.array(op_params, dtype=np.int32)
        return cls(int(raw[1]), int(raw[2]), int(raw[4]), *(float(v) for v in raw[5:11].view(np.float32)))


def rope_arguments(scaling: RopeScaling, pairing: Pairing) -> RopeArguments:
    """The ggml_rope_ext arguments that compute `scaling`; raises YarnEdgeError where none do (truncate false, …)."""
    if not scaling.truncate or scaling.ramp != "index" or scaling.method not in ("none", "linear", "yarn"):
        raise YarnEdgeError(f"ggml's rope kernel has no arguments for {scaling.method} with these settings")
    yarn = scaling.method == "yarn" and scaling.ext_factor != 0
    own = yarn_attention_factor(scaling.factor) if yarn else 1.0
    return RopeArguments(
        scaling.dim,
        ROPE_MODES[pairing],
        scaling.original_context,
        scaling.rope_theta,
        1.0 / scaling.factor,
        scaling.ext_factor if yarn else 0.0,
        scaling.attention_factor / own,
        scaling.beta_fast,
        scaling.beta_slow,
    )


@dataclass(frozen=True)
class Device:
    """One of ggml's devices: `name` such as "CPU" or "CUDA0", `backend` its library's, `kind` cpu, gpu, igpu or accel."""

    name: str
    backend: str
    kind: str
    description: str
    index: int


def devices() -> list[Device]:
    """The devices that this build and this machine have."""
    llama()  # with its log: a GPU's backend tells of itself when it is first asked
    found = []
    for index in range(function("ggml_backend_dev_count")()):
        handle = function("ggml_backend_dev_get")(index)
        name, text = (function(f"ggml_backend_dev_{what}")(handle).decode() for what in ("name", "description"))
        backend = function("ggml_backend_reg_name")(function("ggml_backend_dev_backend_reg")(handle)).decode()
        kind = DEVICE_TYPES.get(function("ggml_backend_dev_type")(handle), "other")
        found.append(Device(name, backend, kind, text, index))
    return found


def device_handle(device: Device) -> Any:
    """ggml_backend_dev_t."""
    return function("ggml_backend_dev_get")(device.index)


@cache
def has_amx() -> bool:
    """Whether the CPU backend was built with AMX kernels, for weights that it rearranges in "extra" buffers.

    GCC's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads, so that the tile configuration is optimised
    away and the first use ends the process (llama.cpp issue 20824, seen with GCC 12). Other compilers cannot be told apart.
    """
    return bool(function("ggml_cpu_has_amx_int8")())


def device_memory(device: Device) -> tuple[int, int]:
    """(free, all) bytes of a device's memory, as its backend tells; (0, 0) where it does not."""
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    function("ggml_backend_dev_memory")(device_handle(device), ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def rope(
    x: npt.NDArray[np.float32],
    positions: npt.ArrayLike,
    arguments: RopeArguments,
    device: Device | None = None,
    factors: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float32]:
    """ggml's rope kernel on `device` (the CPU by default). x: (n_positions, n_heads, head_dim) float32, same returned.

    factors: (D/2,), by which the frequencies are divided, or None.
    """
    check_struct()
    device = device or next(d for d in devices() if d.kind == "cpu")
    values = np.ascontiguousarray(x, dtype=np.float32)
    where = np.ascontiguousarray(positions, dtype=np.int32)
    divisors = None if factors is None else np.ascontiguousarray(factors, dtype=np.float32)
    if divisors is not None and divisors.shape != (arguments.n_dims // 2,):
        raise ValueError(f"{divisors.shape} frequency factors for {arguments.n_dims} dimensions")
    if values.ndim != 3 or where.shape != values.shape[:1]:
        raise ValueError(f"x {values.shape} and positions {where.shape} do not fit")
    backend = function("ggml_backend_dev_init")(device_handle(device), None)
    if not backend:
        raise YarnEdgeError(f"device {device.name} cannot be started")
    buffer = None
    try:
        with tensor_context(8) as ctx:
            inputs = function("ggml_new_tensor_3d")(ctx, TYPE_F32, *reversed(values.shape))
            pos = function("ggml_new_tensor_1d")(ctx, TYPE_I32, len(where))
            table = None if divisors is None else function("ggml_new_tensor_1d")(ctx, TYPE_F32, len(divisors))
            a = arguments
            node = function("ggml_rope_ext")(
                ctx,
                inputs,
                pos,
                table,
                a.n_dims,
                a.mode,
                a.n_ctx_orig,
                a.freq_base,
                a.freq_scale,
                a.ext_factor,
                a.attn_factor,
                a.beta_fast,
                a.beta_slow,
            )
            if not function("ggml_backend_supports_op")(backend, node):
                raise YarnEdgeError(f"device {device.name} has no rope kernel for this")
            graph = function("ggml_new_graph")(ctx)
            function("ggml_build_forward_expand")(graph, node)
            buffer = function("ggml_backend_alloc_ctx_tensors")(ctx, backend)
            if not buffer:
                raise YarnEdgeError(f"device {device.name} has no memory for {values.nbytes} bytes")
            for tensor, data in ((inputs, values), (pos, where), (table, divisors)):
                if data is not None:
                    function("ggml_backend_tensor_set")(tensor, data.ctypes.data, 0, data.nbytes)
            status = function("ggml_backend_graph_compute")(backend, graph)
            if status:
                raise YarnEdgeError(f"device {device.name} failed to compute rope (status {status})")
            result = np.empty_like(values)
            function("ggml_backend_tensor_get")(node, result.ctypes.data, 0, result.nbytes)
            return result
    finally:
        if buffer:
            function("ggml_backend_buffer_free")(buffer)
        function("ggml_backend_free")(backend)


def read_tensor(tensor: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A live tensor's values from whatever device holds it, shape (ne3, ne2, ne1, ne0), strides honoured."""
    fields = tensor.contents
    item = np.dtype(dtype).itemsize
    ne, nb = list(fields.ne), list(fields.nb)
    if function("ggml_type_size")(fields.type) != item:
        raise YarnEdgeError(f"tensor {fields.name.decode(errors='replace')} has another type than expected")
    span = sum((n - 1) * step for n, step in zip(ne, nb, strict=True)) + item
    raw = np.empty(span, dtype=np.uint8)
    function("ggml_backend_tensor_get")(tensor, raw.ctypes.data, 0, span)
    view = np.ndarray(tuple(reversed(ne)), dtype=dtype, buffer=raw, strides=tuple(reversed(nb)))
    return view.copy()


@cache
def extra_buffers() -> bool:
    """Whether weights may be rearranged: not by a build with AMX, which is noted once."""
    if has_amx():
        note(
            "this llama-cpp-python has AMX kernels, which crash where GCC compiled them: they are not used, nor weights "
            "rearranged for any kernel, which is slower (README, Limits: how to build it without them)"
        )
    return not has_amx()
