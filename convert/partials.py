"""The files that a conversion fills, until they have their names. Those made from a stream, or in a folder that outlives the run,
can be gone on with after a cut.

What is needed for that is behind the bytes of the partial file (`yarn_edge.resumable`): how many slices are in it, and where the
stream goes on. Every 64 MiB of the source, and when a run ends early, it is brought up to date.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import Terminated
from yarn_edge.hub.failures import HubUnreachableError
from yarn_edge.hub.read_ahead import ReadAhead, StreamState
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.progress import note
from yarn_edge.resumable import ResumableFile, resumable_file
from yarn_edge.writer import partial_file

from .file_plan import FilePlan, Source
from .kernels.choose import Kernels
from .one_pass import SLICE_WEIGHTS, SliceRecord

_RECORD_BYTES = 64 << 20
_FORM = 1  # of the record, and of the order of slices


@contextmanager
def writing(
    source: Source,
    plans: Sequence[FilePlan],
    importance: Mapping[str, npt.NDArray[np.float32]],
    kernels: Kernels,
    folder: Path | None = None,
) -> Iterator[tuple[list[Path], SliceRecord]]:
    """(a partial file for each plan, what keeps the record of them), removed on leaving unless they were published.

    folder: where they are until then, if it belongs to this job alone and outlives a run that is ended; None for beside their names.
    """
    with ExitStack() as stack:
        if source.remote is None and folder is None:
            yield [stack.enter_context(partial_file(plan.path)) for plan in plans], SliceRecord()
            return
        made_from = _made_from(source, importance, kernels)
        record = _FileRecord(source.remote)
        files = [
            stack.enter_context(
                resumable_file(
                    plan.path if folder is None else folder / plan.path.name,
                    plan.layout.file_bytes,
                    _key(plan, made_from),
                    record.kept_after,
                )
            )
            for plan in plans
        ]
        stack.callback(record.close)
        record.begin(files)
        yield [file.path for file in files], record


def _made_from(source: Source, importance: Mapping[str, npt.NDArray[np.float32]], kernels: Kernels) -> bytes:
    """A hash of all that decides the bytes of an output but its own plan."""
    hashed = hashlib.sha256(b"" if source.remote is None else source.remote.identity())
    parts = [_FORM, SLICE_WEIGHTS, kernels.quantizer, version("llama-cpp-python"), [t.name for t in source.tensors]]
    hashed.update(json.dumps(parts).encode())
    for name, weights in sorted(importance.items()):
        hashed.update(name.encode() + weights.tobytes())
    return hashed.digest()


def _key(plan: FilePlan, made_from: bytes) -> bytes:
    return hashlib.sha256(made_from + plan.layout.header).digest()  # the header has every type and offset


def _stream_state(record: Mapping[str, Any]) -> StreamState:
    hashed, until_hashed = (bytes.fromhex(record[key]) or None for key in ("hash", "until_hash"))
    return StreamState(record["block"], hashed, record["until"], until_hashed)


class _FileRecord(SliceRecord):
    """The record of a run, in each of its files. remote: the stream that it reads; None for files of this machine."""

    def __init__(self, remote: RemoteWeights | None) -> None:
        self._remote = remote
        self._files: list[ResumableFile] = []
        self._stream: ReadAhead | None = None
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._running: dict[int, tuple[int, int]] = {}  # slice -> its place
        self._last = (0, (0, 0))  # the slice that was taken last, and its place
        self._unsaved = self._end = 0  # _end: of all slices before the first that is not done
        self._done: dict[int, tuple[int, int]] = {}  # slices that are done, while one before them may not be: size, end

    def begin(self, files: list[ResumableFile]) -> None:
        """Go on where all files are, and start the stream there."""
        self._files = files
        records: list[dict[str, Any]] = [json.loads(file.record) for file in files if file.record]
        state: dict[str, Any] | None = None
        if len(records) == len(files):
            state = min(records, key=lambda record: int(record["slices"]))
            self.first, self.n_bytes = state["slices"], state["bytes"]
            self._last = (self.first - 1, (state["place"], state["end"]))
            self._end = state["end"]
            note(
                f"note: {files[0].path}: an earlier run made {self.n_bytes / 1e6:.0f} MB of the weights: going on from there"
            )
        if self._remote is not None:
            self._stream = self._remote.start(_stream_state(state) if state else None)

    def took(self, number: int, place: tuple[int, int]) -> None:
        """A thread begins with a slice."""
        with self._lock:
            self._running[number] = place
            self._last = (number, place)

    def finished(self, number: int, n_bytes: int) -> None:
        """A slice is in every output."""
        with self._lock:
            self._done[number] = n_bytes, self._running.pop(number)[1]
            needed = min(self._running.values(), default=self._last[1])[0]
            self._unsaved += n_bytes
            due = self._unsaved >= _RECORD_BYTES
            if due:
                self._unsaved = 0
        if self._stream is not None:
            self._stream.release(needed)
        if due:
            self._save()

    def _save(self) -> None:
        """Write the record: the slices before the first that is not done, and the stream's state there."""
        with self._saving:
            with self._lock:
                if self._running:
                    done = min(self._running)
                    place = self._running[done][0]
                else:
                    done, place = self._last[0] + 1, self._last[1][0]
                for number in [n for n in self._done if n < done]:
                    n_bytes, end = self._done.pop(number)
                    self.n_bytes += n_bytes
                    self._end = max(self._end, end)
                record: dict[str, Any] = {"slices": done, "bytes": self.n_bytes, "place": place, "end": self._end}
            if done == 0:
                return
            if self._stream is not None:
                state = self._stream.state_at(place, self._end)
                if state is None:
                    return
                record |= {"block": state.block, "hash": (state.hashed or b"").hex()}
                record |= {"until": state.until, "until_hash": (state.until_hashed or b"").hex()}
            for file in self._files:
                file.save(json.dumps(record).encode())

    def kept_after(self, error: BaseException) -> bool:
        """Whether an error leaves the files for another run: the connection or the user ended this one. Brings the record up to date."""
        if not isinstance(error, (HubUnreachableError, KeyboardInterrupt, Terminated)):
            return False
        if self._remote is not None and self._stream is None:
            return False
        with suppress(OSError):
            self._save()
        return True

    def stop(self) -> None:
        """The run ends: nobody shall wait for bytes any more."""
        if self._stream is not None:
            self._stream.stop()

    def complete(self) -> None:
        """The outputs are whole."""
        for file in self._files:
            file.complete()

    def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            self._stream.close()
