"""A server of a race: ready, asked and ended; its last words if it does not start."""

from __future__ import annotations

import sys

import pytest

from yarn_edge.bench.peers.server_process import ask, free_port, running_server
from yarn_edge.errors import YarnEdgeError

ECHO = """
import http.server, sys
class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.do_GET()
        self.wfile.write(self.rfile.read(int(self.headers["Content-Length"])))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
"""


def echo(port: int) -> list[str]:
    return [sys.executable, "-S", "-c", ECHO, str(port)]


def test_a_server_is_asked_and_ended() -> None:
    port = free_port()
    with running_server(echo(port), port) as ready:
        assert ready == port
        assert ask(port, "/any", {"a": [1]}, 20) == {"a": [1]}
    with pytest.raises(OSError, match="refused"):
        ask(port, "/any", {}, 20)


def test_an_error_of_its_client_is_raised_and_ends_it() -> None:
    port = free_port()
    with pytest.raises(ConnectionResetError, match="mine"), running_server(echo(port), port):
        raise ConnectionResetError("mine")
    with pytest.raises(OSError, match="refused"):
        ask(port, "/any", {}, 20)


def test_a_server_that_does_not_start() -> None:
    command = [sys.executable, "-S", "-c", "raise SystemExit('no such model')"]
    with pytest.raises(YarnEdgeError, match=r"did not start with -S -c .*: no such model$"), running_server(command, 1):
        pass
