"""Matrices that lie the other way round in a file, as rows: some columns are read, turned, and kept for the next slices.

GPTQ and AWQ store (inputs, outputs), packed; a slice of a GGUF is some outputs with all of their inputs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..stored import Tensor
from .arithmetic import Floats

Words = npt.NDArray[np.uint32]
PANEL_BYTES = 8 << 20
_KEPT = 3  # threads take slices in turn: most are of one panel, some of the next


@dataclass(frozen=True)
class Panel:
    """Some outputs of a matrix, turned. words: packed weights; scales, zeros: (outputs, groups)."""

    words: Words
    scales: Floats
    zeros: Floats


class PanelCache:
    """The last few panels that were read, of all tensors together. Any thread may ask."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, int], Panel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, number: int, read: Callable[[], Panel]) -> Panel:
        """Panel `number` of a tensor, which `read` makes if it is not kept."""
        with self._lock:
            found = self._held.pop((name, number), None) or read()
            self._held[name, number] = found
            if len(self._held) > _KEPT:
                self._held.popitem(last=False)
            return found


def turned_words(tensor: Tensor, first: int, stop: int) -> Words:
    """Columns [first, stop) of a matrix of int32, as rows."""
    n_rows, width = tensor.shape
    columns = np.empty((n_rows, stop - first), np.uint32)
    if stop - first == width:
        tensor.read(0, columns.reshape(-1).view(np.uint8))
    else:
        flat = columns.view(np.uint8)
        for row in range(n_rows):
            tensor.read(4 * (row * width + first), flat[row])
    return np.ascontiguousarray(columns.T)
