"""Which kernel makes which tensor type: ours make the K-quants (Numba, `yarn-edge[fast]`), ggml's the rest or everything.

Both make bit-identical blocks if ggml was compiled without fused multiply-adds (x86); otherwise they differ only by rounding.
Ours are compiled on first use and cached on the disk. ggml's make everything if Numba is missing or there is little to
quantize. If Numba is installed but cannot be used, a note says so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import GGMLType, check_rows, dequantize_into, quantize_into, type_named

from .kernel import Kernel, load_kernel
from .layout import LAYOUTS, WEIGHTS
from .plan import kernel_plan_of

FAST, GGML = "fast", "ggml"
VERSION = 1  # of our kernels' results: increased whenever a block may come out differently
# Weights. ggml's kernels take two seconds for them on two cores; ours load in one second, and compile in ten.
WORTH_IT = 1 << 26
COMPILE_S = 10
_CHECK_BLOCKS, _CHECK_LIMIT = 24, 1.001  # times ggml's error; more means a different search, or a compiler bug
_NOTICE_S = 3.0  # loading takes one second, on a busy machine two

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Kernels:
    """The chosen kernels. fast: makes the types of `LAYOUTS`; None if ggml's kernels make everything."""

    fast: Kernel | None = None

    @property
    def quantizer(self) -> str:
        """What is written as yarn_edge.quantizer."""
        if self.fast is not None:
            return f"yarn-edge fast {VERSION}"
        return f"ggml of llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"

    def quantize_into(self, kind: GGMLType, rows: Floats, out: Bytes, weights: Floats | None = None) -> None:
        """Quantize rows (n, width) into `out`; weights: (width,) or None. Like `ggml_types.quantize_into`, with its errors."""
        if self.fast is None or kind.name not in LAYOUTS:
            quantize_into(kind, rows, out, weights)
            return
        check_rows(kind, rows, out, weights)
        importance = np.empty(0, np.float32) if weights is None else weights
        plan = kernel_plan_of(kind.name, weights is not None)
        self.fast(rows.reshape(-1), importance, rows.shape[1] // WEIGHTS, out.reshape(-1), plan)

    def quantize_rows(self, kind: GGMLType, rows: Floats, weights: Floats | None = None) -> Bytes:
        """The rows quantized into new memory, shape (n, bytes per row)."""
        out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
        self.quantize_into(kind, rows, out, weights)
        return out


def choose_kernels(wanted: str | None, work: Mapping[GGMLType, int]) -> Kernels:
    """Kernels for this work: numbers of weights by type. wanted: FAST, GGML, or None for whichever is faster.

    Compiles ours if they are chosen and not cached; a note says so. Raises YarnEdgeError if FAST is wanted but cannot be used.
    Otherwise ggml's are used then, with a note unless Numba is not installed.
    """
    n_weights = sum(n for kind, n in work.items() if kind.name in LAYOUTS)
    if wanted not in (None, FAST, GGML):
        raise YarnEdgeError(f"kernels {wanted!r} are unknown; the kernels are {GGML} and {FAST}")
    if wanted == GGML or n_weights < (1 if wanted == FAST else WORTH_IT):
        return Kernels()
    if importlib.util.find_spec("numba") is None:
        if wanted == FAST:
            raise YarnEdgeError("--kernels fast needs Numba: pip install 'yarn-edge[fast]'")
        return Kernels()
    try:
        return Kernels(_checked_kernel())
    except Exception as error:  # a broken installation of Numba, an unsupported processor, a disk error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted == FAST:
            raise YarnEdgeError(f"--kernels fast: Numba cannot be used here ({reason})") from error
        note(
            f"note: Numba cannot be used here ({reason}): ggml's kernels quantize instead, which is several times slower"
        )
        return Kernels()


@cache
def _checked_kernel() -> Kernel:
    """Our kernel, compiled and compared with ggml's on a few blocks of each type."""
    notice = threading.Timer(_NOTICE_S, note, (f"compiling the kernels, which is needed once: about {COMPILE_S} s",))
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
    """Our kernel as it was kept on the disk, or compiled and kept; a note says so if it cannot be kept."""
    kernel, failure = load_kernel()
    if failure is not None:
        note(f"note: the compiled kernels cannot be cached ({failure}): set NUMBA_CACHE_DIR to a writable folder")
    return kernel


def _check(kernels: Kernels, kind: GGMLType, weights: Floats | None) -> None:
    """Raise ValueError if our kernels make a larger error than ggml's."""
    rows = np.random.default_rng(0).standard_normal((_CHECK_BLOCKS, WEIGHTS)).astype(np.float32)
    errors = []
    for side in (kernels, Kernels()):
        made = side.quantize_rows(kind, rows, weights)
        again = np.empty_like(rows)
        dequantize_into(kind, made.reshape(-1), again.reshape(-1))
        errors.append(float((np.square(again - rows) * (1 if weights is None else weights)).sum()))
    if not errors[0] <= errors[1] * _CHECK_LIMIT:
        raise ValueError(f"{kind.name} comes out wrong: its error is {errors[0]:g}, ggml's {errors[1]:g}")
