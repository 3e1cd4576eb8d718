"""Several compiled callbacks as one: each is asked about every node, without Python."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from yarn_edge.attention.vectors import I8, I64, Emitter, operation, read_i64
from yarn_edge.runtime.compiled_code import as_callback, from_cache, named_by


def _call(emit: Emitter, function: Any, address: Any, asking: Any, user_data: Any) -> Any:
    b = emit.builder
    kind = ir.FunctionType(I8, [I64, I8, I64])
    answer = b.call(b.inttoptr(function, kind.as_pointer()), [address, b.trunc(asking, I8), user_data])
    return b.zext(answer, I64)


_call_at = operation(_call)


@cache
def chain_callback() -> Any:
    """The callback as llama.cpp takes it; its user data is the address of what `chain_state` made. Raises whatever Numba raises."""
    return from_cache(_build, sources=[__file__], name="the callbacks", takes="1 s")


def chain_state(callbacks: Sequence[tuple[Any, int]]) -> npt.NDArray[np.int64]:
    """callbacks: each with its user data."""
    pairs = [(ctypes.cast(callback, ctypes.c_void_p).value or 0, data) for callback, data in callbacks]
    return np.array([len(pairs), *(value for pair in pairs for value in pair)], np.int64)


def _build(version: int, keep: bool) -> Any:
    def each_in_turn(address: int, asking: int, state: int) -> int:
        for i in range(read_i64(state)):
            pair = state + 8 + 16 * i
            if _call_at(read_i64(pair), address, asking, read_i64(pair + 8)):
                return 1
        return 0

    signature = types.uint8(types.int64, types.uint8, types.int64)
    return as_callback(numba.cfunc(signature, cache=keep)(named_by(version, each_in_turn)))
