"""The proof of calibrated files, before they get their names: each is compared with its source, and so are the same types rounded with
the importance matrix of the same reading. The figures are written into the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.averages import Mean, mean_of, paired
from yarn_edge.gguf.edit import set_numbers
from yarn_edge.gguf.read import read_gguf
from yarn_edge.likelihood import Float64
from yarn_edge.progress import bar
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.writer import check_space

from .file_plan import FilePlan
from .gguf_source import gguf_source
from .imatrix.matrix import ImportanceMatrix
from .importance import importance_weights
from .moments.moments import Moments
from .moments.proof import HELD_OUT, OTHER_KIND, kl_of, logit_bytes, proof_windows
from .one_pass import Rounding, fill

_KEY = "yarn_edge.calibration.kl_"
_NAMES = {HELD_OUT: "held-out text", OTHER_KIND: "bundled text"}
_SURE = 2  # standard errors
_BLOCK = 64  # neighboring tokens that count as one observation


@dataclass(frozen=True)
class ProvedLoss:
    """KL to the source in nats on one kind of text: of a file, of its types with an importance matrix, and the difference, paired."""

    ours: Mean
    imatrix: Mean
    apart: Mean

    @classmethod
    def of(cls, ours: Sequence[Float64], imatrix: Sequence[Float64]) -> ProvedLoss:
        """From one array of KL for each window."""
        return cls(mean_of(np.concatenate(ours)), mean_of(np.concatenate(imatrix)), paired(ours, imatrix, _BLOCK))

    @property
    def is_worse(self) -> bool:
        """Whether the file is surely worse than with the importance matrix."""
        return self.apart.mean > _SURE * self.apart.stderr

    def as_json(self) -> dict[str, float]:
        """The figures of --json."""
        means = {"kl": self.ours, "kl_imatrix": self.imatrix, "difference": self.apart}
        return {
            name: value
            for key, mean in means.items()
            for name, value in ((key, mean.mean), (f"{key}_stderr", mean.stderr))
        }

    def __str__(self) -> str:
        ours, imatrix = (f"{mean.mean:.4f} ± {mean.stderr:.4f}" for mean in (self.ours, self.imatrix))
        return f"{ours} (importance matrix: {imatrix})"


@dataclass(frozen=True)
class CalibrationProof:
    """source: the GGUF that the files are compared with, in 16 bits or more. windows: of tokens, by kind of text. folder: for what is
    needed meanwhile, which its owner removes. losses: what was found, by file and kind.
    """

    source: Path
    windows: Mapping[str, Sequence[Sequence[int]]]
    folder: Path
    threads: int | None = None
    losses: dict[Path, dict[str, ProvedLoss]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path, texts: Mapping[str, str], folder: Path, threads: int | None) -> CalibrationProof:
        """The proof of what these texts calibrate."""
        return cls(source, proof_windows(source, texts), folder, threads)

    def keys(self) -> dict[str, float]:
        """The keys for the figures, which are not known yet."""
        return {key: math.nan for kind in self.windows for key in _keys(kind)}

    def check_room(self, files: Sequence[FilePlan]) -> None:
        """Raise YarnEdgeError if the disk has no room for the files, as many to compare them with, and the source's logits."""
        n_bytes = 2 * sum(plan.layout.file_bytes for plan in files)
        check_space(self.folder, n_bytes + logit_bytes(self.source, self._all_windows), "the proof of the files")

    def run(self, files: Sequence[FilePlan], written: Sequence[Path], matrix: ImportanceMatrix | None) -> None:
        """Measure the files, which are `written`, and write the figures into them. matrix: the importance of the same moments."""
        others = self._with_importance(files, matrix)
        found = kl_of(self.source, [*written, *others], self._all_windows, self.folder, self.threads)
        for path in others:
            path.unlink()
        for plan, path, ours, imatrix in zip(files, written, found, found[len(files) :], strict=False):
            first, values = 0, dict[str, float]()
            for kind, windows in self.windows.items():
                part = slice(first, first := first + len(windows))
                loss = ProvedLoss.of(ours[part], imatrix[part])
                self.losses.setdefault(plan.path, {})[kind] = loss
                values |= dict(zip(_keys(kind), (loss.ours.mean, loss.imatrix.mean), strict=True))
            set_numbers(path, values)

    @property
    def _all_windows(self) -> list[Sequence[int]]:
        return [window for windows in self.windows.values() for window in windows]

    def _with_importance(self, files: Sequence[FilePlan], matrix: ImportanceMatrix | None) -> list[Path]:
        """The same types without error feedback, made from the source."""
        tensors = gguf_source(read_gguf(self.source)).tensors
        paths = [self.folder / f"imatrix-{i}.gguf" for i in range(len(files))]
        rounding = Rounding(importance_weights(tensors, matrix), files[0].kernels)
        with bar("With the importance matrix", sum(t.n_bytes for t in tensors), "bytes") as advance:
            outputs = [plan.output(path) for plan, path in zip(files, paths, strict=True)]
            fill(tensors, outputs, rounding, self.threads or physical_threads(), advance)
        return paths

    def lines(self, plan: FilePlan) -> list[str]:
        """What people are told of a file."""
        found = self.losses[plan.path]
        told = [f"{_NAMES[kind]} {loss}" for kind, loss in found.items()]
        lines = [f"{plan.quant.name}: KL to the source in nats: {', '.join(told)}"]
        for kind, loss in found.items():
            if loss.is_worse:
                by = f"{loss.apart.mean:.4f} ± {loss.apart.stderr:.4f}"
                lines.append(
                    f"warning: {plan.quant.name}: on the {_NAMES[kind]} worse than with the importance matrix, by {by} nats: "
                    "calibrate with texts of more kinds, or with more tokens"
                )
        return lines

    def figures(self, plan: FilePlan) -> dict[str, Any]:
        """The same as data."""
        return {kind: loss.as_json() for kind, loss in self.losses.get(plan.path, {}).items()}


def calibration_keys(moments: Moments, proof: CalibrationProof | None) -> dict[str, Any]:
    """What a file says of its calibration."""
    return {**moments.keys(), **(proof.keys() if proof else {})}


def _keys(kind: str) -> tuple[str, str]:
    """The keys of a file's KL on a kind of text, and of that with the importance matrix."""
    return f"{_KEY}{kind}", f"{_KEY}imatrix_{kind}"
