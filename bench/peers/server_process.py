"""A server in a process of its own: a free port, its start and its end, and questions in JSON."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.request import Request, urlopen

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.child import last_words

START_S, END_S = 300.0, 10.0


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


@contextmanager
def running_server(command: Sequence[str], port: int, env: Mapping[str, str] | None = None) -> Iterator[int]:
    """The port of a server that answers /health. command: names that port. Raises YarnEdgeError if it does not start."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=env)
        try:
            deadline = time.monotonic() + START_S
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    errors.seek(0)
                    words = f"did not start with {shlex.join(command[1:])}: {last_words(errors.read())}"
                    raise YarnEdgeError(f"{command[0]}: {words}")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            process.kill()
            process.wait()


def _is_ready(port: int) -> bool:
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
        return True
    return False


def ask(port: int, path: str, body: Mapping[str, Any], timeout: float) -> Any:
    """What the server answers to a POST, both in JSON."""
    headers = {"Content-Type": "application/json"}
    request = Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=timeout) as answer:
        return json.load(answer)
