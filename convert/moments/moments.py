"""What the matrices of a model were multiplied with, on some texts: E[x xᵀ] of every input, and an importance matrix of it.

Matrices with the same input (q, k, v; gate, up) share one. Experts have none: too few tokens reach each of them. What they
have is their importance.
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

from ..imatrix.matrix import Importance, ImportanceMatrix, read_imatrix
from ..kernels.feedback import Factors

Floats = npt.NDArray[np.float32]
_KEPT = 2  # factors in memory: q, k and v come one after another, and so do gate and up


@dataclass(frozen=True)
class Moments:
    """sums: (width, width) sums of x xᵀ by input, which bears the name of the first weight that it is multiplied with. rows: tokens
    in each. input_of: that name for every weight. squares: sums of squares for every weight, experts too. texts: their names;
    tokens: of all texts; windows: those tokens. method: what is made with them, for the file.
    """

    sums: Mapping[str, Floats]
    rows: Mapping[str, int]
    input_of: Mapping[str, str]
    squares: Mapping[str, Importance]
    texts: tuple[str, ...]
    tokens: int
    windows: Sequence[Sequence[int]] = ()
    method: str = "error feedback"

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


def importance_for(imatrix: str | Path | None, moments: Moments | None) -> ImportanceMatrix | None:
    """What a job's tensors are weighted with: the moments' own importance, else that in a file. Raises YarnEdgeError."""
    if moments is not None:
        return moments.importance()
    return None if imatrix is None else read_imatrix(imatrix)


class FactorsOf:
    """The factors of each weight's input, computed when they are first wanted. Any thread may ask."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Factors] = OrderedDict()

    def __call__(self, weight: str, width: int) -> Factors | None:
        """None for a weight without moments. Raises YarnEdgeError if they are not positive."""
        name = self._moments.input_of.get(weight)
        if name is None or len(self._moments.sums[name]) != width:
            return None
        with self._lock:
            found = self._kept.get(name)
            if found is None:
                found = Factors.of(self._moments.sums[name] / np.float32(self._moments.rows[name]))
                self._kept[name] = found
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return found
