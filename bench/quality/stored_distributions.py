"""A base's next-token distributions on disk, for candidates that do not fit into memory beside it.

Each distribution keeps the tokens that hold all but TAIL of the probability, with 16-bit log-probabilities (steps of about 0.0005
nats), and the rest as one sum. Apart from that rounding, whose floor is about 1e-8 nats, the divergence over these parts never
exceeds the true one. How much it misses is measured on the first tokens, which are also kept whole. llama-perplexity keeps 16 bits
for every token of the vocabulary.
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
from yarn_edge.likelihood import Divergences, Float32, Float64, Int, Rows

from ..scoring.evaluate import ScoredBatch

TAIL = 1e-4  # probability kept as one sum
EXACT = 128  # rows that are also kept whole
# Bytes of the bitmap, number of kept tokens, top token, log Z, probability of the rest, nll, lowest log p.
_ROW = struct.Struct("<IIIdddf")


class Distributions:
    """Rows written with `add` and read back in the same order with `compare`. Use it as a context manager."""

    def __init__(self, folder: Path | None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="yarn-edge-base-")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise os_error(error, folder) from error
        self._exact: list[Float32] = []
        self.n_rows = 0
        self.n_bytes = 0

    def add(self, batch: ScoredBatch, rows: Rows) -> Float64:
        """Store the distributions of one batch of the base. Returns the targets' negative log-likelihoods."""
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
                f"the base's distributions cannot be stored: {os_error(error)}: choose another folder with --scratch"
            ) from error
        self.n_bytes += len(data)

    def rewind(self) -> None:
        """Go back to the first row, for the next candidate."""
        try:
            self._file.seek(0)
        except OSError as error:
            raise YarnEdgeError(f"the base's distributions cannot be read: {os_error(error)}") from error

    def compare(self, batch: ScoredBatch, rows: Rows) -> Divergences:
        """Compare the next rows with a candidate's logits for the same tokens."""
        stored = [self._read() for _ in range(len(batch.targets))]
        log_z = rows.log_normalizers(batch.logits)
        kl = np.array(rows.each(lambda i: stored[i].divergence(batch.logits[i], float(log_z[i])), len(stored)))
        nll = log_z - np.take_along_axis(batch.logits, batch.targets[:, None], axis=1)[:, 0]
        same = batch.logits.argmax(axis=1) == np.array([row.top for row in stored])
        return Divergences(kl, nll, np.array([row.nll for row in stored]), same)

    def exact(self, batch: ScoredBatch, first: int, rows: Rows) -> Float64:
        """The true divergences of the batch's rows that are kept whole. first: number of its first row in the run."""
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
        """Delete the file."""
        with contextlib.suppress(OSError):  # data that a full disk could not take
            self._file.close()

    def __enter__(self) -> Distributions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Row:
    """One stored distribution: kept tokens, their log p, the probability of the rest, the top token, the target's nll."""

    def __init__(self, kept: Int, log_p: Float64, rest: float, top: int, nll: float) -> None:
        self.kept, self.rest, self.top, self.nll = kept, rest, top, nll
        p = np.exp(log_p)
        shift = math.log((1 - rest) / p.sum())  # rounding must not change their total probability
        self.log_p, self.p = log_p + shift, p * math.exp(shift)

    def divergence(self, logits: Float32, log_z: float) -> float:
        """KL in nats over the kept tokens, with the rest as one."""
        log_q = logits.astype(np.float64) - log_z
        kl = float(self.p @ (self.log_p - log_q[self.kept]))
        if self.rest > 0:
            log_q[self.kept] = -np.inf
            outside = float(np.exp(log_q).sum())  # not as a difference from 1, which would cancel
            kl += self.rest * (math.log(self.rest) - math.log(outside)) if outside > 0 else math.inf
        return kl


def _pack(logits: Float32, log_z: float, nll: float) -> bytes:
    """A row as bytes: _ROW, the bitmap of kept tokens, their steps."""
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
