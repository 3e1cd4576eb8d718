"""Requests whose client leaves, and a server that is told to stop: both end at once, whatever runs."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.serving import MODEL, QUESTION, Server
from support.tiny_chat import SLOW, TEMPLATE, tiny_chat_model

LONG_PROMPT = "Once upon a time there was a fox. " * 100  # over 800 tokens: seconds to evaluate on one core


def sent(server: Server, path: str, **body: Any) -> socket.socket:
    """A connection over which a request was sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(head.encode() + data)
    return client


def received(client: socket.socket, end: bytes = b"") -> bytes:
    """Everything until the connection ends, or up to `end`."""
    answer = b""
    while (not end or end not in answer) and (part := client.recv(1 << 16)):
        answer += part
    return answer


def waiting(server: Server) -> int:
    return int(json.loads(server.request("GET", "/health")[2])["waiting"])


def until_waiting(server: Server, number: int, within_s: float = 3.0) -> None:
    deadline = time.monotonic() + within_s
    while waiting(server) != number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    assert made.end() == 0
    assert "Traceback" not in made.notes


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "an answer": (CHAT, {"messages": QUESTION, "max_tokens": 900, "temperature": 0}),
    "a stream": (CHAT, {"messages": QUESTION, "max_tokens": 900, "temperature": 0, "stream": True}),
    "a prompt": (TEXT, {"prompt": LONG_PROMPT, "max_tokens": 1}),
    "a prompt of a stream": (TEXT, {"prompt": LONG_PROMPT + "a", "max_tokens": 1, "stream": True}),
}


@pytest.mark.parametrize("path, body", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("junk", [b"", b"GET /health HTTP/1.1\r\n"], ids=["", "with more behind it"])
def test_a_client_that_leaves_frees_the_model(path: str, body: dict[str, Any], junk: bytes, server: Server) -> None:
    with sent(server, path, **body) as client:
        client.sendall(junk)
        time.sleep(0.4)
    began = time.monotonic()
    assert server.request("POST", TEXT, {"prompt": "a", "max_tokens": 1})[0] == 200
    assert time.monotonic() - began < 2.5


def test_a_client_that_leaves_the_queue(server: Server) -> None:
    with sent(server, TEXT, prompt=LONG_PROMPT + "b", max_tokens=900, temperature=0) as running:
        time.sleep(0.2)
        for stream in (False, True):
            with sent(server, TEXT, prompt="b", max_tokens=900, stream=stream):
                until_waiting(server, 1)
            until_waiting(server, 0)
        with sent(server, TEXT, prompt="c", max_tokens=1) as next_one:
            until_waiting(server, 1)
            running.close()
            assert received(next_one, b"\r\n").startswith(b"HTTP/1.1 200")


def test_a_full_queue(server: Server) -> None:
    """Beyond 64 that wait, a request is refused before its text is looked at."""
    with sent(server, TEXT, prompt=LONG_PROMPT + "c", max_tokens=900, temperature=0):
        time.sleep(0.2)
        queue = [sent(server, TEXT, prompt="b", max_tokens=1, stream=number % 2 == 0) for number in range(64)]
        until_waiting(server, 64, within_s=20)
        while b"yarn_edge_texts_waiting 0\n" not in server.request("GET", "/metrics")[2]:
            time.sleep(0.02)  # those have not come to the model yet
        for body in ({"prompt": "c", "max_tokens": 1}, {"prompt": None}):
            status, _headers, answer = server.request("POST", TEXT, body)
            error = json.loads(answer)["error"]
            assert (status, error["code"], error["message"][:36]) == (
                503,
                "overloaded",
                "64 requests are already waiting: try",
            )
        for client in queue[1:]:
            client.close()
        until_waiting(server, 1)
    assert received(queue[0], b"[DONE]").startswith(b"HTTP/1.1 200")
    queue[0].close()


def template_processes(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model") / "slow.gguf", SLOW + TEMPLATE)


def test_a_client_that_leaves_a_rendering(slow_model: Path) -> None:
    made = Server(model=slow_model)
    try:
        with sent(made, CHAT, messages=[{"role": "user", "content": "slow"}]):
            time.sleep(0.5)
        began = time.monotonic()
        assert made.chat(max_tokens=1)[0] == 200
        assert time.monotonic() - began < 3
    finally:
        assert made.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_a_server_with_texts(number: int, slow_model: Path) -> None:
    """While both lanes render, others wait for them, a body is half there, a stream is not read, connections are idle."""
    made = Server(model=slow_model)
    slow, padding = [{"role": "user", "content": "slow"}], " " * 70_000
    clients = [
        sent(made, TEXT, prompt="a" * 10, max_tokens=900, stream=True),  # its answer is not read
        sent(made, CHAT, messages=slow),
        sent(made, CHAT, messages=slow, user=padding),
        sent(made, CHAT, messages=QUESTION, max_tokens=2),
        sent(made, CHAT, messages=QUESTION, max_tokens=2, stream=True, user=padding),
        socket.create_connection(("127.0.0.1", made.port)),
        socket.create_connection(("127.0.0.1", made.port)),
    ]
    clients[-1].sendall(
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    with socket.create_connection(("127.0.0.1", made.port), timeout=10) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received(idle, b'"ok"')
        time.sleep(0.5)
        helpers = template_processes(made)
        assert len(helpers) == 2
        began = time.monotonic()
        code = made.end(number)
        took = time.monotonic() - began
    assert (code, "Traceback" in made.notes) == (0, False), made.notes
    assert took < 5
    for client in clients[1:5]:
        answer = received(client)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"the server is shutting down" in answer
    for client in clients:
        client.close()
    assert not psutil.wait_procs(helpers, timeout=3)[1]
    assert "the server has stopped" in made.notes


BUSY: dict[str, dict[str, Any]] = {
    "a prompt": {"prompt": LONG_PROMPT, "max_tokens": 1},
    "a prompt of a stream": {"prompt": LONG_PROMPT, "max_tokens": 1, "stream": True},
    "an answer": {"prompt": "Once upon a time", "max_tokens": 900},
}


@pytest.mark.parametrize("body", BUSY.values(), ids=BUSY)
def test_the_end_of_a_server_that_runs_the_model(body: dict[str, Any]) -> None:
    """Whoever has no answer yet gets 503, a stream an event; those that are answered beside it, too."""
    made = Server(model=MODEL)
    clients = [sent(made, TEXT, **body)]
    time.sleep(0.3)
    clients += [sent(made, TEXT, prompt="b", max_tokens=900, stream=stream) for stream in (False, True)]
    time.sleep(0.3)
    began = time.monotonic()
    code = made.end()
    assert (code, "Traceback" in made.notes) == (0, False), made.notes
    assert time.monotonic() - began < 5
    for client, streams in zip(clients, ("stream" in body, False, True), strict=True):
        answer = received(client)
        client.close()
        assert answer.startswith(b"HTTP/1.1 200" if streams else b"HTTP/1.1 503")
        assert b'"message":' in answer
        assert b"the server is shutting down" in answer


def test_the_end_while_a_text_is_tokenized(slow_model: Path) -> None:
    """Texts that cannot be cut are tokenized in calls that cannot be stopped: whoever waits for one does so no longer."""
    made = Server("--ctx", "16384", model=slow_model)
    clients = [sent(made, TEXT, prompt="ab" * 131_000) for _ in range(30)]
    time.sleep(0.3)
    began = time.monotonic()
    assert made.end() == 0
    assert time.monotonic() - began < 5
    assert "Traceback" not in made.notes
    answers = [received(client) for client in clients]
    assert b"the server is shutting down" in answers[-1]
    for client in clients:
        client.close()


def test_cached_tokens_are_those_of_the_same_client(server: Server) -> None:
    """Who guesses another's question learns nothing from the numbers: not from an answer, nor by asking twice or leaving early."""

    def cached(prompt: str, key: str | None) -> Any:
        body = {"prompt": prompt, "max_tokens": 1, "stream": False} | (
            {"prompt_cache_key": key} if key is not None else {}
        )
        usage = json.loads(server.request("POST", TEXT, body)[2])["usage"]
        return usage.get("prompt_tokens_details", {}).get("cached_tokens")

    secret = "My secret is that I never liked the color of the sea. "
    assert cached(secret, "mine") == 0
    own = cached(secret + "And", "mine")
    assert own > 10
    assert cached(secret + "But", "other") == 0  # a guess
    assert cached(secret + "And", "mine") == 0  # the cache holds what the other one asked last
    assert cached(secret + "And", "mine") > 10
    assert cached(secret + "Or", None) is None
    assert cached(secret + "Or", "") is None
    assert cached(secret, "mine") == 0
    with sent(server, TEXT, prompt=LONG_PROMPT, max_tokens=1, prompt_cache_key="mine"):
        time.sleep(0.3)
    assert cached(secret, "mine") == 0  # nothing says what an interrupted evaluation left
