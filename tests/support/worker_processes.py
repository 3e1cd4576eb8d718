"""Workers on this machine, each a process with one thread, for tests with a llama-cpp-python that has RPC."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from yarn_edge.runtime.llama_api import llama


def needs_rpc() -> pytest.MarkDecorator:
    """Skips where the library was built without RPC."""
    built = llama().llama_supports_rpc()
    return pytest.mark.skipif(not built, reason="llama-cpp-python without RPC: make engine-test BACKENDS=rpc has it")


class WorkerProcess:
    """`yarn-edge worker` with one thread. words: more flags."""

    def __init__(self, *words: str, **environment: str) -> None:
        flags = ["--port", "0", "--threads", "1", "--backend", "cpu", *words]
        line = [sys.executable, "-m", "yarn_edge", "worker", *flags]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, env=os.environ | environment)
        said = b""
        while not (found := re.search(rb" at (\S+);", said)):  # Vulkan introduces itself first
            more = self.process.stderr.readline()
            assert more, said.decode()
            said += more
        self.address = found[1].decode()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


@contextmanager
def worker_processes(n: int, *words: str, **environment: str) -> Iterator[list[WorkerProcess]]:
    with ExitStack() as stack:
        started = []
        for _ in range(n):
            started.append(WorkerProcess(*words, **environment))
            stack.callback(started[-1].end)
        yield started
