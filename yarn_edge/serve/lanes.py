"""Work for requests, off the event loop and away from the model's thread.

There are two lanes for texts (JSON, chat template, tokens), each with one thread and one process for the chat template. Long requests
are worked on one after another in the second lane, so that they delay neither short ones nor each other's memory.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from yarn_edge.chat.template import Renderer
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.refusals import BusyError, StoppingError

SHORT_BYTES = 64 << 10
MAX_WAITING = 64  # requests in a lane
_STOP_S = 0.1
T = TypeVar("T")


class Lane:
    """A thread for the work of one request at a time, first come, first served. name: of the thread."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._jobs: set[Future[Any]] = set()  # that have not ended
        self._stopped = False

    @property
    def waiting(self) -> int:
        """The number of requests whose work has not begun."""
        return sum(not job.running() for job in tuple(self._jobs))

    def _begin(self, work: Callable[[], T]) -> Future[T]:
        """Raises BusyError if too many are waiting, StoppingError after `shut_down`."""
        if self._stopped:
            raise StoppingError
        if len(self._jobs) > MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} requests are already waiting: try again later")
        job = self._thread.submit(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    def shut_down(self) -> None:
        """Begin nothing more, and end what runs."""
        self._stopped = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def idle(self) -> bool:
        """Whether no work runs; after `shut_down` that is final."""
        return all(job.done() for job in tuple(self._jobs))


class TextLane(Lane):
    """A thread with a renderer of its own; None for a model without a chat template."""

    def __init__(self, renderer: Renderer | None) -> None:
        super().__init__("text")
        self.renderer = renderer
        self._current: object = None  # the work that runs
        self._changing = threading.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, work: Callable[[Renderer | None], T]) -> T:
        """What `work` returns when its turn has come. Being cancelled ends it, at the latest after the text that is tokenized.

        Raises BusyError if too many are waiting, StoppingError after `shut_down`.
        """
        job = self._begin(partial(self._do, work))
        try:
            return await asyncio.wrap_future(job)
        finally:
            if not job.done():
                ending = asyncio.ensure_future(self._end(job, work))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    def _do(self, work: Callable[[Renderer | None], T]) -> T:
        with self._changing:
            self._current = work
        try:
            return work(self.renderer)
        except YarnEdgeError as error:
            # Its traceback would hold all that was read of the request until the client has the answer.
            error.__context__ = None
            raise error.with_traceback(None) from None
        finally:
            with self._changing:
                self._current = None

    async def _end(self, job: Future[T], work: object) -> None:
        """End a rendering, also one that begins after the first try."""
        while not job.done():
            self._interrupt(work)
            await asyncio.sleep(_STOP_S)

    def _interrupt(self, work: object) -> None:
        with self._changing:
            if self._current is work and self.renderer is not None:
                self.renderer.interrupt()

    def shut_down(self) -> None:
        super().shut_down()
        self._interrupt(self._current)
