"""From logits to numbers, row by row: negative log-likelihoods, and divergences between two distributions.

Rows are processed in small blocks that stay in the CPU cache, on several threads (NumPy releases the interpreter lock). Memory is
one batch of logits and a few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
S = TypeVar("S")
T = TypeVar("T")

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Divergences:
    """For each row: KL(base || other) in nats, negative log-likelihoods of the target, whether both have the same top token."""

    kl: Float64
    nll: Float64
    base_nll: Float64
    same_top: npt.NDArray[np.bool_]


class Rows:
    """Processes rows of logits with `threads` threads. Use it as a context manager."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)

    def nll(self, logits: Float32, targets: Int) -> Float64:
        """Negative log-likelihoods in nats of targets (n,) under logits (n, n_vocab); NaN or infinite if the logits are.

        Computed with exp in float32 and a pairwise sum: within 2e-6 nats of float64.
        """
        nll = np.empty(len(targets))

        def work(rows: slice) -> None:
            part, peak = logits[rows], logits[rows].max(axis=1, keepdims=True)
            shifted = part - peak
            picked = np.take_along_axis(shifted, targets[rows, None], axis=1)[:, 0].astype(np.float64)
            np.exp(shifted, out=shifted)
            nll[rows] = np.log(shifted.sum(axis=1).astype(np.float64)) - picked

        self._over(logits, 1, work)
        return nll

    def log_normalizers(self, logits: Float32) -> Float64:
        """The log of the sum of exp of each row, (n,), in float64."""
        log_z = np.empty(len(logits))

        def work(rows: slice) -> None:
            peak = logits[rows].max(axis=1, keepdims=True).astype(np.float64)
            wide = logits[rows] - peak
            np.exp(wide, out=wide)
            log_z[rows] = np.log(wide.sum(axis=1)) + peak[:, 0]

        self._over(logits, 2, work)
        return log_z

    def divergences(
        self, base: Float32, base_log_z: Float64, base_top: Int, other: Float32, targets: Int
    ) -> Divergences:
        """Divergences in float64. base, other: logits (n, n_vocab); base_log_z, base_top: log-normalizer and top token of base's rows."""
        n = len(targets)
        kl, other_nll, base_nll, same = np.empty(n), np.empty(n), np.empty(n), np.empty(n, dtype=bool)

        def work(rows: slice) -> None:
            theirs, ours, at = other[rows], base[rows], targets[rows, None]
            peak = theirs.max(axis=1, keepdims=True).astype(np.float64)
            scratch = theirs - peak
            np.exp(scratch, out=scratch)
            log_z = np.log(scratch.sum(axis=1)) + peak[:, 0]
            p = np.subtract(ours, base_log_z[rows, None], out=scratch)
            np.exp(p, out=p)
            apart = np.subtract(ours, theirs, dtype=np.float64)
            with np.errstate(invalid="ignore"):
                crossed = np.einsum("ij,ij->i", p, apart)
                if not np.isfinite(crossed).all():  # tokens that the base rules out (-inf) count nothing
                    np.copyto(apart, 0.0, where=p == 0)
                    crossed = np.einsum("ij,ij->i", p, apart)
            kl[rows] = crossed - base_log_z[rows] + log_z
            other_nll[rows] = log_z - np.take_along_axis(theirs, at, axis=1)[:, 0]
            base_nll[rows] = base_log_z[rows] - np.take_along_axis(ours, at, axis=1)[:, 0]
            same[rows] = theirs.argmax(axis=1) == base_top[rows]

        self._over(base, 2, work)
        return Divergences(kl, other_nll, base_nll, same)

    def each(self, work: Callable[[int], T], n: int) -> list[T]:
        """[work(0), …, work(n - 1)], computed on all threads."""
        return list(self._pool.map(_quietly(work), range(n)))

    def _over(self, logits: Float32, widening: int, work: Callable[[slice], None]) -> None:
        """Call `work` on slices that cover all rows."""
        n, step = len(logits), max(1, _BLOCK_BYTES // (logits.shape[1] * 4 * widening))
        slices = [slice(at, min(at + step, n)) for at in range(0, n, step)]
        for _ in self._pool.map(_quietly(work), slices):
            pass

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def _quietly(work: Callable[[S], T]) -> Callable[[S], T]:
    """`work` without NumPy's warnings: the caller judges NaN and infinity. NumPy's settings are per thread."""

    def quiet(what: S) -> T:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return work(what)

    return quiet
