"""The thread in which vectors of texts are made, beside the model's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from yarn_edge.engine.embeddings import Embedder, Vector
from yarn_edge.serve.refusals import BusyError, StoppingError

MAX_WAITING = 64


class VectorLane:
    """One request at a time, first come, first served."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vectors")
        self._jobs: set[Future[list[Vector]]] = set()
        self._stopped = threading.Event()

    async def vectors(self, texts: Sequence[Sequence[int]]) -> list[Vector]:
        """The vectors of texts in tokens. Being cancelled ends the work after the slice that is evaluated.

        Raises BusyError if too many are waiting, StoppingError after `shut_down`, YarnEdgeError as `Embedder.vector` does.
        """
        if self._stopped.is_set():
            raise StoppingError
        if len(self._jobs) > MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} requests are already waiting: try again later")
        left = threading.Event()

        def stopped() -> bool:
            return left.is_set() or self._stopped.is_set()

        def work() -> list[Vector]:
            try:
                return [self.embedder.vector(tokens, stopped) for tokens in texts]
            except KeyboardInterrupt:
                raise StoppingError from None

        job = self._thread.submit(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        try:
            return await asyncio.wrap_future(job)
        finally:
            left.set()

    def shut_down(self) -> None:
        """Begin nothing more, and end what runs."""
        self._stopped.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def idle(self) -> bool:
        """Whether nothing runs; after `shut_down` that is final."""
        return all(job.done() for job in tuple(self._jobs))
