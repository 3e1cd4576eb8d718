"""The door of a worker and the client's side of it, without a model: what each answers, and how a client ends that loses its worker."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime import workers
from yarn_edge.runtime.worker_link import Lines, versions
from yarn_edge.runtime.workers import Watched, worker_info
from yarn_edge.worker.door import Door


def echo(server: socket.socket) -> None:
    """The library's server: sends back what it gets."""
    while True:
        try:
            connection, _address = server.accept()
        except OSError:
            return
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.close()


class DoorHere:
    def __init__(self, told: dict) -> None:
        self.listener, self.inside = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
        door = Door(self.listener, self.inside.getsockname()[:2], lambda: told)
        for work, argument in ((door.serve, ()), (echo, (self.inside,))):
            threading.Thread(target=work, args=argument, daemon=True).start()
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def close(self) -> None:
        self.listener.close()
        self.inside.close()

    def connected(self) -> socket.socket:
        host, port = self.address.split(":")
        return socket.create_connection((host, int(port)), 5)


@pytest.fixture
def door() -> Iterator[DoorHere]:
    made = DoorHere({"versions": versions(), "devices": []})
    yield made
    made.close()


def test_rpc_is_passed_on(door: DoorHere) -> None:
    with door.connected() as client:
        sent = b"\x0e" + bytes(range(256)) * 8192
        threading.Thread(target=client.sendall, args=(sent,), daemon=True).start()
        got = b""
        while len(got) < len(sent):
            got += client.recv(65536)
    assert got == sent


def test_one_client_at_a_time(door: DoorHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BUSY_S", 0.2)
    first, _lines, told = worker_info(door.address, "claim")
    assert told["busy"] is None
    with pytest.raises(YarnEdgeError, match=r"^worker 127.0.0.1:\d+ is used by another client, 127.0.0.1:\d+"):
        Watched(door.address)
    asking, _lines, told = worker_info(door.address)
    assert told["busy"] is not None
    asking.close()
    first.close()
    monkeypatch.setattr(workers, "BUSY_S", 5.0)
    monkeypatch.setattr(Watched, "_watch", lambda _self: None)
    Watched(door.address).close()


def test_a_silent_client_makes_way(door: DoorHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "_watch", lambda _self: None)
    monkeypatch.setattr("yarn_edge.worker.door.SILENT_S", 0.3)
    silent, _lines, _told = worker_info(door.address, "claim")
    with silent, door.connected() as rpc:
        rpc.sendall(b"\x0e")
        assert rpc.recv(1) == b"\x0e"
        time.sleep(0.4)
        Watched(door.address).close()
        assert silent.recv(1) == rpc.recv(1) == b""


def test_a_client_that_claims_nothing_is_one(door: DoorHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BUSY_S", 0.2)
    monkeypatch.setattr("yarn_edge.worker.door.SILENT_S", 0.1)
    monkeypatch.setattr(Watched, "_watch", lambda _self: None)
    with door.connected() as rpc:
        rpc.sendall(b"\x0e")
        assert rpc.recv(1) == b"\x0e"
        with pytest.raises(YarnEdgeError, match=r"is used by another client, 127.0.0.1:\d+, which is not yarn-edge"):
            Watched(door.address)
        rpc.sendall(b"\x0e")  # it need not say that it is alive
        assert rpc.recv(1) == b"\x0e"
    monkeypatch.setattr(workers, "BUSY_S", 5.0)
    Watched(door.address).close()


def test_other_versions_are_refused() -> None:
    made = DoorHere({"versions": versions() | {"llama-cpp-python": "0.0.1"}, "devices": []})
    with pytest.raises(
        YarnEdgeError, match=r"has llama-cpp-python 0.0.1 \(here 0\.\d+\.\d+\): install the same versions"
    ):
        Watched(made.address)
    made.close()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(YarnEdgeError, match=rf"^no worker at 127.0.0.1:{port}: Connection refused: start one"):
        worker_info(f"127.0.0.1:{port}")


def test_something_else_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(YarnEdgeError, match=r"does not answer like a yarn-edge worker within 0\.2 s"):
            worker_info(address)


@pytest.mark.parametrize(
    "say",
    [(b"x",) * 20, (b'{"versions": []}\n',), (b'{"versions": 1, "busy": null}\n',)],
    ids=["drips", "list", "number"],
)
def test_something_that_talks_there(say: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CONNECT_S", 0.3)

    def talk(server: socket.socket) -> None:
        with server.accept()[0] as connection, suppress(OSError):
            for part in say:
                connection.sendall(part)
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=talk, args=(server,), daemon=True).start()
        start = time.monotonic()
        with pytest.raises(YarnEdgeError, match=r"does not answer like a yarn-edge worker"):
            worker_info(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - start < 1


DOOR = """
import signal, socket, threading, time
from yarn_edge.errors import Terminated, raise_terminated
from yarn_edge.worker.door import Door
signal.signal(signal.SIGTERM, raise_terminated)
other = threading.Thread(target=time.sleep, args=(20,), daemon=True)
other.start()
threading.Timer(0.2, lambda: signal.pthread_kill(other.ident, signal.SIGTERM)).start()
try:
    Door(socket.create_server(("127.0.0.1", 0)), ("127.0.0.1", 1), dict).serve()
except Terminated:
    print("stopped", flush=True)
"""


def test_a_signal_that_another_thread_gets_ends_the_worker() -> None:
    told = subprocess.run([sys.executable, "-c", DOOR], stdout=subprocess.PIPE, timeout=5, check=True)
    assert told.stdout == b"stopped\n"


def test_a_slow_link_is_told(
    door: DoorHere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Watched, "_watch", lambda _self: None)
    monkeypatch.setattr(workers, "SLOW_BYTES_PER_S", 1e15)
    Watched(door.address).close()
    assert f"slow link to worker {door.address}: " in capsys.readouterr().err


CLIENT = """
import sys, time
from yarn_edge.runtime import workers
workers.PING_S, workers.SILENT_S = 0.1, float(sys.argv[2])
workers.Watched(sys.argv[1])
print("connected", flush=True)
time.sleep(20)
"""


@pytest.mark.parametrize("end", ["closed", "silent"])
def test_a_lost_worker_ends_the_client(end: str) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, f"127.0.0.1:{port}", "60" if end == "closed" else "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    connection, _address = server.accept()
    lines = Lines(connection)
    lines.receive()
    lines.send(versions=versions(), devices=[], busy=None)
    for _ in range(3):
        lines.receive()
        lines.send(alive=True)
    lines.skip(lines.receive()["bytes"])
    lines.send(alive=True)
    assert client.stdout.readline() == b"connected\n"
    if end == "closed":
        connection.close()
    _out, told = client.communicate(timeout=10)
    assert client.returncode == workers.LOST
    why = "(the connection was closed|Connection reset by peer)" if end == "closed" else "it has not answered for 1 s"
    line = rf"yarn-edge: error: worker 127\.0\.0\.1:{port} is lost: {why}; what was finished before is kept\n"
    assert re.fullmatch(line, told.decode()), told.decode()
    connection.close()
    server.close()
