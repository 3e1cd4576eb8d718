"""Workers of Ray: each call is a task, and Ray's own future is translated. Ray has no executor of this kind of its own.

Tasks of one kind run in the same few processes, so that what a worker keeps is found again by the next unit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from typing import Any

import ray

from yarn_edge.errors import YarnEdgeError
from yarn_edge.jobs.translated import translate
from yarn_edge.signals import DEFERRED
from yarn_edge.writer import scratch_folder

_STORE_BYTES = 128 << 20  # results are small; Ray would take a third of the memory
_LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.OwnerDiedError,
)


class RayExecutor(Executor):
    """Tasks of `threads` CPUs each. address: of a cluster, HOST:PORT or ray://HOST:PORT; "" starts one on this machine for
    `n_workers` tasks, which ends with this executor.
    """

    def __init__(self, address: str, n_workers: int, threads: int) -> None:
        self._stack = ExitStack()
        null = self._stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123, SIM115
        self._stack.enter_context(contextlib.redirect_stdout(null))  # where Ray prints what happened to a worker
        self._running: dict[int, Any] = {}
        self._remote: dict[Callable[..., Any], Any] = {}
        self._threads = threads
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handlers = {number: signal.getsignal(number) for number in DEFERRED}
        try:
            self._connect(address, n_workers * threads)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            self._stack.close()
            where = address or "a cluster on this machine"
            raise YarnEdgeError(f"--on ray: cannot reach {where}: {error}") from error
        finally:
            for number, handler in handlers.items():  # Ray sets its own
                with contextlib.suppress(ValueError):  # outside of the main thread
                    signal.signal(number, handler)
        self._stack.callback(ray.shutdown)

    def _connect(self, address: str, n_cpus: int) -> None:
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if not address:
            options |= {
                "address": "local",
                "num_cpus": n_cpus,
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_system_config": {"worker_niceness": 0},  # else any other process of the machine comes first
                "_temp_dir": str(self._stack.enter_context(scratch_folder("yarn-edge-ray-"))),
            }
        else:
            options["address"] = address
        ray.init(**options)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor.submit."""
        if fn not in self._remote:
            self._remote[fn] = ray.remote(num_cpus=self._threads, max_retries=0)(fn)
        task = self._remote[fn].remote(*args, **kwargs)
        future = translate(task.future(), _LOST)
        self._running[id(future)] = task
        future.add_done_callback(lambda done: self._running.pop(id(done), None))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - Ray does not wait
        """See Executor.shutdown. cancel_futures also ends the tasks that are running."""
        if cancel_futures:
            for task in list(self._running.values()):
                with contextlib.suppress(Exception):
                    ray.cancel(task, force=True)
        self._stack.close()
