"""What a calibrated job has beside its plan: the moments, from texts or from a file of an earlier run, and a folder that outlives a
run that is ended.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from yarn_edge import __version__
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import dequantize_into

from .file_plan import Source
from .moments.collect import CalibrationSettings, collect_moments, finished_moments
from .moments.gradients import TOKENS, output_gradients
from .moments.kept import read_moments, write_moments
from .moments.moments import Moments
from .moments.resumed import calibration_folder
from .one_pass import SourceTensor

_NOT_THE_MODEL = ("general.", "yarn_edge.", "quantize.", "split.", "tokenizer.chat_template")
_MOST_GRAIN = 1024  # rows that must be read together
_SIDE, _MEASURE_S = 1024, 0.05


@dataclass(frozen=True)
class Calibration:
    """What is asked for. settings: texts to read; None for those that the file of moments was made from. kept: that file, to be read
    if it is there, or else to be written; None without.
    """

    settings: CalibrationSettings | None
    kept: Path | None = None

    @property
    def texts(self) -> Mapping[str, str]:
        """Names and contents of the texts to read; empty without."""
        return {} if self.settings is None else self.settings.texts

    @contextmanager
    def at_work(self, source: Source, output: Path, sized: bool = False) -> Iterator[CalibrationWork]:
        """In the block, what is needed for `source`; beside `output` lies a folder for it, which is removed at the end. sized: whether
        types will be chosen; only the estimate depends on it.
        """
        if self.settings is not None and not (self.kept is not None and self.kept.exists()):
            seconds = _estimate_s(source, self.settings.tokens, sized)
            note(
                f"calibration: about {seconds:.0f} s" if seconds < 100 else f"calibration: about {seconds / 60:.0f} min"
            )
        model = source_identity(source)
        read = "" if self.settings is None else self.settings.identity()
        key = hashlib.sha256(f"{__version__} {model} {read} {self.kept}".encode()).hexdigest()
        with calibration_folder(output, key) as folder:
            yield CalibrationWork(self, model, folder)


@dataclass(frozen=True)
class CalibrationWork:
    """A calibration of the model with this identity, which works in `folder`."""

    asked: Calibration
    model: str
    folder: Path

    def moments(self, model_file: Callable[[], Path]) -> Moments:
        """The moments. model_file: makes the model that reads, if it has to. Raises YarnEdgeError."""
        settings, kept = self.asked.settings, self.asked.kept
        if kept is not None and (settings is None or kept.exists()):
            found = read_moments(kept, self.model, None if settings is None else settings.identity())
            note(f"{kept}: moments of {found.tokens} tokens of {', '.join(Path(text).name for text in found.texts)}")
            return found
        assert settings is not None
        found = finished_moments(settings, self.folder) or collect_moments(model_file(), settings, self.folder)
        found = replace(found, model=self.model, read=settings.identity())
        if kept is not None:
            write_moments(found, kept, force=False)
        return found

    def with_gradients(self, moments: Moments, checkpoint: Path) -> Moments:
        """The moments with the gradients, which the file of moments then has too. Raises YarnEdgeError."""
        if moments.gradients is not None:
            return moments
        gradients = output_gradients(checkpoint, moments.windows, self.folder / "gradients.npz")
        found = replace(moments, gradients=gradients)
        if self.asked.kept is not None:
            write_moments(found, self.asked.kept, force=True)
            return replace(read_moments(self.asked.kept, self.model, None), method=moments.method)
        return found


def _estimate_s(source: Source, tokens: int, sized: bool) -> float:
    """About how long it takes, from the speed of a product here. Of experts all are counted, as if each token went to each."""
    matrices = [t for t in source.tensors if len(t.ne) > 1 and t.name.startswith("blk.")]
    n_weights = sum(t.n_rows * t.width for t in matrices)
    products = 2 * n_weights * tokens  # those of the model, and about as many for the moments
    products += 4 * n_weights * TOKENS if sized else 0  # forward twice, backward twice
    products += sum(2 * t.n_rows * t.width**2 for t in matrices)  # errors carried on, at half the speed
    a = np.ones((_SIDE, _SIDE), np.float32)
    a @ a
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < _MEASURE_S:
        a @ a
        done += _SIDE**3
    return products * took / done


def source_identity(source: Source) -> str:
    """Which model it is, whatever file it is in: its keys, and of each tensor the first row and the last, in 16 bits."""
    hashed = hashlib.sha256()
    for key, entry in sorted(source.entries.items()):
        if not key.startswith(_NOT_THE_MODEL):
            hashed.update(entry)
    for tensor in sorted(source.tensors, key=lambda tensor: tensor.name):
        hashed.update(f"{tensor.name} {tensor.ne}".encode())
        if source.remote is None and tensor.grain <= _MOST_GRAIN:
            hashed.update(_sixteen_bits(tensor, 0) + _sixteen_bits(tensor, tensor.n_rows - 1))
    if source.remote is not None:
        hashed.update(source.remote.identity())
    return hashed.hexdigest()


def _sixteen_bits(tensor: SourceTensor, row: int) -> bytes:
    """A row, rounded to bfloat16; with it, its head is read."""
    first = row // tensor.grain * tensor.grain
    raw = np.empty((tensor.grain, tensor.kind.row_bytes(tensor.width)), np.uint8)
    tensor.read(first, raw)
    values = np.empty(tensor.width, np.float32)
    dequantize_into(tensor.kind, raw[row - first], values)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
