"""The compiled kernel as Python calls it: a C function that gets addresses and lengths, nothing of Python's.

It is compiled by Numba once (`kquant`), kept, and loaded without Numba (`machine_code`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import machine_code
from .layout import WEIGHTS
from .plan import LANES, ROOM, KernelPlan

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Kernel = Callable[[Floats, Floats, int, Bytes, KernelPlan], None]
SOURCES = ("lanes.py", "plan.py", "layout.py", "search.py", "kquant.py", "machine_code.py")
_ALIGNMENT = 64  # bytes; vectors that cross a cache line take twice as long
_AT, _N = ctypes.c_void_p, ctypes.c_int64
_RESULT = (_AT, _AT)  # where Numba's functions put results and errors
_ARGUMENTS = (*_RESULT, _AT, _AT, _N, _N, _N, _AT, _AT, _AT, _AT, _N, _AT, _N, _AT, _N, _AT, _N, _AT, _AT, _AT)


def load_kernel() -> tuple[Kernel, Exception | None]:
    """(the kernel, why it could not be kept). Raises whatever Numba raises if it cannot compile it."""
    name = machine_code.key(Path(__file__).with_name(source) for source in SOURCES)
    code, failure = machine_code.kept(name), None
    if code is None:
        from .kquant import compile_kernel

        code = compile_kernel()
        try:
            machine_code.keep(name, code)
        except Exception as error:  # no writable folder, a full disk
            failure = error
    return callable_kernel(machine_code.loaded(code, _ARGUMENTS)), failure


def callable_kernel(function: Callable[..., int]) -> Kernel:
    """kernel(x, importance, blocks_of_row, out, plan): quantize whole rows, flat, into blocks of the plan's type in `out`.

    importance: of a row's columns, or empty. It checks nothing: the sizes are up to the caller (`choose`).
    """
    plans: dict[int, tuple[KernelPlan, Any, tuple[int, ...]]] = {}

    def quantize_blocks(x: Floats, importance: Floats, blocks_of_row: int, out: Bytes, plan: KernelPlan) -> None:
        if id(plan) not in plans:
            plans[id(plan)] = plan, *_as_arrays(plan)
        held = np.empty(ROOM + _ALIGNMENT // 4 + (WEIGHTS + 8 * LANES) // 4, np.float32)
        result = np.empty(2, np.int64)
        room = held.ctypes.data + -held.ctypes.data % _ALIGNMENT
        levels = room + 4 * ROOM
        status = function(
            result.ctypes.data, result.ctypes.data + 8,
            x.ctypes.data, importance.ctypes.data, importance.size, blocks_of_row, out.size // plan.block_bytes, out.ctypes.data,
            *plans[id(plan)][2], room, levels, levels + WEIGHTS,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"the compiled kernel ended with {status}")

    return quantize_blocks


def _as_arrays(plan: KernelPlan) -> tuple[Any, tuple[int, ...]]:
    """(arrays, their addresses and lengths in the order of the kernel's arguments)."""
    numbers = (
        plan.block_bytes,
        plan.n,
        plan.signed,
        plan.weigh,
        plan.plain,
        plan.fit,
        plan.descend,
        plan.d_at,
        plan.dmin_at,
    )
    factors = (plan.top, plan.scale_top, plan.scale_up, plan.nothing, plan.spread)
    fixed = np.array(numbers, np.int64), np.array(factors, np.float32)
    tables = plan.planes, plan.fields, plan.numerators, plan.scale_numerators
    where = [array.ctypes.data for array in fixed]
    for table in tables:
        where += [table.ctypes.data, len(table)]
    return (fixed, tables), tuple(where)
