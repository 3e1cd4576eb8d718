"""Jobs of Slurm, through submitit: each call is a job of its own, so that many units go into one call.

submitit's jobs are not futures of `concurrent.futures`: a thread for each waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import submitit

from yarn_edge.errors import YarnEdgeError
from yarn_edge.writer import scratch_folder

DEFAULT_MINUTES = 24 * 60


class SlurmExecutor(Executor):
    """options: KEY=VALUE,… for submitit: partition, time (minutes), mem_gb, account, …; cluster=local runs the jobs on this
    machine without Slurm. Jobs and results travel through a folder in the working folder, which all nodes must see.
    """

    def __init__(self, options: str, n_workers: int, threads: int) -> None:  # noqa: ARG002 - the caller submits that many
        given = _options(options)
        if not isinstance(given.get("time", 1), int):
            raise YarnEdgeError(f"--on slurm: time={given['time']} is not a number of minutes")
        cluster = given.pop("cluster", "slurm")
        if cluster not in ("slurm", "local"):
            raise YarnEdgeError(f"--on slurm: cluster={cluster} is unknown; known: slurm, local")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise YarnEdgeError("--on slurm: there is no sbatch here: run this on a machine that submits to Slurm")
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self._stack = ExitStack()
        folder = self._stack.enter_context(scratch_folder("yarn-edge-slurm-", Path.cwd()))
        self._jobs: set[Any] = set()
        self._threads: list[threading.Thread] = []
        self._theirs = submitit.AutoExecutor(folder=folder, cluster=cluster)
        minutes = given.pop("time", DEFAULT_MINUTES)
        own = {f"slurm_{name}" if name not in _GENERAL else name: value for name, value in given.items()}
        try:
            self._theirs.update_parameters(
                name="yarn-edge", timeout_min=minutes, cpus_per_task=threads, **(own if cluster == "slurm" else {})
            )
        except (TypeError, NameError, ValueError) as error:
            self._stack.close()
            raise YarnEdgeError(f"--on slurm: {error}") from error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor.submit."""
        future: Future[Any] = Future()
        job = self._theirs.submit(fn, *args, **kwargs)
        self._jobs.add(job)
        future.set_running_or_notify_cancel()
        thread = threading.Thread(target=self._wait, args=(job, future), daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def _wait(self, job: Any, future: Future[Any]) -> None:
        try:
            future.set_result(job.result())
        except submitit.core.utils.UncompletedJobError as error:
            future.set_exception(BrokenExecutor(str(error).strip().partition("\n")[0]))
        except BaseException as error:
            future.set_exception(error)
        self._jobs.discard(job)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See Executor.shutdown. cancel_futures also cancels the jobs that are running."""
        if cancel_futures:
            for job in list(self._jobs):
                with contextlib.suppress(Exception):
                    job.cancel(check=False)
        elif wait:
            for thread in self._threads:
                thread.join()
        self._stack.close()


_GENERAL = ("mem_gb",)  # names that submitit has for every kind of cluster


def _options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise YarnEdgeError(f"--on slurm:{text}: {item!r} is not KEY=VALUE, such as partition=cpu or time=60")
        options[key] = int(value) if value.isdigit() else value
    return options
