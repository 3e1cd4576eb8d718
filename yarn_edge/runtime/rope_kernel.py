"""ggml's rope kernel, run alone on any device, and its arguments as a value. `verify` compares both with the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions.rope import Pairing
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor
from yarn_edge.runtime.ggml import (
    TYPE_F32,
    TYPE_I32,
    Device,
    check_struct,
    cpu_device,
    function,
    started,
    tensor_context,
)
from yarn_edge.signals import deferred_ctrl_c

ROPE_MODES: dict[Pairing, int] = {"interleaved": 0, "half": 2}  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX
BY_AXES = 40  # GGML_ROPE_TYPE_IMROPE: halves too, pairs follow three axes in turn
_HAS_AXES = 8  # the bit of every mode with axes


@dataclass(frozen=True)
class RopeArguments:
    """The arguments of ggml_rope_ext, which a ROPE node carries. attn_factor is *before* ggml's own 0.1 ln s + 1.

    sections: of ggml_rope_multi, how many pairs follow each of four axes; () for ggml_rope_ext.
    """

    n_dims: int
    mode: int
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    sections: tuple[int, ...] = ()

    @classmethod
    def from_node(cls, op_params: ctypes.Array[ctypes.c_int32]) -> RopeArguments:
        """The arguments in a node's op_params (ggml.c, ggml_rope_impl)."""
        raw = np.array(op_params, dtype=np.int32)
        sections = tuple(int(v) for v in raw[11:15]) if raw[2] & _HAS_AXES else ()
        base, scale, ext, attn, fast, slow = (float(v) for v in raw[5:11].view(np.float32))
        return cls(int(raw[1]), int(raw[2]), int(raw[4]), base, scale, ext, attn, fast, slow, sections)

    @property
    def numbers(self) -> dict[str, float]:
        """All but the sections, by name, in ggml's order."""
        return {name: value for name, value in vars(self).items() if name != "sections"}


def rope_arguments(scaling: RopeScaling, pairing: Pairing, sections: tuple[int, ...] = ()) -> RopeArguments:
    """The arguments that compute `scaling`; those of ggml_rope_multi for `sections`.

    Raises YarnEdgeError if there are none (truncate false, …).
    """
    if not scaling.truncate or scaling.ramp != "index" or scaling.method not in ("none", "linear", "yarn"):
        raise YarnEdgeError(f"ggml's rope kernel has no arguments for {scaling.method} with these settings")
    yarn = scaling.method == "yarn" and scaling.ext_factor != 0
    own = yarn_attention_factor(scaling.factor) if yarn else 1.0
    return RopeArguments(
        scaling.dim,
        BY_AXES if sections else ROPE_MODES[pairing],
        scaling.original_context,
        scaling.rope_theta,
        1.0 / scaling.factor,
        scaling.ext_factor if yarn else 0.0,
        scaling.attention_factor / own,
        scaling.beta_fast,
        scaling.beta_slow,
        sections,
    )


def rope(
    x: npt.NDArray[np.float32],
    positions: npt.ArrayLike,
    arguments: RopeArguments,
    device: Device | None = None,
    factors: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float32]:
    """The result of ggml's rope kernel on `device` (default: the CPU). x: (n_positions, n_heads, head_dim) float32; so is the result.

    positions: (n_positions,). factors: (n_dims / 2,), the divisors of the frequencies, or None.
    Raises YarnEdgeError if the device cannot compute it.
    """
    check_struct()
    device = device or cpu_device()
    values = np.ascontiguousarray(x, dtype=np.float32)
    where = np.ascontiguousarray(positions, dtype=np.int32)
    divisors = None if factors is None else np.ascontiguousarray(factors, dtype=np.float32)
    if divisors is not None and divisors.shape != (arguments.n_dims // 2,):
        raise ValueError(f"{divisors.shape} frequency factors for {arguments.n_dims} dimensions")
    if values.ndim != 3 or where.shape != values.shape[:1]:
        raise ValueError(f"x {values.shape} and positions {where.shape} do not fit")
    if arguments.sections:
        where = np.concatenate([where, where, where, 0 * where])  # as llama.cpp places text
    with started(device) as backend, tensor_context(8) as ctx:
        inputs = function("ggml_new_tensor_3d")(ctx, TYPE_F32, *reversed(values.shape))
        pos = function("ggml_new_tensor_1d")(ctx, TYPE_I32, len(where))
        table = None if divisors is None else function("ggml_new_tensor_1d")(ctx, TYPE_F32, len(divisors))
        node = _node(ctx, (inputs, pos, table), arguments)
        if not function("ggml_backend_supports_op")(backend, node):
            raise YarnEdgeError(f"device {device.name} has no rope kernel for this")
        result = np.empty_like(values)
        _compute(device, backend, ctx, [(inputs, values), (pos, where), (table, divisors)], (node, result))
    return result


def _node(ctx: Any, inputs: tuple[Any, Any, Any], arguments: RopeArguments) -> Any:
    """The ROPE node. inputs: x, positions, table of divisors or None."""
    numbers = list(arguments.numbers.values())
    if not arguments.sections:
        return function("ggml_rope_ext")(ctx, *inputs, *numbers)
    sections = (ctypes.c_int * 4)(*arguments.sections)
    return function("ggml_rope_multi")(ctx, *inputs, numbers[0], sections, *numbers[1:])


@deferred_ctrl_c()
def _compute(
    device: Device,
    backend: Any,
    ctx: Any,
    inputs: list[tuple[Any, npt.NDArray[Any] | None]],
    output: tuple[Any, npt.NDArray[Any]],
) -> None:
    """Fill the input tensors, compute the output node and copy its values. Both are pairs of a tensor and its values."""
    node, result = output
    graph = function("ggml_new_graph")(ctx)
    function("ggml_build_forward_expand")(graph, node)
    buffer = function("ggml_backend_alloc_ctx_tensors")(ctx, backend)
    if not buffer:
        raise YarnEdgeError(f"device {device.name} has no memory for {result.nbytes} bytes")
    try:
        for tensor, values in inputs:
            if values is not None:
                function("ggml_backend_tensor_set")(tensor, values.ctypes.data, 0, values.nbytes)
        status = function("ggml_backend_graph_compute")(backend, graph)
        if status:
            raise YarnEdgeError(f"device {device.name} failed to compute rope (status {status})")
        function("ggml_backend_tensor_get")(node, result.ctypes.data, 0, result.nbytes)
    finally:
        function("ggml_backend_buffer_free")(buffer)
