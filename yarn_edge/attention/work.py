"""The memory that kernels work in, which ggml gives a custom operation none of: one area for each context."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from yarn_edge.attention.spans import span_count

FEW = 16  # queries of a sequence that are handled together
BLOCK_QUERIES, BLOCK_RESULTS = 8, 192  # of a block of more queries: the least queries, and the rows that it should have
TILE, BLOCK_MARGIN = 64, 8  # cells; rows that a block may be filled up with
_LINE, _FLOAT = 64, 4  # bytes

# The area's head, in bytes: two counters, each on a line of its own, then what follows them.
NEXT, DONE, SCRATCH, SCRATCH_BYTES, PARTIALS, CALLS, GROUPS, HEAD_BYTES = 0, 64, 128, 136, 144, 152, 160, 192


def scratch_floats(d_k: int, d_v: int, heads: int, kv_heads: int) -> int:
    """Floats that one thread needs for queries, results, scores and a tile."""
    group = heads // kv_heads
    block = max(BLOCK_QUERIES, BLOCK_RESULTS // group) * group + BLOCK_MARGIN
    masks = max(FEW, BLOCK_QUERIES, BLOCK_RESULTS // group) * TILE // 2
    return masks + TILE * (d_k + d_v) + max(block * (d_k + d_v + TILE + 2), FEW * (heads * d_k + group * TILE))


def few_rooms(n_seq: int) -> int:
    """FEW queries each: how many times that a batch of a unified cache of n_seq sequences may have, besides its prompts."""
    return -(-n_seq // (2 * FEW))


def partials_floats(d_v: int, heads: int, sequences: int, cells: int) -> int:
    """Floats of the results of all spans."""
    return FEW * heads * (d_v + 2) * sequences * span_count(cells)


class WorkArea:
    """The memory of one context. scratch, partials: floats, of one thread and of all spans. address: what kernels are given."""

    def __init__(self, threads: int, scratch: int, partials: int) -> None:
        scratch = self.scratch = -(-_FLOAT * scratch // _LINE) * _LINE  # bytes
        partials = self.partials = _FLOAT * partials
        self._memory = np.zeros(HEAD_BYTES + threads * scratch + partials + 2 * _LINE, np.uint8)
        self.address = -(-self._memory.ctypes.data // _LINE) * _LINE
        start = self.address + HEAD_BYTES
        head = self._head()
        head[SCRATCH // 8], head[SCRATCH_BYTES // 8], head[PARTIALS // 8] = start, scratch, start + threads * scratch

    def _head(self) -> npt.NDArray[np.int64]:
        skip = self.address - self._memory.ctypes.data
        return self._memory[skip : skip + HEAD_BYTES].view(np.int64)

    def place(self, groups: npt.NDArray[np.int64]) -> None:
        """Have the kernels compute these groups (`yarn_edge.attention.groups`), which the caller keeps."""
        self._head()[GROUPS // 8] = groups.ctypes.data

    @property
    def calls(self) -> int:
        """Nodes that kernels have computed."""
        return int(self._head()[CALLS // 8])
