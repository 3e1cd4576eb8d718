"""The moments of a model's inputs on some texts: windows of each text go through llama.cpp, and every matrix's input is read on its way.

After each window what was read so far is kept in the folder, so that a run that was ended goes on there.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.choose import fastest_attention
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.identity import model_identity
from yarn_edge.graph.opening import open_context
from yarn_edge.memory.weights import OUTPUT
from yarn_edge.progress import bar, note
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from ..imatrix.activations import ActivationTap, Squares, expert_rows, tensor_values, weight_text
from ..imatrix.matrix import Importance
from .mapped import MappedFile
from .moments import Moments, expert_input
from .proof import held_out_tokens
from .resumed import load_progress_arrays, save_progress_arrays
from .sums import GrowingSums

BATCH = 2048  # tokens of one graph, at most; the moments are read and written once for each
_LOGITS_BYTES = 256 << 20  # for which llama.cpp keeps room, though they are not computed
LEAST_WINDOW = 256
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CalibrationSettings:
    """texts: names and contents, of different kinds. tokens: in all, the same number from each text. window: tokens of one reading, at
    most.
    """

    texts: Mapping[str, str]
    tokens: int = 16384
    window: int = 4096
    threads: int | None = None

    def identity(self) -> str:
        """SHA-256 of what is read."""
        parts = [str((self.tokens, self.window)), *self.texts.values()]
        return hashlib.sha256("".join(hashlib.sha256(p.encode()).hexdigest() for p in parts).encode()).hexdigest()


class MomentsTap(ActivationTap):
    """Adds up x xᵀ of every input that is a matrix, beside the squares of all; of experts if as many tokens as it is wide can be
    expected for each of them, of n_tokens in all. mapped: the model's file, of which pages are let go of before the next layer.
    output_width: of output.weight, whose inputs are added up too; 0 without.
    """

    def __init__(
        self, sums: GrowingSums, n_tokens: int, mapped: MappedFile | None = None, output_width: int = 0
    ) -> None:
        super().__init__()
        self.sums = sums
        self.rows: dict[str, int] = {}
        self.input_of: dict[str, str] = {}
        self._n_tokens, self._mapped, self._output_width = n_tokens, mapped, output_width
        self._input_name = self._layer = ""

    def squares_of(self, node: Any, name: bytes) -> Squares:
        """See `ActivationTap`."""
        weight, text = node.src[0].contents, weight_text(name)
        layer = ".".join(text.split(".")[:2])
        if self._mapped is not None and layer != self._layer:
            self._mapped.let_go()
        self._layer = layer
        self._input_name = self.input_of.get(text, text)
        if node.op == self._mul_mat_id:
            return self._expert_squares(node, name)
        if weight.ne[2] * weight.ne[3] != 1:
            self._input_name = ""
            return super().squares_of(node, name)
        x = np.ascontiguousarray(tensor_values(node.src[1]).reshape(-1, node.src[1].contents.ne[0]))
        return Squares(self._added(self._input_name, x)[None], np.array([len(x)], np.int64))

    def _expert_squares(self, node: Any, name: bytes) -> Squares:
        n_expert, width = node.src[0].contents.ne[2], node.src[0].contents.ne[0]
        if self._n_tokens * node.src[2].contents.ne[0] < n_expert * width:
            self._input_name = ""
            return super().squares_of(node, name)
        sums, counts = np.zeros((n_expert, width)), np.zeros(n_expert, np.int64)
        for expert, x in expert_rows(node):
            sums[expert] = self._added(expert_input(self._input_name, expert), x)
            counts[expert] = len(x)
        return Squares(sums, counts)

    def _end(self, node: Any) -> bool:
        if node.ne[0] == self._output_width:
            x = np.ascontiguousarray(tensor_values(ctypes.pointer(node)).reshape(-1, self._output_width))
            self._input_name = OUTPUT
            self.add(OUTPUT.encode(), Squares(self._added(OUTPUT, x)[None], np.array([len(x)], np.int64)))
        return super()._end(node)

    def _added(self, name: str, x: Floats) -> npt.NDArray[np.float64]:
        self.rows[name] = self.rows.get(name, 0) + len(x)
        return self.sums.add(name, x)

    def add(self, name: bytes, new: Squares) -> None:
        """See `ActivationTap`."""
        if self._input_name:
            self.input_of[weight_text(name)] = self._input_name
        super().add(name, new)


def collect_moments(model: Path, settings: CalibrationSettings, folder: Path) -> Moments:
    """The moments of the inputs of `model` on the texts. folder: they lie there, so that it must outlive them; if an earlier run with
    the same model and texts was ended, this one goes on in it.

    Raises YarnEdgeError for texts that are too short, and for inputs that are not finite.
    """
    with Model(model) as loaded:
        windows = _windows(loaded, settings)
        return _Reading(loaded, windows, settings, folder).go_on()


def _windows(model: Model, settings: CalibrationSettings) -> list[list[int]]:
    """Windows of equal length, as many of each text, one kind after the other so that what is read last is not one kind alone.

    The end of each text is left for the proof.
    """
    if len(settings.texts) == 1:
        note(
            "warning: one text calibrates for texts of its kind, and can make others worse than an importance matrix does: "
            "give several kinds, --calibrate A.txt,B.txt"
        )
    names = list(settings.texts)
    whole = [model.tokenize(text, add_special=False, parse_special=False) for text in settings.texts.values()]
    tokens = [text[: len(text) - held_out_tokens(len(text), len(whole))] for text in whole]
    each = settings.tokens // len(tokens)
    shortest = min(map(len, tokens))
    window = min(settings.window, model.n_ctx_train, each, shortest)
    if window < LEAST_WINDOW:
        short = names[tokens.index(min(tokens, key=len))]
        raise YarnEdgeError(f"{short}: has {shortest} tokens: calibration needs at least {LEAST_WINDOW} of each text")
    cut = [_cut(text, window, each // window, model) for text in tokens]
    few = [name for name, windows in zip(names, cut, strict=True) if len(windows) < each // window]
    if few:
        note(f"note: {', '.join(few)}: shorter than its share of {each} tokens")
    most = max(map(len, cut))
    return [windows[i] for i in range(most) for windows in cut if i < len(windows)]


def _cut(tokens: Sequence[int], window: int, wanted: int, model: Model) -> list[list[int]]:
    """Up to `wanted` windows, spread over the text."""
    n = min(wanted, len(tokens) // window)
    starts = [i * (len(tokens) // window) // n * window for i in range(n)]
    begin = [model.bos] if model.add_bos else []
    return [[*begin, *tokens[start : start + window - len(begin)]] for start in starts]


def finished_moments(settings: CalibrationSettings, folder: Path) -> Moments | None:
    """Those of an earlier run in `folder` that read all; None if there are none."""
    found = load_progress_arrays(folder / "progress.npz")
    if found is None or found[0]["done"] < len(found[0]["windows"]):
        return None
    told, arrays = found
    places = {name: (int(at), int(width)) for name, (at, width) in told["places"].items()}
    with closing(GrowingSums(folder / "sums.bin", places, told["done"])) as sums:
        stored = sums.stored()
    n_tokens, names = sum(map(len, told["windows"])), tuple(settings.texts)
    return Moments(stored, told["rows"], told["input_of"], _squares_of(arrays), names, n_tokens, told["windows"])


def _squares_of(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Importance]:
    names = [name.removeprefix("sums ") for name in arrays if name.startswith("sums ")]
    return {name: Importance(arrays[f"sums {name}"], arrays[f"counts {name}"]) for name in names}


class _Reading:
    """One reading of the windows, or the rest of one."""

    def __init__(self, model: Model, windows: list[list[int]], settings: CalibrationSettings, folder: Path) -> None:
        self._model, self._windows, self._settings = model, windows, settings
        self._progress, self._sums_path = folder / "progress.npz", folder / "sums.bin"
        fits = 1 << (_LOGITS_BYTES // (4 * model.n_vocab)).bit_length() - 1
        self._batch = min(BATCH, len(windows[0]), max(fits, LEAST_WINDOW))
        self._identity = hashlib.sha256(f"{model_identity(model.gguf)} {self._batch} {windows}".encode()).hexdigest()
        self._squares: dict[str, Importance] = {}
        self._done = 0
        self._told: dict[str, Any] = {"rows": {}, "input_of": {}, "places": {}}

    def go_on(self) -> Moments:
        """Read what is left."""
        self._load()
        n_tokens = sum(map(len, self._windows))
        places = {name: (int(at), int(width)) for name, (at, width) in self._told["places"].items()}
        with closing(GrowingSums(self._sums_path, places, self._done)) as sums:
            output = self._model.gguf.tensors.get(OUTPUT)
            output_width = 0 if output is None else output.shape[0]
            tap = MomentsTap(sums, n_tokens, MappedFile(self._model.path), output_width)
            tap.rows.update(self._told["rows"])
            tap.input_of.update(self._told["input_of"])
            if self._done < len(self._windows):
                self._read(tap, n_tokens)
            stored = sums.stored()
        names = tuple(self._settings.texts)
        return Moments(stored, tap.rows, tap.input_of, self._squares, names, n_tokens, self._windows)

    def _read(self, tap: MomentsTap, n_tokens: int) -> None:
        n_ctx, threads = len(self._windows[0]), self._settings.threads
        wanted = ContextSettings(n_ctx=n_ctx, n_batch=self._batch, n_ubatch=self._batch, threads=threads)
        attention = fastest_attention(wanted, self._model.gguf)
        with (
            open_context(self._model, replace(wanted, attention=attention), tap=tap) as context,
            bar("Moments", n_tokens, "tokens") as advance,
        ):
            advance(sum(map(len, self._windows[: self._done])))
            for i, window in enumerate(self._windows[self._done :], self._done + 1):
                what = f"window {i} of {len(self._windows)}"
                found = tap.measure(context, [window], lambda n, what=what: advance(n, what))  # type: ignore[misc]
                for name, new in found.items():
                    importance = Importance(new.sums.reshape(len(new.counts), -1), new.counts)
                    held = self._squares.get(name)
                    self._squares[name] = importance if held is None else held + importance
                self._save(tap, i)

    def _save(self, tap: MomentsTap, done: int) -> None:
        told = {"identity": self._identity, "done": done, "rows": tap.rows, "input_of": tap.input_of}
        told |= {"places": tap.sums.finish(), "windows": self._windows}
        arrays: dict[str, npt.NDArray[Any]] = {
            f"sums {name}": importance.sums for name, importance in self._squares.items()
        }
        arrays |= {f"counts {name}": importance.counts for name, importance in self._squares.items()}
        save_progress_arrays(self._progress, told, arrays)

    def _load(self) -> None:
        found = load_progress_arrays(self._progress)
        if found is None or found[0].get("identity") != self._identity:
            return
        self._told, arrays = found
        self._done = int(self._told["done"])
        self._squares = _squares_of(arrays)
        note(f"note: an earlier run read {self._done} of {len(self._windows)} windows: going on from there")
