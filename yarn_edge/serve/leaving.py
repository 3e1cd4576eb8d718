"""Work for a client, which ends when the client leaves or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from yarn_edge.serve.guard import Receive
from yarn_edge.serve.refusals import ClientLeftError, StoppingError

T = TypeVar("T")


async def unless_left(receive: Receive, work: Awaitable[T], stopping: asyncio.Future[None] | None = None) -> T:
    """What `work` returns. It is cancelled, with ClientLeftError or StoppingError, when nobody waits for it any more.

    receive: of a request whose body was read. stopping: done when the server stops.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    ends: set[asyncio.Future[Any]] = {task, gone} if stopping is None else {task, gone, stopping}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            return task.result()
        raise ClientLeftError if gone.done() else StoppingError
    finally:
        await cancelled(task)
        await cancelled(gone)


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has ended, however it does."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
