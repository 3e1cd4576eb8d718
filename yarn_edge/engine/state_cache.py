"""Evaluated prompts on disk: the keys and values of documents, so that they are not computed again next time.

Each prompt is one file, NAME.state: llama.cpp's own state of the sequence, then the tokens, then a line of JSON, its length and a
mark. It is used only for the same run (`run_key`: weights, adapters, scaling, cache type, kernels, version) and the same first tokens, and
only if its checksum is right. If anything is wrong with it, there is a note, and the prompt is evaluated. Files are written under
a temporary name and renamed. One that grew, as conversations do, takes the place of what it began with; the least recently used ones
are deleted when the folder exceeds its limit.

Documents are private: files can be read by their owner alone, and so can the folder if it holds nothing else. llama.cpp trusts a
state, so one counts only if it is a regular file that belongs to this user and that nobody else could write.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.gguf.identity import model_identity
from yarn_edge.progress import note
from yarn_edge.regular_file import digest, open_regular, path_of
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.unified import UnifiedContext
from yarn_edge.writer import open_output, partial_file, publish, remove_stale

MAX_BYTES = 8 << 30
_FORMAT, _MARK, _SUFFIX = 1, b"yarn-edge state\n", ".state"
_MAX_JSON, _MAX_TOKENS = 1 << 16, 1 << 26
_GROWTH = 1.25  # a file of so many times the tokens still takes the place of the shorter one
_OWNER_ONLY, _OTHERS_WRITE = 0o700, 0o022


Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Entry:
    """One file. usable: how many of its first tokens were evaluated in whole batches from position 0 and are in the prompt.

    order: the positions in the order of the state, if that is another one (`UnifiedContext.saved_order`).
    """

    path: Path
    tokens: Tokens
    usable: int
    state_bytes: int
    digest: str
    order: Tokens | None = None


class StateCache:
    """A folder of states, created if it is missing. Raises YarnEdgeError if that is not possible."""

    def __init__(self, folder: Path, limit_bytes: int = MAX_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=_OWNER_ONLY)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise YarnEdgeError(f"{folder}: no permission to write to this folder")
            remove_stale(folder, lambda name: name.endswith(_SUFFIX))
            _make_private(folder)
            self._shrink()
        except OSError as error:
            raise os_error(error, folder) from error

    def find(self, key: str, tokens: Sequence[int], unit: int, n_ctx: int, *, whole: bool = False) -> Entry | None:
        """The entry with the most usable tokens, the smallest of several; None if no entry has any.

        unit: what their number must be a multiple of. n_ctx: tokens that the context holds. whole: only entries all of whose usable
        tokens are the prompt's.
        """
        entries = []
        for path in self._files():
            entry = _read_trailer(path, key)
            if entry is not None and len(entry.tokens) <= n_ctx:
                usable = _common(entry.tokens[: entry.usable], tokens)
                if whole and usable < entry.usable:
                    continue
                entries.append(replace(entry, usable=usable - usable % unit))
        best = max(entries, key=lambda entry: (entry.usable, -len(entry.tokens)), default=None)
        return best if best is not None and best.usable else None

    def load(self, context: Context, entry: Entry, sequence: int = 0) -> bool:
        """Fill a sequence with the entry's usable tokens. If it is damaged: False, an empty sequence, and a note."""
        tokens = entry.tokens.tolist()
        try:
            with _open_state(entry.path) as file:  # what is loaded is what was checked, whatever has this name by then
                whole = entry.digest == digest(file, entry.state_bytes)
                if whole and isinstance(context, UnifiedContext):
                    whole = context.load_state(path_of(file, entry.path), tokens, sequence, entry.order)
                elif whole:
                    whole = context.load_state(path_of(file, entry.path), tokens)
        except (OSError, YarnEdgeError):
            whole = False
        if not whole:
            context.clear(sequence)
            if os.path.lexists(entry.path):  # no other process has just removed it
                note(f"{entry.path}: is damaged: it is removed, and the document is read again")
                _remove(entry.path)
            return False
        context.keep(entry.usable, sequence)
        _touch(entry.path)
        return True

    def keep(self, context: Context, key: str, tokens: Sequence[int], canonical: int, sequence: int = 0) -> bool:
        """Write the state of a sequence, which holds `tokens`. False, with a note, if that is not possible."""
        name = hashlib.blake2b(key.encode() + np.asarray(tokens[:canonical], np.int32).tobytes(), digest_size=16)
        path = self.folder / (name.hexdigest() + _SUFFIX)
        if _read_trailer(path, key) is not None:
            _touch(path)
            return True
        order = context.saved_order(sequence) if isinstance(context, UnifiedContext) else None
        try:
            with partial_file(path, 0o600) as partial:
                context.save_state(partial, tokens, sequence)
                size = partial.stat().st_size
                if size > self.limit_bytes:
                    raise YarnEdgeError(f"{size / 2**20:.0f} MiB exceed the limit of the cache")
                with open_regular(partial) as written, io.BufferedWriter(open_output(partial, "a")) as file:
                    file.write(_trailer(key, tokens, canonical, (size, digest(written, size)), order))
                publish(partial, path, force=True)
        except (YarnEdgeError, OSError) as error:
            note(f"the evaluated prompt is not kept in {self.folder}: {error}")
            return False
        if not context.model.recurrent:
            self._replace(path, key, tokens[:canonical])
        self._shrink(path)
        return True

    def _replace(self, newest: Path, key: str, tokens: Sequence[int]) -> None:
        """Remove the files whose usable tokens are the beginning of these, which are not many more."""
        for path in self._files():
            entry = _read_trailer(path, key)
            if path == newest or entry is None or len(tokens) > _GROWTH * entry.usable:
                continue
            if _common(entry.tokens[: entry.usable], tokens) == entry.usable:
                _remove(path)

    def _files(self) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.name.endswith(_SUFFIX)]
        except OSError as error:
            note(f"{self.folder}: {error.strerror}: no saved states are used")
            return []

    def _shrink(self, newest: Path | None = None) -> None:
        """Remove the least recently used files, but not the newest, until the others are within the limit."""
        states = []
        for path in self._files():
            with suppress(OSError):  # another process may have removed it
                states.append((path.lstat().st_mtime, path.lstat().st_size, path))
        total = sum(size for _time, size, _path in states)
        for _time, size, path in sorted(states):
            if total <= self.limit_bytes:
                return
            if path != newest:
                _remove(path)
                total -= size


def _make_private(folder: Path) -> None:
    """Take others' permissions from this user's states, and from the folder if there is nothing else in it."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(OSError, YarnEdgeError), _open_state(path) as file:
            os.fchmod(file.fileno(), 0o600)
    state = folder.stat()
    if (
        state.st_mode & 0o077
        and _is_own(state)
        and all(path.name.endswith((_SUFFIX, ".partial")) for path in folder.iterdir())
    ):
        folder.chmod(_OWNER_ONLY)


def _is_own(state: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or state.st_uid == os.geteuid()


def _open_state(path: Path) -> io.BufferedReader:
    """Raises YarnEdgeError for a file that somebody else may have written."""
    file = open_regular(path, follow_links=False)
    state = os.fstat(file.fileno())
    if not _is_own(state) or (hasattr(os, "geteuid") and state.st_mode & _OTHERS_WRITE):
        file.close()
        raise YarnEdgeError(f"{path}: could be written by others")
    return file


def _touch(path: Path) -> None:
    with suppress(OSError):
        os.utime(path, follow_symlinks=False)


def _common(kept: Tokens, tokens: Sequence[int]) -> int:
    most = min(len(kept), len(tokens))
    differing = np.nonzero(kept[:most] != np.asarray(tokens[:most], np.int32))[0]
    return int(differing[0]) if len(differing) else most


def run_key(context: Context) -> str:
    """A hash of everything that must be the same for a state to be reusable."""
    gguf = context.model.gguf
    device = context.model.device
    fields = {
        "format": _FORMAT,
        "llama.cpp": str(context.api.__version__),
        "weights": model_identity(gguf),
        "arguments": {name: repr(value) for name, value in vars(context.arguments).items()},
        "overrides": sorted((name, repr(value)) for name, value in context.model.overrides.items()),
        "kv_type": context.kv_type,
        "n_batch": context.n_batch,
        "n_ubatch": context.n_ubatch,
        "attention": context.settings.attention,
        "values": "transposed" if context.settings.attention == "plain" else "in rows",
        "device": "CPU" if device is None else device.name,
    }
    if context.settings.unified:
        fields["cache"] = "unified"  # prompts are read in other batches
    if loras := context.model.loras.files:
        fields["loras"] = sorted(file.identity for file in loras)
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()


def _trailer(
    key: str, tokens: Sequence[int], canonical: int, state: tuple[int, str], order: Tokens | None = None
) -> bytes:
    """state: its bytes and its digest."""
    state_bytes, digest = state
    if order is not None and bool((order == np.arange(len(order))).all()):
        order = None
    fields = {
        "format": _FORMAT,
        "key": key,
        "tokens": len(tokens),
        "canonical": canonical,
        "state": state_bytes,
        "digest": digest,
    }
    if order is not None:
        fields["ordered"] = len(order)
    line = json.dumps(fields).encode()
    numbers = np.concatenate([np.asarray(part, np.int32) for part in (tokens, order) if part is not None])
    return numbers.tobytes() + line + len(line).to_bytes(8, "little") + _MARK


def _read_trailer(path: Path, key: str) -> Entry | None:
    """The entry in a file of this run; None if it belongs to another run or is not such a file."""
    try:
        with _open_state(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_MARK) - 8))
            end = file.read()
            length = int.from_bytes(end[:8], "little")
            if end[8:] != _MARK or length > min(_MAX_JSON, size):
                return None
            file.seek(size - len(end) - length)
            fields = json.loads(file.read(length))
            n_tokens, canonical, state = (int(fields[name]) for name in ("tokens", "canonical", "state"))
            if fields["format"] != _FORMAT or fields["key"] != key or not 0 < canonical <= n_tokens <= _MAX_TOKENS:
                return None
            ordered = int(fields.get("ordered", 0))
            if ordered not in (0, n_tokens) or state + 4 * (n_tokens + ordered) + length + len(end) != size:
                return None
            file.seek(state)
            tokens, order = (np.frombuffer(file.read(4 * n), np.int32) for n in (n_tokens, ordered))
            if ordered and not np.array_equal(np.sort(order), np.arange(n_tokens)):
                return None
            return Entry(path, tokens, canonical, state, str(fields["digest"]), order if ordered else None)
    except (YarnEdgeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
