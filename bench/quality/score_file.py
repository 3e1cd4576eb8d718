"""Scores on the disk, to go on from after an interruption: `--save FILE`, and beside it the cache of the window at hand.

FILE is an .npz of the negative log-likelihoods and of what run they belong to. FILE.cache is llama.cpp's own state of the KV
cache, written now and then and on interruption, with a checksum in FILE, and removed when the run is done: a run of hours over
one long document goes on in the middle of it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.kv_cache import kv_bytes
from yarn_edge.writer import check_space, digest, partial_file, publish

from ..scoring.evaluate import Scores

SAVE_SECONDS = 30.0  # between two savings of the scores
CACHE_SECONDS = 300.0  # between two savings of the cache, which may be gigabytes
_CACHE_SHARE = 20  # saving the cache may take 1/20 of the time


@dataclass
class ScoreFile:
    """Where scores are kept. run: what makes two runs the same (model, scaling, cache type, tokens, protocol)."""

    path: Path
    run: dict[str, Any]
    _saved: float = field(default_factory=time.monotonic)
    _cached: float = field(default_factory=time.monotonic)
    _cache_took: float = 0.0
    _cache: dict[str, Any] = field(default_factory=dict)
    _owns_cache: bool = False

    @property
    def cache_path(self) -> Path:
        """Where the cache is kept."""
        return self.path.with_name(self.path.name + ".cache")

    def load(self, scores: Scores) -> bool:
        """Fill `scores` with what the file holds; False where there is no file. Raises YarnEdgeError for another run's."""
        if not self.path.exists():
            return False
        damaged = YarnEdgeError(
            f"{self.path}: is no file of scores, or a damaged one: --force without --resume begins anew"
        )
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                values = stored["nll"]
            told, done, cache = dict(header["run"]), int(header["done"]), dict(header["cache"])
        except Exception as error:  # of archives and of JSON, many kinds
            raise damaged from error
        for name, value in self.run.items():
            if told.get(name) != value:
                raise YarnEdgeError(
                    f"{self.path}: was saved by another run ({name} differs): --force without --resume begins anew"
                )
        whole = sum(map(len, scores.nll[:done]))
        if (
            values.dtype != np.float64
            or values.shape != (sum(map(len, scores.nll)),)
            or not 0 <= done <= len(scores.nll)
        ):
            raise damaged
        if not np.isfinite(values[:whole]).all():
            raise damaged
        at = 0
        for part in scores.nll:
            part[:] = values[at : at + len(part)]
            at += len(part)
        scores.done, self._cache, self._owns_cache = done, cache, bool(cache)
        return True

    def begin(self, scores: Scores) -> None:
        """Write the file at once, so that a place that cannot be written fails before hours of work."""
        self._write(scores)

    def restore(self, context: Context, scores: Scores) -> None:
        """Put the cache back, so that the window at hand goes on where it stood; else it begins anew, with a note."""
        if scores.done >= len(scores.windows):
            return
        n, window = int(self._cache.get("tokens", 0)), scores.windows[scores.done]
        scores.nll[scores.done][max(0, n + 1 - window.first) :] = np.nan  # scored again
        if not n:
            return
        try:
            whole = (
                self.cache_path.stat().st_size == self._cache["bytes"]
                and digest(self.cache_path) == self._cache["hash"]
            )
        except OSError:
            whole = False
        if whole and context.load_state(self.cache_path, window.tokens[:n]):
            scores.inside = n
        else:
            scores.nll[scores.done][:] = np.nan
            note(f"{self.cache_path}: is missing or another: the document at hand is read again")

    def now_and_then(self, context: Context, scores: Scores) -> None:
        """Save what is due."""
        now = time.monotonic()
        if now - self._cached > max(CACHE_SECONDS, _CACHE_SHARE * self._cache_took):
            self.save(context, scores)
        elif now - self._saved > SAVE_SECONDS:
            self._write(scores)

    def save(self, context: Context | None, scores: Scores) -> None:
        """Scores, and the cache of the window at hand where there is one and the disk has room for it."""
        if context is not None and scores.inside and scores.done < len(scores.windows):
            start = time.monotonic()
            try:
                self._keep_cache(context, scores)
            except YarnEdgeError as error:
                note(f"the cache is not kept ({error}): --resume will read the document at hand again")
                self._cache = {}
            self._cached = time.monotonic()
            self._cache_took = self._cached - start
        self._write(scores)

    def _keep_cache(self, context: Context, scores: Scores) -> None:
        tokens = scores.windows[scores.done].tokens[: scores.inside]
        context.keep(len(tokens))  # an interrupted evaluation may have left more
        check_space(self.path.parent, kv_bytes(context.model.gguf, len(tokens), context.kv_type) or 0, "the cache")
        with partial_file(self.cache_path) as partial:
            context.save_state(partial, tokens)
            found = {"tokens": len(tokens), "bytes": partial.stat().st_size, "hash": digest(partial)}
            publish(partial, self.cache_path, force=True)
        self._owns_cache = True
        self._cache = found | {"window": scores.done}

    def _write(self, scores: Scores) -> None:
        cache = self._cache if self._cache.get("window") == scores.done else {}
        header = json.dumps({"run": self.run, "done": scores.done, "cache": cache})
        with partial_file(self.path) as partial:
            with partial.open("wb") as file:
                np.savez(file, header=np.array(header), nll=np.concatenate(scores.nll))
            publish(partial, self.path, force=True)
        self._saved = time.monotonic()

    def finish(self, scores: Scores) -> None:
        """The last saving: the scores stay, the cache goes."""
        self._cache = {}
        self._write(scores)
        if self._owns_cache:
            self.cache_path.unlink(missing_ok=True)
