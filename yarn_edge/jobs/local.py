"""Workers on this machine: processes of our own behind the interface of an executor.

Unlike in ProcessPoolExecutor, a worker that is killed takes only its own unit with it, and is replaced. A worker ends when its
stdin does, so that none is left behind however this process ends. It is in a session of its own: Ctrl-C reaches us alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import IO, Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.child import last_words, start_child

_LENGTH = struct.Struct("<Q")
_Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def write_message(pipe: IO[bytes], message: object) -> None:
    """One pickled message, with its length before it."""
    data = pickle.dumps(message)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def read_message(pipe: IO[bytes]) -> bytes:
    """The next message, pickled. Raises EOFError at the end. Only our own processes write there."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (n_bytes,) = _LENGTH.unpack(head)
    data = pipe.read(n_bytes)
    if len(data) < n_bytes:
        raise EOFError
    return data


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        try:
            self.process = start_child("yarn_edge.jobs.local_worker", stderr=self._errors)
        except OSError as error:
            raise YarnEdgeError(f"--on local: a worker cannot be started: {error.strerror}") from error

    def ask(self, message: object) -> tuple[bool, Any]:
        """(whether the call returned, its value or its exception). Raises BrokenExecutor if the worker ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            write_message(self.process.stdin, message)
            answer: tuple[bool, Any] = pickle.loads(read_message(self.process.stdout))
        except (OSError, EOFError, ValueError):
            raise BrokenExecutor(self._end_of_it()) from None
        return answer

    def _end_of_it(self) -> str:
        self.process.kill()
        code = self.process.wait()
        self._errors.seek(0)
        words = last_words(self._errors.read())
        return f"worker {self.process.pid} ended with {code}" + (f": {words}" if words else "")

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()


class LocalExecutor(Executor):
    """`n_workers` processes, started when there is work for them.

    A future whose worker was killed has BrokenExecutor as its exception. shutdown(cancel_futures=True) also ends the units
    that are running.
    """

    def __init__(self, n_workers: int) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(n_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See Executor.submit."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._tasks.put((future, fn, args, kwargs))
        return future

    def _serve(self) -> None:
        """In a thread for each worker."""
        worker: _Worker | None = None
        while (task := self._tasks.get()) is not None:
            future, fn, args, kwargs = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or self._started()
                returned, value = worker.ask((fn, args, kwargs))
            except BaseException as error:
                if worker is not None:
                    self._ended(worker)
                worker = None
                future.set_exception(error)
                continue
            if returned:
                future.set_result(value)
            else:
                future.set_exception(value)
        if worker is not None:
            self._ended(worker)

    def _started(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise BrokenExecutor("the executor was shut down")
            worker = _Worker()
            self._workers.add(worker)
            return worker

    def _ended(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.end()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See Executor.shutdown."""
        with self._lock:
            self._closed = True
            running = list(self._workers)
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while (task := self._tasks.get_nowait()) is not None:
                    task[0].cancel()
            for worker in running:
                worker.process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def serve_pipe() -> None:
    """In a worker: answer calls until stdin ends, also while one is running."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not get among the answers
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 - for the life of the process
    todo: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                todo.put(read_message(calls))
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        data = todo.get()
        try:
            fn, args, kwargs = pickle.loads(data)
            answer = (True, fn(*args, **kwargs))
        except BaseException as error:
            answer = (False, error)
        write_message(answers, answer)
