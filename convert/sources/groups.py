"""Which group of scales each column of a matrix belongs to, where a file says so (g_idx)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..stored import Tensor
from .pieces import Pieces


def group_of_columns(
    pieces: Pieces, index: Tensor | None, n_groups: int, width: int
) -> Callable[[], npt.NDArray[np.intp] | None]:
    """A function that reads them once; it returns None if the groups lie one after another, `width` columns each.

    It raises YarnEdgeError for a group that is not there. index: None, or all of it -1, if nothing is said.
    """

    @functools.cache
    def groups() -> npt.NDArray[np.intp] | None:
        if index is None:
            return None
        found = index.whole().astype(np.intp)
        if (found == -1).all() or np.array_equal(found, np.arange(len(found)) // width):
            return None
        if found.min() < 0 or found.max() >= n_groups:
            raise pieces.error(index.name, f"names group {int(found.max())}, but there are {n_groups}")
        return found

    return groups
