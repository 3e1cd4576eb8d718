"""A kernel that computes something else is found when it is loaded."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.attention import compiled
from yarn_edge.attention.node import DATA, NE, KernelShape
from yarn_edge.attention.self_check import check_attention
from yarn_edge.errors import YarnEdgeError

F16 = KernelShape("f16", "f16", 64, 64)


@pytest.mark.parametrize("shape", [F16, KernelShape("q8_0", "q8_0", 64, 64)], ids=str)
def test_what_is_right_passes(shape: KernelShape) -> None:
    check_attention(compiled.kernel_of(shape), shape)


@pytest.mark.parametrize("queries", [1, 5, 21])
def test_one_wrong_float_is_found(queries: int) -> None:
    """In the results of `queries` queries alone."""
    kernel = compiled.kernel_of(F16)

    def spoilt(node: int, ith: int, nth: int, work: int) -> None:
        kernel.ctypes(node, ith, nth, work)
        if ctypes.c_int64.from_address(node + NE + 16).value == queries:
            address = ctypes.c_int64.from_address(node + DATA).value
            ctypes.c_float.from_address(address).value += 0.01

    fake: Any = SimpleNamespace(ctypes=spoilt)
    with pytest.raises(YarnEdgeError, match=f"wrong on this processor .* with {queries} queries"):
        check_attention(fake, F16)


def test_a_kernel_that_writes_nothing_is_found() -> None:
    fake: Any = SimpleNamespace(ctypes=lambda *_: None)
    with pytest.raises(YarnEdgeError, match="error nan"), np.errstate(invalid="ignore"):
        check_attention(fake, F16)
