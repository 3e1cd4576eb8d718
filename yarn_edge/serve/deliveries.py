"""Items that one thread makes and an event loop uses."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any


class Deliveries:
    """The way from another thread into queues of a loop, which is woken once for all that was put since it last ran.

    Waking it for each item would cost a system call each, and the loop would compete with the model's threads for the processors.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def put(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Called in the other thread."""
        self._items.append((queue, item))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is over
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first: what is put from now on wakes the loop again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
