"""Workers of Ray: each call is a task, and Ray's own future is translated. Ray has no executor of this kind of its own.

Tasks of one kind run in the same few processes, so that what a worker keeps is found again by the next unit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from yarn_edge.addresses import host_and_port
from yarn_edge.errors import YarnEdgeError
from yarn_edge.jobs.translated import translate
from yarn_edge.signals import DEFERRED
from yarn_edge.writer import partial_folder

_REACH_S = 5.0
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
        _check_there(address)
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
        folder = None
        if not address:
            mine = Path(tempfile.gettempdir()) / "yarn-edge-ray"
            folder = self._stack.enter_context(partial_folder(mine, mode=0o700))  # that of a killed run goes first
            options |= {
                "address": "local",
                "num_cpus": n_cpus,
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_system_config": {"worker_niceness": 0},  # else any other process of the machine comes first
                "_temp_dir": str(folder),
            }
        else:
            options["address"] = address
        ray.init(**options)
        if folder is not None:
            folder.chmod(0o700)  # Ray opens it to everybody

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


def _check_there(address: str) -> None:
    """Raises YarnEdgeError if nothing listens at HOST:PORT, where Ray itself would try for minutes."""
    if address in ("", "auto") or address.startswith("ray://"):
        return
    try:
        socket.create_connection(host_and_port(address), _REACH_S).close()
    except OSError as error:
        raise YarnEdgeError(f"--on ray: cannot reach {address}: {error.strerror or error}") from error
