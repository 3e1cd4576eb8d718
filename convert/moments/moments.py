"""What the matrices of a model were multiplied with, on some texts: E[x xᵀ] of every input, and an importance matrix of it.

Matrices with the same input (q, k, v; gate, up) share one. Each expert has its own, if enough tokens reach it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.memory.weights import OUTPUT, TOKEN_EMBEDDINGS

from ..imatrix.matrix import Importance, ImportanceMatrix
from ..kernels.feedback import Factors
from .gradients import Gradients
from .sums import StoredSums

Floats = npt.NDArray[np.float32]
_KEPT = 2  # factors in memory: q, k and v come one after another, and so do gate and up


@dataclass(frozen=True)
class Moments:
    """sums: (width, width) sums of x xᵀ by input, which bears the name of the first weight that it is multiplied with; those of
    experts have the expert's number after a colon. rows: tokens in each. input_of: the name without a number for every weight.
    squares: sums of squares for every weight, experts too. texts: their names; tokens: of all texts; windows: those tokens.
    method: what is made with them, for the file. gradients: if they are known. model, read: identities of what they are of.
    """

    sums: StoredSums
    rows: Mapping[str, int]
    input_of: Mapping[str, str]
    squares: Mapping[str, Importance]
    texts: tuple[str, ...]
    tokens: int
    windows: Sequence[Sequence[int]] = ()
    method: str = "error feedback"
    gradients: Gradients | None = None
    model: str = ""
    read: str = ""

    def keys(self) -> dict[str, Any]:
        """What a file made with them says of them."""
        return {
            "yarn_edge.calibration.texts": ", ".join(Path(text).name for text in self.texts),
            "yarn_edge.calibration.tokens": self.tokens,
            "yarn_edge.calibration.method": self.method,
        }

    def importance(self) -> ImportanceMatrix:
        """The diagonals, as an importance matrix."""
        return ImportanceMatrix(None, dict(self.squares), self.texts, 1, self.tokens)

    def input_name(self, weight: str, width: int, matrix: int = 0) -> str | None:
        """The input of one matrix of a weight, of this width; None if it has no moments, or an expert that saw fewer tokens than that.

        Embeddings have those of their gradients, unless they are the output matrix too or there are too few tokens.
        """
        if weight == TOKEN_EMBEDDINGS:
            known = self.gradients is not None and OUTPUT in self.input_of and self.gradients.tokens >= width
            return weight if known else None
        name = self.input_of.get(weight)
        if name is None:
            return None
        numbered = expert_input(name, matrix)
        if name not in self.sums:
            return numbered if self.rows.get(numbered, 0) >= width == self.sums.places[numbered].width else None
        return name if self.sums.places[name].width == width else None

    def mean(self, name: str) -> Floats:
        """E[x xᵀ] of an input, of embeddings E[g gᵀ], as new memory."""
        if name == TOKEN_EMBEDDINGS and self.gradients is not None:
            return self.gradients.embedding.copy()
        found = self.sums[name]
        found /= np.float32(self.rows[name])
        return found


def expert_input(name: str, expert: int) -> str:
    """The name of the part of an input that goes to an expert."""
    return f"{name}:{expert}"


class FactorsOf:
    """The factors of each matrix's input, computed when they are first wanted. Any thread may ask."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Factors] = OrderedDict()

    def __call__(self, weight: str, width: int, matrix: int = 0) -> Factors | None:
        """None for a matrix without moments. Raises YarnEdgeError if they are not positive."""
        name = self._moments.input_name(weight, width, matrix)
        if name is None:
            return None
        with self._lock:
            found = self._kept.get(name)
            if found is None:
                while len(self._kept) >= _KEPT:
                    self._kept.popitem(last=False)
                found = self._kept[name] = Factors.of(self._moments.mean(name))
            return found
