"""Starts our server in a process of its own, and sends requests to it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from yarn_edge.bench.evidence.smollm2 import package_gguf

MODEL, KEY = package_gguf(), "a-key"
CTX = 1024
QUESTION = [{"role": "user", "content": "Explain gravity to a child."}]


class Server:
    """A server in a process of its own."""

    def __init__(self, *words: str, model: Path = MODEL) -> None:
        command = [sys.executable, "-m", "yarn_edge", "serve", str(model), *f"--port 0 --ctx {CTX} --threads 1".split()]
        self.process = subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.notes = ""
        while not (found := re.search(r"http://\S+?:(\d+)/ is the page", self.notes)):
            line = self.process.stderr.readline()
            assert line, self.notes
            self.notes += line
        self.port = int(found[1])

    def request(
        self, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        with self.open(method, path, body, key, **headers) as reply:
            return reply.status, dict(reply.getheaders()), reply.read()

    @contextmanager
    def open(self, method: str, path: str, body: Any, key: str | None = KEY, **headers: str) -> Iterator[HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        sent = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, sent)
            yield connection.getresponse()
        finally:
            connection.close()

    def chat(self, **fields: Any) -> tuple[int, Any]:
        status, _headers, body = self.request("POST", "/v1/chat/completions", {"messages": QUESTION, **fields})
        return status, json.loads(body)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            self.notes += self.process.stderr.read()
            self.process.stderr.close()
