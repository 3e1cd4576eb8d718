"""The moments of a model's inputs on some texts: windows of each text go through llama.cpp, and every matrix's input is read on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.choose import fastest_attention
from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.progress import bar, note
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.writer import check_space

from ..imatrix.activations import ActivationTap, Squares, tensor_values, weight_text
from ..imatrix.matrix import Importance
from .moments import Moments
from .proof import held_out_tokens

BATCH = 1024  # tokens of one graph; the moments are read and written once for each
IN_MEMORY = (
    1 << 30
)  # bytes of moments; what is larger goes to a scratch file, of which the system keeps what it has room for
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


class MomentsTap(ActivationTap):
    """Adds up x xᵀ of every input that is a matrix, beside the squares of all."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.sums: dict[str, Floats] = {}
        self.rows: dict[str, int] = {}
        self.input_of: dict[str, str] = {}
        self._folder, self._bytes, self._input_name = folder, 0, ""

    def squares_of(self, node: Any, name: bytes) -> Squares:
        """See `ActivationTap`."""
        weight = node.src[0].contents
        if node.op == self._mul_mat_id or weight.ne[2] * weight.ne[3] != 1:
            self._input_name = ""
            return super().squares_of(node, name)
        x = np.ascontiguousarray(tensor_values(node.src[1]).reshape(-1, node.src[1].contents.ne[0]))
        with np.errstate(all="ignore"):
            product = x.T @ x
        self._input_name = self.input_of.get(weight_text(name), weight_text(name))
        held = self.sums.get(self._input_name)
        if held is None:
            held = self.sums[self._input_name] = self._new(len(product))
            self.rows[self._input_name] = 0
        held += product
        self.rows[self._input_name] += len(x)
        return Squares(np.diagonal(product).astype(np.float64)[None], np.array([len(x)], np.int64))

    def add(self, name: bytes, new: Squares) -> None:
        """See `ActivationTap`."""
        if self._input_name:
            self.input_of[weight_text(name)] = self._input_name
        super().add(name, new)

    def _new(self, width: int) -> Floats:
        self._bytes += 4 * width * width
        if self._bytes <= IN_MEMORY:
            return np.zeros((width, width), np.float32)
        check_space(self._folder, 4 * width * width, "moments")
        made: Floats = np.memmap(self._folder / f"{len(self.sums)}.bin", np.float32, "w+", shape=(width, width))
        return made


def collect_moments(model: Path, settings: CalibrationSettings, folder: Path) -> Moments:
    """The moments of the inputs of `model` on the texts. folder: for those that are too large for memory; it must outlive them.

    Raises YarnEdgeError for texts that are too short, and for inputs that are not finite.
    """
    with Model(model) as loaded:
        return _read(loaded, _windows(loaded, settings), settings, MomentsTap(folder))


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


def _read(model: Model, windows: list[list[int]], settings: CalibrationSettings, tap: MomentsTap) -> Moments:
    n_ctx = len(windows[0])
    wanted = ContextSettings(n_ctx=n_ctx, n_batch=BATCH, n_ubatch=BATCH, threads=settings.threads)
    attention = fastest_attention(wanted, model.gguf)
    squares: dict[str, Importance] = {}
    n_tokens = sum(map(len, windows))
    with (
        open_context(model, replace(wanted, attention=attention), tap=tap) as context,
        bar("Moments", n_tokens, "tokens") as advance,
    ):
        for i, window in enumerate(windows, 1):
            found = tap.measure(context, [window], lambda n, i=i: advance(n, f"window {i} of {len(windows)}"))  # type: ignore[misc]
            for name, new in found.items():
                importance = Importance(new.sums.reshape(len(new.counts), -1), new.counts)
                squares[name] = squares[name] + importance if name in squares else importance
    return Moments(tap.sums, tap.rows, tap.input_of, squares, tuple(settings.texts), n_tokens, windows)
