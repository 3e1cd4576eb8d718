"""The kernels and the callback as compiled code."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yarn_edge.runtime.compiled_code import from_cache

if TYPE_CHECKING:
    from yarn_edge.attention.node import KernelShape

_COMPILED = (
    "vectors",
    "cache_rows",
    "blocks",
    "softmax",
    "online_softmax",
    "spans",
    "work",
    "node",
    "node_view",
    "few_queries",
    "many_queries",
    "groups",
    "kernel",
    "takeover",
)
_SOURCES = [str(Path(__file__).with_name(f"{name}.py")) for name in _COMPILED]


def why_not_compiled() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed (pip install 'yarn-edge[fast]')"
    try:
        from yarn_edge.attention.vectors import vector_width

        return None if vector_width() else "this processor has no AVX2 and is not an ARM"
    except Exception as error:  # a broken installation of Numba, an unsupported processor
        return f"Numba cannot be used: {type(error).__name__}: {error}".splitlines()[0]


@cache
def kernel_of(shape: KernelShape) -> Any:
    """The kernel for a shape, a cfunc, once it has computed what NumPy does (`self_check`).

    Raises whatever Numba raises, and YarnEdgeError if it computes something else.
    """
    from yarn_edge.attention.kernel import build_kernel
    from yarn_edge.attention.self_check import check_attention
    from yarn_edge.attention.vectors import WIDTH

    def made(shape: KernelShape, _width: int, version: int, keep: bool) -> Any:
        return build_kernel(shape, version, keep)

    kernel = from_cache(
        made, shape, WIDTH, sources=_SOURCES, name=f"attention for {shape.k_type} and heads of {shape.d_k}", takes="8 s"
    )
    check_attention(kernel, shape)
    return kernel


@cache
def callback() -> Any:
    """The callback of `takeover`, as llama.cpp takes it. Raises whatever Numba raises."""
    from yarn_edge.attention.takeover import build_callback

    return from_cache(build_callback, sources=_SOURCES, name="the attention callback", takes="3 s")
