"""Workers of other machines as devices of this process, each watched as long as it is in use.

llama.cpp's RPC client waits without end for an answer, and ends the process with an assertion when a connection breaks. So every
worker is asked before the library connects, and then every few seconds: one that is gone or silent ends this process with one line.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from yarn_edge.addresses import check_network, host_and_port
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.ggml import Device, function
from yarn_edge.runtime.rpc import rpc_function
from yarn_edge.runtime.worker_link import Lines, versions
from yarn_edge.signals import deferred_ctrl_c

LOST = 2  # the exit code when a worker is lost
CONNECT_S, SILENT_S, PING_S = 5.0, 8.0, 2.0
BUSY_S = 5.0  # how long a claim waits for the client before to be gone
WATCHER_S = 1.0  # the assertion of the library leaves this time to the watcher, which knows the worker's name
ECHO_BYTES = 1 << 20
SLOW_S, SLOW_BYTES_PER_S = 0.005, 50e6  # a slower link than these is reported
_ending = threading.Lock()
_connected: dict[str, Watched] = {}
_state: dict[str, Any] = {}


def connect(addresses: Sequence[str], insecure: bool = False) -> list[Device]:
    """The devices of these workers, in their order; workers that are connected already are not asked again.

    insecure: whether addresses beyond this machine are allowed. Raises YarnEdgeError if one cannot be used: not allowed, not there,
    another version, used by another client.
    """
    for address in addresses:
        check_network(host_and_port(address)[0], insecure, "--rpc")
    add_server = rpc_function("ggml_backend_rpc_add_server")
    _end_well()
    for address in addresses:
        if address in _connected:
            continue
        watched = Watched(address)
        with deferred_ctrl_c():
            registered = add_server(address.encode())
        if not registered:
            raise YarnEdgeError(f"worker {address} has no devices")
        function("ggml_backend_register")(registered)
        _connected[address] = watched
    known = ggml.devices()
    return [d for address in addresses for d in known if d.backend == "RPC" and d.description == address]


def disconnect() -> None:
    """Let all workers go. Nothing may use their devices any more."""
    while _connected:
        _connected.popitem()[1].close()


def worker_info(address: str, ask: str = "info") -> tuple[socket.socket, Lines, dict[str, Any]]:
    """(connection, its lines, what a worker says of itself). Raises YarnEdgeError if nothing or something else answers."""
    try:
        connection = socket.create_connection(host_and_port(address), CONNECT_S)
    except OSError as error:
        raise YarnEdgeError(
            f"no worker at {address}: {error.strerror or error}: start one with yarn-edge worker"
        ) from None
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = Lines(connection)
        lines.send(ask=ask)
        answer = lines.receive(CONNECT_S)
        if answer is None or not isinstance(answer.get("versions"), dict):
            raise ValueError
        connection.settimeout(CONNECT_S)
    except (OSError, ValueError):
        connection.close()
        raise YarnEdgeError(
            f"{address} does not answer like a yarn-edge worker within {CONNECT_S:g} s: start one there with yarn-edge worker"
        ) from None
    return connection, lines, answer


class Watched:
    """A worker that is this process's own, and a thread that ends the process when it is lost. Raises YarnEdgeError."""

    def __init__(self, address: str) -> None:
        self.address, self._closed = address, False
        deadline = time.monotonic() + BUSY_S
        while True:
            self._connection, self._lines, told = worker_info(address, "claim")
            if told.get("busy") is None:
                break
            self._connection.close()
            if time.monotonic() > deadline:
                raise YarnEdgeError(
                    f"worker {address} is used by another client, {told['busy']}: a worker serves one at a time"
                )
            time.sleep(0.1)
        mine, theirs = versions(), told["versions"]
        different = [
            f"{name} {theirs.get(name)} (here {have})" for name, have in mine.items() if theirs.get(name) != have
        ]
        if different:
            self._connection.close()
            raise YarnEdgeError(
                f"worker {address} has {', '.join(different)}: install the same versions on both machines"
            )
        self._measure()
        threading.Thread(target=self._watch, daemon=True).start()

    def _measure(self) -> None:
        """Say if the link is slow."""
        try:
            times = [self._asked(ask="ping") for _ in range(3)]
            start = time.perf_counter()
            self._lines.send(ask="echo", bytes=ECHO_BYTES)
            self._connection.sendall(bytes(ECHO_BYTES))
            self._lines.receive()
        except (OSError, ValueError):
            raise YarnEdgeError(f"worker {self.address} stopped answering: is it still running?") from None
        delay, speed = min(times), ECHO_BYTES / (time.perf_counter() - start)
        if delay > SLOW_S or speed < SLOW_BYTES_PER_S:
            note(
                f"slow link to worker {self.address}: {speed / 1e6:.1f} MB/s, {delay * 1e3:.1f} ms there and back: a GB of weights "
                f"takes {1e9 / speed:.0f} s to send, and each token waits for several such round trips"
            )

    def _asked(self, **message: Any) -> float:
        start = time.perf_counter()
        self._lines.send(**message)
        self._lines.receive()
        return time.perf_counter() - start

    def _watch(self) -> None:
        self._connection.settimeout(PING_S)
        heard = time.monotonic()
        why = "the connection was closed"
        while True:
            try:
                self._lines.send(ask="ping")
                if self._lines.receive() is None:
                    break
                heard = time.monotonic()
                time.sleep(PING_S / 2)
            except TimeoutError:
                if time.monotonic() - heard > SILENT_S - PING_S:
                    why = f"it has not answered for {SILENT_S:g} s"
                    break
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or str(error)
                break
        if not self._closed:
            end_without(f"worker {self.address} is lost: {why}; what was finished before is kept")

    def close(self) -> None:
        """Let the worker go: it may end now, or serve another client."""
        self._closed = True
        self._connection.close()


def end_without(message: str) -> NoReturn:
    """End this process with one line: the main thread may wait in the library for an answer that will not come."""
    with _ending:
        sys.stderr.write(f"{_cursor()}yarn-edge: error: {one_line(message)}\n")
        sys.stderr.flush()
        os._exit(LOST)


def _cursor() -> str:
    """What brings back the cursor that a progress bar hides, on a line of its own."""
    return "\n\x1b[?25h" if sys.stderr.isatty() else ""


def _end_well() -> None:
    """Let a broken connection end the process with one line; other assertions of the library end it as before."""
    if _state:
        return

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
    def aborted(message: bytes) -> None:
        text = message.decode(errors="replace")
        if "rpc" not in text.lower():
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
            return
        time.sleep(WATCHER_S)
        end_without(f"a worker is lost: {text.rpartition(': ')[2]}")

    _state["aborted"] = aborted  # must outlive every call into the library
    function("ggml_set_abort_callback")(aborted)
