"""Workers of Dask: the executor of `distributed.Client`, with its exception for a lost worker translated."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import distributed

from yarn_edge.errors import YarnEdgeError
from yarn_edge.jobs.translated import translate
from yarn_edge.writer import partial_folder

_LOST = (distributed.KilledWorker, distributed.client.FutureCancelledError)


class DaskExecutor(Executor):
    """address: of a scheduler; "" starts one on this machine with `n_workers` processes, which ends with this executor."""

    def __init__(self, address: str, n_workers: int, threads: int) -> None:  # noqa: ARG002 - a worker computes one unit at a time
        self._stack = ExitStack()
        options: dict[str, Any] = {"address": address}
        if not address:
            mine = Path(tempfile.gettempdir()) / "yarn-edge-dask"
            folder = self._stack.enter_context(partial_folder(mine, mode=0o700))  # that of a killed run goes first
            options = {
                "n_workers": n_workers,
                "threads_per_worker": 1,
                "processes": True,
                "dashboard_address": None,
                "local_directory": str(folder),
                "silence_logs": logging.CRITICAL,
                "memory_limit": 0,
            }
        try:
            self._stack.enter_context(dask.config.set({"distributed.diagnostics.nvml": False}))
            self._client = self._stack.enter_context(distributed.Client(timeout=10, **options))
        except (OSError, ValueError, RuntimeError) as error:
            self._stack.close()
            raise YarnEdgeError(f"--on dask: cannot reach {address or 'workers on this machine'}: {error}") from error
        self._theirs = self._client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor.submit."""
        return translate(self._theirs.submit(fn, *args, **kwargs), _LOST)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See Executor.shutdown. A unit that is running on a cluster of others is computed to its end, and dropped."""
        self._theirs.shutdown(wait=wait and not cancel_futures)  # without waiting, it cancels
        self._stack.close()
