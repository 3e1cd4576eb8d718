"""The futures of other libraries as those of `concurrent.futures`, with one exception for a worker that is gone: BrokenExecutor."""

from __future__ import annotations

import re
from concurrent.futures import BrokenExecutor, CancelledError, Future
from typing import Any


def translate(theirs: Future[Any], lost: tuple[type[BaseException], ...]) -> Future[Any]:
    """A future that ends as `theirs` does. lost: exceptions that say that a worker is gone."""
    ours: Future[Any] = Future()
    ours.set_running_or_notify_cancel()

    def end(done: Future[Any]) -> None:
        try:
            error = done.exception()
        except CancelledError as cancelled:
            error = cancelled
        if error is None:
            ours.set_result(done.result())
        elif isinstance(error, lost):
            ours.set_exception(BrokenExecutor(re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__))
        else:
            ours.set_exception(error)

    theirs.add_done_callback(end)
    return ours
