"""A base's next-token distributions on the disk, for candidates that do not fit into memory beside it.

Of each distribution the tokens that hold all but TAIL of the probability are kept, each with its log-probability in 16 bits
(steps of about 0.0005 nats), and the rest as one sum. The divergence over these parts is never more than the true one but for
that rounding, whose floor is about 1e-8 nats. What it misses is measured on the first tokens, which are kept whole.
llama-perplexity keeps 16 bits of every token of the vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import struct
import tempfile
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np

from yarn_edge.errors import YarnEdgeError, os_error

from ..scoring.evaluate import ScoredBatch
from ..scoring.likelihood import Divergences, Float32, Float64, Int, Rows

TAIL = 1e-4  # probability that is kept as one sum
EXACT = 128  # rows that are kept whole, too
_ROW = struct.Struct(
    "<IIIdddf"
)  # bytes of the bitmap, kept tokens, top token, log Z, probability of the rest, nll, lowest log p


class Distributions:
    """Written row by row with `add`, read back in the same order with `compare`. Use as a context manager."""

    def __init__(self, folder: Path | None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="yarn-edge-base-")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise os_error(error, folder) from error
        self._exact: list[Float32] = []
        self.n_rows = 0
        self.n_bytes = 0

    def add(self, batch: ScoredBatch, rows: Rows) -> Float64:
        """Keep the distributions of one batch of the base; returns the targets' negative log-likelihoods."""
        log_z = rows.log_normalizers(batch.logits)
        nll = log_z - np.take_along_axis(batch.logits, batch.targets[:, None], axis=1)[:, 0]
        if not np.isfinite(nll).all():
            return nll  # for the caller to refuse
        packed = rows.each(lambda i: _pack(batch.logits[i], float(log_z[i]), float(nll[i])), len(nll))
        for row, data in zip(batch.logits, packed, strict=True):
            if len(self._exact) < EXACT:
                self._exact.append(row.copy())
            self._write(data)
        self.n_rows += len(packed)
        return nll

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise YarnEdgeError(
                f"the base's distributions cannot be kept: {os_error(error)}: --scratch names another folder"
            ) from error
        self.n_bytes += len(data)

    def rewind(self) -> None:
        """Back to the first row, for the next candidate."""
        try:
            self._file.seek(0)
        except OSError as error:
            raise YarnEdgeError(f"the base's distributions cannot be kept: {os_error(error)}") from error

    def compare(self, batch: ScoredBatch, rows: Rows) -> Divergences:
        """The next rows against a candidate's logits of the same tokens."""
        stored = [self._read() for _ in range(len(batch.targets))]
        log_z = rows.log_normalizers(batch.logits)
        kl = np.array(rows.each(lambda i: stored[i].divergence(batch.logits[i], float(log_z[i])), len(stored)))
        nll = log_z - np.take_along_axis(batch.logits, batch.targets[:, None], axis=1)[:, 0]
        same = batch.logits.argmax(axis=1) == np.array([row.top for row in stored])
        return Divergences(kl, nll, np.array([row.nll for row in stored]), same)

    def exact(self, batch: ScoredBatch, first: int, rows: Rows) -> Float64:
        """True divergences of those rows of a batch that are kept whole; first: number of its first row in the run."""
        n = max(0, min(len(batch.targets), len(self._exact) - first))
        if not n:
            return np.empty(0)
        base = np.stack(self._exact[first : first + n])
        return rows.divergences(
            base, rows.log_normalizers(base), base.argmax(axis=1), batch.logits[:n], batch.targets[:n]
        ).kl

    def _read(self) -> _Row:
        header = self._file.read(_ROW.size)
        n_bitmap, n_kept, top, _log_z, rest, nll, lowest = _ROW.unpack(header)
        bitmap = np.frombuffer(zlib.decompress(self._file.read(n_bitmap)), dtype=np.uint8)
        steps = np.frombuffer(self._file.read(2 * n_kept), dtype="<u2")
        return _Row(np.flatnonzero(np.unpackbits(bitmap)), lowest * (1 - steps / 65535.0), rest, top, nll)

    def close(self) -> None:
        """The file goes."""
        with contextlib.suppress(OSError):  # what a full disk did not take
            self._file.close()

    def __enter__(self) -> Distributions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Row:
    """One stored distribution: the kept tokens, their log p, the probability of the rest, the top token, the target's nll."""

    def __init__(self, kept: Int, log_p: Float64, rest: float, top: int, nll: float) -> None:
        self.kept, self.rest, self.top, self.nll = kept, rest, top, nll
        p = np.exp(log_p)
        shift = math.log((1 - rest) / p.sum())  # rounding must not change what all of them hold together
        self.log_p, self.p = log_p + shift, p * math.exp(shift)

    def divergence(self, logits: Float32, log_z: float) -> float:
        """KL over the kept tokens and the rest as one, in nats."""
        log_q = logits.astype(np.float64) - log_z
        found = float(self.p @ (self.log_p - log_q[self.kept]))
        if self.rest > 0:
            log_q[self.kept] = -np.inf
            outside = float(np.exp(log_q).sum())  # no difference from 1, which would cancel
            found += self.rest * (math.log(self.rest) - math.log(outside)) if outside > 0 else math.inf
        return found


def _pack(logits: Float32, log_z: float, nll: float) -> bytes:
    """A row as bytes."""
    p = np.exp(logits.astype(np.float64) - log_z)
    order = np.argsort(p)
    n_rest = int(np.searchsorted(np.cumsum(p[order]), TAIL))  # the smallest ones, together less than TAIL
    kept = np.zeros(len(p), dtype=bool)
    kept[order[n_rest:]] = True
    rest = float(p[~kept].sum())
    log_p = logits[kept].astype(np.float64) - log_z
    lowest = float(np.float32(min(log_p.min(), -1e-6)))
    steps = np.rint(np.clip(1 - log_p / lowest, 0, 1) * 65535).astype("<u2")
    bitmap = zlib.compress(np.packbits(kept).tobytes(), 1)
    return _ROW.pack(len(bitmap), len(steps), int(logits.argmax()), log_z, rest, nll, lowest) + bitmap + steps.tobytes()
