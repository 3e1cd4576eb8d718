"""How a worker and its client talk beside llama.cpp's RPC, on the same port: lines of JSON.

A connection whose first byte is that of an RPC command goes to the library's server. On any other the client asks: `info` and `claim`
for what the worker is (claim also makes it this client's, as long as the connection is open), `ping` to hear that it is alive,
`echo` to measure the link.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from yarn_edge import __version__
from yarn_edge.runtime.llama_api import llama

RPC_HELLO = 14  # ggml-rpc.cpp: RPC_CMD_HELLO, with which every client of the library begins
MAX_LINE = 1 << 16
MAX_ECHO = 1 << 24


def versions() -> dict[str, str]:
    """What must be the same on both sides: the library that defines the protocol, the operations and the kernels."""
    from yarn_edge.runtime.ggml import function

    ggml = " ".join(function(f"ggml_{name}")().decode() for name in ("version", "commit"))
    return {"llama-cpp-python": str(llama().__version__), "ggml": ggml, "yarn-edge": __version__}


class Lines:
    """A connection as lines of JSON. Raises OSError where the connection does, ValueError for anything but JSON objects."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send one message."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, within_s: float | None = None) -> dict[str, Any] | None:
        """The next message, None after the last one. A timeout leaves what has come for the next call. within_s: for all of it."""
        deadline = None if within_s is None else time.monotonic() + within_s
        while b"\n" not in self._rest:
            if deadline is not None:
                self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            if len(self._rest) > MAX_LINE:
                raise ValueError("a line without an end")
            part = self.connection.recv(65536)
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    def skip(self, n_bytes: int) -> None:
        """Read and drop this many bytes."""
        while n_bytes > 0:
            if not self._rest:
                self._rest = self.connection.recv(65536)
                if not self._rest:
                    return
            used = min(n_bytes, len(self._rest))
            n_bytes, self._rest = n_bytes - used, self._rest[used:]
