"""Scores on disk, so that an interrupted run can continue: `--save FILE`, and beside it the cache of the current window.

FILE is an .npz with the negative log-likelihoods and the identity of the run they belong to. FILE.cache is llama.cpp's own state
of the KV cache, saved periodically and on interruption. FILE holds its checksum; it is removed when the run is complete. With it, a
run of hours over one long document continues in the middle of that document.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.identity import model_identity
from yarn_edge.progress import note
from yarn_edge.regular_file import digest, is_named, open_regular, path_of
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import kv_bytes
from yarn_edge.runtime.model import Model
from yarn_edge.signals import deferred_ctrl_c
from yarn_edge.writer import check_space, partial_file, publish, write_file

from ..scoring.evaluate import Scores
from ..scoring.variants import Variant
from ..scoring.windows import Window

SAVE_SECONDS = 30.0  # between two savings of the scores
CACHE_SECONDS = 300.0  # between two savings of the cache, which can be gigabytes
_CACHE_SHARE = 20  # saving the cache may take 1/20 of the time


# field of RunIdentity -> its name in the file and in messages
_NAMES = {
    "model": "the model",
    "scaling": "the scaling",
    "kv_type": "the cache type",
    "backend": "the backend",
    "protocol": "the protocol",
    "text": "the text or how it is cut",
    "batch": "the batch or flash attention",
    "version": "the version of llama-cpp-python",
}


@dataclass(frozen=True)
class RunIdentity:
    """What two runs must have in common for one to continue the other."""

    model: str
    scaling: str
    kv_type: str
    backend: str
    protocol: str
    text: str
    batch: list[int | str]
    version: str

    def as_json(self) -> dict[str, Any]:
        """The values by their names in the file."""
        return {name: getattr(self, key) for key, name in _NAMES.items()}

    def difference(self, saved: Mapping[str, Any]) -> str | None:
        """The name of the first value that differs from the saved ones, None if all agree."""
        return next((name for name, value in self.as_json().items() if saved.get(name) != value), None)


def run_identity(
    model: Model, variant: Variant, protocol: str, windows: Sequence[Window], batch: ContextSettings
) -> RunIdentity:
    """What makes two runs the same, for `--resume`."""
    arguments = variant.arguments or model.positions.explicit_arguments
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray([window.document, window.first, *window.tokens], dtype=np.int64).tobytes())
    return RunIdentity(
        model=" ".join([model_identity(model.gguf), *sorted(variant.adapters)]),
        scaling=json.dumps([asdict(arguments), dict(variant.overrides)]),
        kv_type=variant.kv_type,
        backend=variant.backend,
        protocol=protocol,
        text=digest.hexdigest(),
        batch=[batch.n_batch, batch.attention],
        version=version("llama-cpp-python"),
    )


@dataclass(frozen=True)
class SavedCache:
    """The cache file: the tokens in it, its size and checksum, and the window that it belongs to."""

    tokens: int
    bytes: int
    hash: str
    window: int

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> SavedCache:
        """From the file. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(int(saved["tokens"]), int(saved["bytes"]), str(saved["hash"]), int(saved["window"]))


@dataclass
class ScoreFile:
    """Where the scores of the run `run` are kept."""

    path: Path
    run: RunIdentity
    _saved_at: float = field(default_factory=time.monotonic)
    _cache_saved_at: float = field(default_factory=time.monotonic)
    _cache_took: float = 0.0
    _cache: SavedCache | None = None
    _owns_cache: bool = False

    @property
    def cache_path(self) -> Path:
        """Where the cache is kept."""
        return self.path.with_name(self.path.name + ".cache")

    def load(self, scores: Scores) -> bool:
        """Fill `scores` with what the file holds. False if there is no file. Raises YarnEdgeError if it is of another run."""
        if not is_named(self.path):
            return False
        damaged = YarnEdgeError(
            f"{self.path}: is not a file of scores, or is damaged: start over with --force, without --resume"
        )
        try:
            with open_regular(self.path) as file, np.load(file, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                values = stored["nll"]
            saved_run, done = dict(header["run"]), int(header["done"])
            cache = SavedCache.of(header["cache"]) if header["cache"] else None
            owns_cache = cache is not None or bool(header.get("owns_cache"))  # also that of a window before
        except Exception as error:  # archives and JSON raise many kinds
            raise damaged from error
        different = self.run.difference(saved_run)
        if different is not None:
            raise YarnEdgeError(
                f"{self.path}: was saved by another run ({different} differs): start over with --force, without --resume"
            )
        shape = (sum(map(len, scores.nll)),)
        if values.dtype != np.float64 or values.shape != shape or not 0 <= done <= len(scores.nll):
            raise damaged
        if not np.isfinite(values[: sum(map(len, scores.nll[:done]))]).all():
            raise damaged
        at = 0
        for part in scores.nll:
            part[:] = values[at : at + len(part)]
            at += len(part)
        scores.done, self._cache, self._owns_cache = done, cache, owns_cache
        return True

    def begin(self, scores: Scores) -> None:
        """Write the file at once, so that a place that cannot be written fails before hours of work."""
        self._write(scores)

    def restore(self, context: Context, scores: Scores) -> None:
        """Load the cache, so that the current window continues where it stopped; otherwise the window starts over, with a note."""
        if scores.done >= len(scores.windows):
            return
        n, window = self._cache.tokens if self._cache is not None else 0, scores.windows[scores.done]
        scores.nll[scores.done][max(0, n + 1 - window.first) :] = np.nan  # scored again
        if not n:
            return
        if self._load_cache(context, window.tokens[:n]):
            scores.inside = n
        else:
            scores.nll[scores.done][:] = np.nan
            note(f"{self.cache_path}: is missing or has changed: the current document is evaluated again")

    def _load_cache(self, context: Context, tokens: Sequence[int]) -> bool:
        assert self._cache is not None
        try:
            with open_regular(self.cache_path) as file:
                same_size = os.fstat(file.fileno()).st_size == self._cache.bytes
                whole = same_size and digest(file) == self._cache.hash
                return whole and context.load_state(path_of(file, self.cache_path), tokens)
        except (OSError, YarnEdgeError):
            return False

    def now_and_then(self, context: Context, scores: Scores) -> None:
        """Save what is due."""
        now = time.monotonic()
        if now - self._cache_saved_at > max(CACHE_SECONDS, _CACHE_SHARE * self._cache_took):
            self.save(context, scores)
        elif now - self._saved_at > SAVE_SECONDS:
            self._write(scores)

    def save(self, context: Context | None, scores: Scores) -> None:
        """Save the scores, and the cache of the current window if there is one and the disk has room for it."""
        if context is not None and scores.inside and scores.done < len(scores.windows):
            start = time.monotonic()
            try:
                self._save_cache(context, scores)
            except YarnEdgeError as error:
                note(f"the cache was not saved ({error}): --resume will evaluate the current document again")
                self._cache = None
            self._cache_saved_at = time.monotonic()
            self._cache_took = self._cache_saved_at - start
        self._write(scores)

    def _save_cache(self, context: Context, scores: Scores) -> None:
        tokens = scores.windows[scores.done].tokens[: scores.inside]
        context.keep(len(tokens))  # an interrupted evaluation may have left more
        check_space(self.path.parent, kv_bytes(context.model.gguf, len(tokens), context.kv_type) or 0, "the cache")
        with partial_file(self.cache_path, 0o600) as partial:  # documents are private
            context.save_state(partial, tokens)
            with open_regular(partial) as written:
                self._cache = SavedCache(len(tokens), partial.stat().st_size, digest(written), scores.done)
            self._owns_cache = True
            self._write(
                scores
            )  # names the cache before it is there: whatever ends this process, the next one knows whose it is
            publish(partial, self.cache_path, force=True)

    def _write(self, scores: Scores) -> None:
        current = self._cache is not None and self._cache.window == scores.done
        cache = asdict(self._cache) if self._cache is not None and current else {}
        header = json.dumps(
            {"run": self.run.as_json(), "done": scores.done, "cache": cache, "owns_cache": self._owns_cache}
        )
        archive = io.BytesIO()
        with deferred_ctrl_c():  # an archive that an exception ended complains when it is collected
            np.savez(archive, header=np.array(header), nll=np.concatenate(scores.nll))
        write_file(self.path, archive.getvalue(), force=True)
        self._saved_at = time.monotonic()

    def finish(self, scores: Scores) -> None:
        """The last saving: the scores stay, the cache file is removed."""
        if self._owns_cache:
            self.cache_path.unlink(missing_ok=True)
        self._cache, self._owns_cache = None, False
        self._write(scores)
