"""The thread in which vectors of texts are made, beside the model's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from yarn_edge.engine.embeddings import Embedder, Vector
from yarn_edge.serve.lanes import Lane
from yarn_edge.serve.refusals import StoppingError


class VectorLane(Lane):
    """A thread that evaluates the texts of one request after another."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__("vectors")
        self.embedder = embedder

    async def vectors(self, texts: Sequence[Sequence[int]]) -> list[Vector]:
        """The vectors of texts in tokens. Being cancelled ends the work after the slice that is evaluated.

        Raises BusyError if too many are waiting, StoppingError after `shut_down`, YarnEdgeError as `Embedder.vector` does.
        """
        left = threading.Event()

        def stopped() -> bool:
            return left.is_set() or self._stopped

        def work() -> list[Vector]:
            try:
                return [self.embedder.vector(tokens, stopped) for tokens in texts]
            except KeyboardInterrupt:
                raise StoppingError from None

        job = self._begin(work)
        try:
            return await asyncio.wrap_future(job)
        finally:
            left.set()
