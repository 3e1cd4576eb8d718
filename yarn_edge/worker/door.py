"""The door of a worker: one port for llama.cpp's RPC, which is passed on to the library's server, and for what clients ask beside it."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from yarn_edge.progress import note
from yarn_edge.runtime.worker_link import MAX_ECHO, RPC_HELLO, Lines
from yarn_edge.runtime.workers import SILENT_S

_BLOCK, _STACK = 1 << 20, 1 << 18
FIRST_BYTE_S = 10.0
_SIGNALS_S = 1.0


class Door:
    """Accepts connections at `listener`. inside: (host, port) of the library's server. describe: what `info` answers.

    One client at a time: the one whose claim is open. The library's server, too, serves one connection after another.
    A client that has been silent for SILENT_S, because its machine or the network is gone, makes way for the next.
    """

    def __init__(
        self, listener: socket.socket, inside: tuple[str, int], describe: Callable[[], dict[str, Any]]
    ) -> None:
        self._listener, self._inside, self._describe = listener, inside, describe
        self._lock = threading.Lock()
        self._client: str | None = None
        self._heard = 0.0  # when the client last asked something
        self._connections: set[socket.socket] = set()  # of the client

    def serve(self) -> None:
        """Accept until the listener is closed. Each connection has threads, whose stacks count as memory: small ones do."""
        threading.stack_size(_STACK)
        # The system may give a signal to another thread, which does not wake this one.
        self._listener.settimeout(_SIGNALS_S)
        while True:
            try:
                connection, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            name = f"{address[0]}:{address[1]}"
            threading.Thread(target=self._receive, args=(connection, name), daemon=True).start()

    def _receive(self, connection: socket.socket, name: str) -> None:
        with connection, suppress(OSError, ValueError):
            connection.settimeout(FIRST_BYTE_S)
            first = connection.recv(1, socket.MSG_PEEK)
            connection.settimeout(None)
            if first[:1] == bytes([RPC_HELLO]):
                with self._counted(connection, name):
                    self._pass_on(connection)
            elif first:
                self._answer(Lines(connection), name)

    @contextmanager
    def _counted(self, connection: socket.socket, name: str) -> Iterator[None]:
        """A connection to the library's server is among the client's. A client of llama.cpp's own claims nothing: it is the client
        while it is connected, if there is none, and is never asked to say that it is alive.
        """
        with self._lock:
            mine = self._client is None
            if mine:
                self._client, self._heard = f"{name}, which is not yarn-edge", math.inf
        self._connections.add(connection)
        try:
            yield
        finally:
            self._connections.discard(connection)
            if mine:
                with self._lock:
                    self._client = None

    def _pass_on(self, outside: socket.socket) -> None:
        """Copy both directions until one side ends; then both are closed."""
        with socket.create_connection(self._inside) as inside:
            inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_copy, args=(inside, outside), daemon=True)
            back.start()
            _copy(outside, inside)
            back.join()

    def _answer(self, lines: Lines, name: str) -> None:
        mine = False
        try:
            while (message := lines.receive()) is not None:
                asked = message.get("ask")
                self._heard = time.monotonic() if mine else self._heard
                if asked == "ping":
                    lines.send(alive=True)
                elif asked == "echo":
                    lines.skip(min(int(message["bytes"]), MAX_ECHO))
                    lines.send(alive=True)
                elif asked in ("info", "claim"):
                    with self._lock:
                        if asked == "claim" and self._client is None:
                            mine, self._client, self._heard = True, name, time.monotonic()
                            self._connections.add(lines.connection)
                        busy = None if mine else self._client
                    if asked == "claim" and busy and time.monotonic() - self._heard > SILENT_S:
                        note(f"client {busy} has been silent for {SILENT_S:g} s")
                        for connection in tuple(self._connections):
                            _shut(connection)
                    lines.send(**self._describe(), busy=busy)
                    if mine:
                        note(f"client {name}")
                else:
                    return
        finally:
            self._connections.discard(lines.connection)
            if mine:
                with self._lock:
                    self._client = None
                note(f"client {name} has left")


def _copy(source: socket.socket, target: socket.socket) -> None:
    block = memoryview(bytearray(_BLOCK))
    with suppress(OSError):
        while n := source.recv_into(block):
            target.sendall(block[:n])
    _shut(source)
    _shut(target)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
