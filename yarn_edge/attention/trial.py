"""The attention of one layer alone, timed: ggml's flash and plain attention, and ours, on this machine."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from yarn_edge.attention.compiled import kernel_of
from yarn_edge.attention.heads import HeadShape
from yarn_edge.attention.node import KernelShape, give_to_kernel
from yarn_edge.attention.work import WorkArea, partials_floats, scratch_floats
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime import ggml
from yarn_edge.runtime.ggml import TYPE_F32, cpu_device, function, started, tensor_context
from yarn_edge.runtime.kv_cache import KV_TYPES, UNQUANTIZED, kv_types

CELLS, FEW_QUERIES, MANY_QUERIES = 2048, 1, 64
_REPEAT, _ENOUGH_S = 5, 0.12  # runs of each, unless they take longer than this
_F16 = 1


def attention_times(kv_type: str, heads: HeadShape, queries: int) -> dict[str, float]:
    """Seconds for one layer with CELLS cached cells of type `kv_type`: "flash", "fast", and "plain" where ggml has that.

    One thread, in its own processor time, so that a busy machine measures the same. Raises YarnEdgeError, or whatever Numba raises.
    """
    k_type, v_type = kv_types(kv_type)
    shape = KernelShape(k_type, v_type, heads.d_k, heads.d_v)
    kinds = KV_TYPES[k_type][0], KV_TYPES[v_type][0]
    with started(cpu_device()) as backend:
        _set_threads(backend, 1)
        times = {"flash": _timed(backend, kinds, heads, queries, _flash, None)}
        if v_type in UNQUANTIZED:
            times["plain"] = _timed(backend, kinds, heads, queries, _plain, None)
        area = WorkArea(
            1,
            scratch_floats(heads.d_k, heads.d_v, heads.query, heads.kv),
            partials_floats(heads.d_v, heads.query, 1, CELLS),
        )
        kernel = kernel_of(shape).address

        def take(node: Any) -> None:
            give_to_kernel(ctypes.addressof(node.contents), kernel, area.address)

        times["fast"] = _timed(backend, kinds, heads, queries, _flash, take)
    return times


def _set_threads(backend: Any, threads: int) -> None:
    registry = function("ggml_backend_dev_backend_reg")(ggml.device_handle(cpu_device()))
    address = function("ggml_backend_reg_get_proc_address")(registry, b"ggml_backend_set_n_threads")
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, threads)


def _timed(
    backend: Any,
    kinds: tuple[int, int],
    heads: HeadShape,
    queries: int,
    build: Callable[..., Any],
    edit: Callable[[Any], None] | None,
) -> float:
    """The least seconds of a few runs."""
    with tensor_context(16) as ctx:
        inputs, node = build(ctx, kinds, heads, queries)
        graph = function("ggml_new_graph")(ctx)
        function("ggml_build_forward_expand")(graph, node)
        buffer = function("ggml_backend_alloc_ctx_tensors")(ctx, backend)
        if not buffer:
            raise YarnEdgeError("no memory to measure attention")
        try:
            for tensor in inputs:
                _fill(tensor)
            if edit is not None:
                edit(node)
            times: list[float] = []
            while len(times) < 2 or (len(times) < _REPEAT and sum(times) < _ENOUGH_S):
                start = time.thread_time()
                if function("ggml_backend_graph_compute")(backend, graph):
                    raise YarnEdgeError("ggml cannot compute attention")
                times.append(time.thread_time() - start)
            return min(times)
        finally:
            function("ggml_backend_buffer_free")(buffer)


def _tensors(ctx: Any, kinds: tuple[int, int], heads: HeadShape, queries: int, v_size: tuple[int, int]) -> list[Any]:
    """Q, K, V, mask."""
    new = function("ggml_new_tensor_3d")
    return [
        new(ctx, TYPE_F32, heads.d_k, queries, heads.query),
        new(ctx, kinds[0], heads.d_k, CELLS, heads.kv),
        new(ctx, kinds[1], *v_size, heads.kv),
        new(ctx, _F16, CELLS, queries, 1),
    ]


def _flash(ctx: Any, kinds: tuple[int, int], heads: HeadShape, queries: int) -> tuple[list[Any], Any]:
    inputs = _tensors(ctx, kinds, heads, queries, (heads.d_v, CELLS))
    return inputs, function("ggml_flash_attn_ext")(ctx, *inputs, heads.d_k**-0.5, 0.0, 0.0)


def _plain(ctx: Any, kinds: tuple[int, int], heads: HeadShape, queries: int) -> tuple[list[Any], Any]:
    # llama.cpp keeps V transposed for plain attention.
    inputs = _tensors(ctx, kinds, heads, queries, (CELLS, heads.d_v))
    q, k, v, mask = inputs
    scores = function("ggml_mul_mat")(ctx, k, q)
    weights = function("ggml_soft_max_ext")(ctx, scores, mask, heads.d_k**-0.5, 0.0)
    return inputs, function("ggml_mul_mat")(ctx, v, weights)


def _fill(tensor: Any) -> None:
    """Small values of any type: zeros in the mask and in quantized levels, a slope in the rest."""
    fields = tensor.contents
    n_bytes = fields.ne[2] * fields.nb[2]
    if fields.type == TYPE_F32:
        values: Any = np.random.default_rng(0).standard_normal(n_bytes // 4).astype(np.float32)
    else:
        values = np.zeros(n_bytes, np.uint8)
    function("ggml_backend_tensor_set")(tensor, values.ctypes.data, 0, n_bytes)
