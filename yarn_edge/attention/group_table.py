"""The groups of a batch, as kernels read them: which queries belong to which sequence, and where that sequence's cells are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.cells import CellMap

# Of a row: the group's first query, its queries, the address of its cells by position, the cells that its first query sees, whether
# they are handled as many queries are.
GROUP_WIDTH = 5
Table = npt.NDArray[np.int64]


def group_table(cells: CellMap, parts: Sequence[BatchPart]) -> tuple[Table, Table]:
    """(number of groups, then a row of GROUP_WIDTH for each part of the batch; the cells of the batch's tokens).

    How a prompt's tokens are handled does not depend on how many of them a batch has, so that slices of any size give the same.
    """
    table, first, places = [len(parts)], 0, []
    for part in parts:
        own = cells.places[part.sequence]
        table += [first, len(part.tokens), own.ctypes.data, part.start + 1, not part.generated]
        places.append(own[part.start : part.start + len(part.tokens)])
        first += len(part.tokens)
    return np.array(table, np.int64), np.concatenate(places).astype(np.int64)
