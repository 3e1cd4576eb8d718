"""What a context calls before each node of a graph (`yarn_edge.graph` makes it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from yarn_edge.llama_rules.effective import LivePositions
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.cells import CellMap


class GraphHook(Protocol):
    """What llama.cpp calls before each node. live: the positions that it puts into the graph. in_python: whether Python is called."""

    callback: Any
    user_data: int
    live: LivePositions | None
    in_python: bool

    @property
    def in_order(self) -> bool:
        """Whether attention can read each sequence's cells in the order of their positions, as `place` says."""

    def place(self, cells: CellMap, parts: Sequence[BatchPart]) -> None:
        """Before an evaluation of these parts, whose cells are known: attention is to read those cells."""

    def begin(self) -> None:
        """Before an evaluation."""

    def check(self, complete: bool) -> None:
        """After an evaluation: raises what the callback could not. complete: whether all graphs were computed."""

    def close(self) -> None:
        """After the context was freed."""
