"""Run a function in a fresh process, so that only its own memory is measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from yarn_edge.errors import YarnEdgeError

# (path, n_ctx, kv_type, threads, backend) -> numbers by name
Job = Callable[[Path, int, str, "int | None", str], dict[str, int]]


def in_a_process(
    job: Job, path: Path, n_ctx: int, kv_type: str, threads: int | None = None, backend: str = "cpu"
) -> dict[str, int]:
    """The job's result from a fresh process. Raises its YarnEdgeError, or one if the process ended without a result."""
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_child, args=(job, path, n_ctx, kv_type, threads, backend, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise YarnEdgeError(f"{path}: the process with {n_ctx} tokens ended with {process.exitcode}") from None
    process.join()
    if isinstance(result, str):
        raise YarnEdgeError(result)
    return dict(result)


def _child(
    job: Job, path: Path, n_ctx: int, kv_type: str, threads: int | None, backend: str, answer: Connection
) -> None:
    try:
        answer.send(job(path, n_ctx, kv_type, threads, backend))
    except YarnEdgeError as error:
        answer.send(str(error))
