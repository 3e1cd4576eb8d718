"""Which kernel makes which tensor type: ours for the K-quants (Numba, `yarn-edge[fast]`), ggml's for the rest or for all.

Both make the same blocks to the bit where ggml was compiled without fused multiply-adds (x86), and else the same but for
rounding. Ours are compiled on the first use and kept on the disk. Without Numba ggml's make everything, as they do where
there is little to make; that ours cannot be used although Numba is there is told.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import GGMLType, check_rows, dequantize_into, quantize_into, type_named

from .layout import LAYOUTS, WEIGHTS
from .plan import kernel_plan_of

FAST, GGML = "fast", "ggml"
VERSION = 1  # of what ours make; counted up when a block may come out differently
# Weights; ggml's kernels make so many in two seconds on two cores, ours are loaded in one and compiled in ten.
WORTH_IT = 1 << 26
COMPILE_S = 10
_SOURCES = ("lanes.py", "plan.py", "layout.py", "search.py", "kquant.py")
_CHECK_BLOCKS, _CHECK_LIMIT = 24, 1.001  # of ggml's error; more would be another search, or a compiler that errs
_NOTICE_S = 3.0  # loading takes one, on a busy machine two

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Kernel = Callable[[Floats, Floats, int, Bytes, Any], int]


@dataclass(frozen=True)
class Kernels:
    """Kernels that were chosen. fast: what makes the types of `LAYOUTS`, or None: ggml's make everything."""

    fast: Kernel | None = None

    @property
    def quantizer(self) -> str:
        """What is written as yarn_edge.quantizer."""
        if self.fast is not None:
            return f"yarn-edge fast {VERSION}"
        return f"ggml of llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"

    def quantize_into(self, kind: GGMLType, rows: Floats, out: Bytes, weights: Floats | None = None) -> None:
        """As `ggml_types.quantize_into`: rows (n, width) into `out`, weights (width,) or None; errors as there."""
        if self.fast is None or kind.name not in LAYOUTS:
            quantize_into(kind, rows, out, weights)
            return
        check_rows(kind, rows, out, weights)
        importance = np.empty(0, np.float32) if weights is None else weights
        plan = kernel_plan_of(kind.name, weights is not None)
        self.fast(rows.reshape(-1), importance, rows.shape[1] // WEIGHTS, out.reshape(-1), plan)

    def quantize_rows(self, kind: GGMLType, rows: Floats, weights: Floats | None = None) -> Bytes:
        """`quantize_into` with memory of its own: shape (n, bytes per row)."""
        out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
        self.quantize_into(kind, rows, out, weights)
        return out


def choose_kernels(wanted: str | None, work: Mapping[GGMLType, int]) -> Kernels:
    """Kernels for so many weights of each type. wanted: FAST, GGML, or None: what is done sooner.

    Compiles ours where they are chosen and were not compiled before (a note says so). Raises YarnEdgeError if they are
    wanted and cannot be used; otherwise that is a note, and silence where Numba is not installed.
    """
    n_weights = sum(n for kind, n in work.items() if kind.name in LAYOUTS)
    if wanted not in (None, FAST, GGML):
        raise YarnEdgeError(f"kernels {wanted!r} are unknown; there are {GGML} and {FAST}")
    if wanted == GGML or n_weights < (1 if wanted == FAST else WORTH_IT):
        return Kernels()
    if importlib.util.find_spec("numba") is None:
        if wanted == FAST:
            raise YarnEdgeError("--kernels fast needs Numba: pip install 'yarn-edge[fast]'")
        return Kernels()
    try:
        return Kernels(_checked_kernel())
    except Exception as error:  # whatever an installation of Numba, a processor or a disk does wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted == FAST:
            raise YarnEdgeError(f"--kernels fast: Numba cannot be used here ({reason})") from error
        note(f"note: Numba cannot be used here ({reason}): ggml's kernels quantize instead, several times slower")
        return Kernels()


@cache
def _checked_kernel() -> Kernel:
    """Ours, compiled, and held against ggml's on a few blocks of each type."""
    notice = threading.Timer(_NOTICE_S, note, (f"compiling the kernels, once: about {COMPILE_S} s",))
    notice.daemon = True
    notice.start()
    try:
        kernel = _compiled_kernel()
    finally:
        notice.cancel()
    for name in LAYOUTS:
        for weights in (None, np.linspace(0.5, 2, WEIGHTS, dtype=np.float32)):
            _check(Kernels(kernel), type_named(name), weights)
    return kernel


def _compiled_kernel() -> Kernel:
    """From the disk, or compiled and kept there; compiled for this process alone where nothing can be kept."""
    from .kquant import build

    try:
        return build(_version_of_sources(), True)
    except Exception as error:  # no folder that can be written, a full disk, a damaged file
        made = build(_version_of_sources(), False)
        note(f"note: the compiled kernels cannot be kept ({error}): NUMBA_CACHE_DIR names a folder where they can")
        return made


def _version_of_sources() -> int:
    """Changes with the code of the kernels: Numba looks only at the file of the outermost function."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")


def _check(kernels: Kernels, kind: GGMLType, weights: Floats | None) -> None:
    """Raises ValueError if ours make a larger error than ggml's."""
    rows = np.random.default_rng(0).standard_normal((_CHECK_BLOCKS, WEIGHTS)).astype(np.float32)
    errors = []
    for side in (kernels, Kernels()):
        made = side.quantize_rows(kind, rows, weights)
        again = np.empty_like(rows)
        dequantize_into(kind, made.reshape(-1), again.reshape(-1))
        errors.append(float((np.square(again - rows) * (1 if weights is None else weights)).sum()))
    if not errors[0] <= errors[1] * _CHECK_LIMIT:
        raise ValueError(f"{kind.name} comes out wrong: error {errors[0]:g}, ggml's {errors[1]:g}")
