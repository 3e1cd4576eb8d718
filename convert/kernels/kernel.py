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
# Where Numba's functions put results and errors; addresses, integers, floats.
_ARGUMENTS = (ctypes.c_void_p,) * 5


def load_kernel() -> tuple[Kernel, Exception | None]:
    """(the kernel, why it could not be kept). Raises whatever Numba raises if it cannot compile it."""

    def compile_it() -> bytes:
        from .kquant import compile_kernel

        return compile_kernel()

    code, failure = machine_code.kept_or_compiled((Path(__file__).with_name(name) for name in SOURCES), compile_it)
    return callable_kernel(machine_code.loaded(code, _ARGUMENTS)), failure


def callable_kernel(function: Callable[..., int]) -> Kernel:
    """kernel(x, importance, blocks_of_row, out, plan): quantize whole rows, flat, into blocks of the plan's type in `out`.

    importance: of a row's columns, or empty. It checks nothing: the sizes are up to the caller (`choose`).
    """
    plans: dict[int, tuple[KernelPlan, tuple[Any, Any, Any]]] = {}

    def quantize_blocks(x: Floats, importance: Floats, blocks_of_row: int, out: Bytes, plan: KernelPlan) -> None:
        if id(plan) not in plans:
            plans[id(plan)] = plan, _as_arrays(plan)
        places, numbers, factors = plans[id(plan)][1]
        held = np.empty(ROOM + _ALIGNMENT // 4 + (WEIGHTS + 8 * LANES) // 4, np.float32)
        room = held.ctypes.data + -held.ctypes.data % _ALIGNMENT
        levels = room + 4 * ROOM
        buffers = x.ctypes.data, importance.ctypes.data, out.ctypes.data, room, levels, levels + WEIGHTS
        places = np.array([*places, *buffers], np.uintp)
        numbers = np.array([*numbers, importance.size, blocks_of_row, out.size // plan.block_bytes], np.int64)
        result = np.empty(2, np.int64)
        at = result.ctypes.data
        status = function(at, at + 8, places.ctypes.data, numbers.ctypes.data, factors.ctypes.data)
        if status:
            raise RuntimeError(f"the compiled kernel ended with {status}")

    return quantize_blocks


def _as_arrays(plan: KernelPlan) -> tuple[list[int], list[int], Floats]:
    """What the kernel gets of a plan: the addresses of its tables, its integers with the tables' lengths, its floats."""
    p = plan
    tables: tuple[Any, ...] = p.planes, p.fields, p.numerators, p.scale_numerators
    numbers = [p.block_bytes, p.n, int(p.signed), p.weigh, int(p.plain), int(p.fit), int(p.descend), p.d_at, p.dmin_at]
    factors = np.array([p.top, p.scale_top, p.scale_up, p.nothing, p.spread], np.float32)
    return [table.ctypes.data for table in tables], [*numbers, *map(len, tables)], factors
