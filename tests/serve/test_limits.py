"""Requests that are too much: texts, bodies, connections, waiting. They are refused quickly, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve import connections, lanes
from yarn_edge.serve.bodies import AT_ONCE, Bodies
from yarn_edge.serve.lanes import TextLane
from yarn_edge.serve.refusals import BusyError, ClientLeftError, StoppingError, TooLargeError
from yarn_edge.serve.requests import TokenizeRequest, parsed
from yarn_edge.serve.surfaces.chat import ChatRequest
from yarn_edge.serve.surfaces.completions import CompletionRequest
from yarn_edge.serve.worker import StopTexts

from support.fuzz import requests as fuzz_requests
from support.serving import CTX, Server
from support.tiny_chat import LONGEST, SLOW, TEMPLATE, tiny_chat_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(model=tiny_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf", SLOW + TEMPLATE))
    yield made
    assert made.end() == 0, made.notes
    assert "Traceback" not in made.notes


def said(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents], "max_tokens": 1}


LONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "letters": (
        "/v1/chat/completions",
        said("a" * (15 << 20)),
        "bytes of JSON, too many for 1024 tokens of context: shorten it",
    ),
    "spaces": ("/v1/completions", {"prompt": " " * (15 << 20)}, "bytes of JSON, too many for 1024 tokens"),
    "lists": ("/v1/completions", {"prompt": [[]] * 4_000_000}, "bytes of JSON, too many for 1024 tokens"),
    "fewer letters": (
        "/v1/chat/completions",
        said("a" * 1_000_000),
        "the prompt has 1000000 characters, too many for 1024 tokens",
    ),
    "markup": ("/v1/chat/completions", said("</s>" * 300_000), "the prompt has 1200000 characters, too many"),
    "markup in a prompt": (
        "/v1/completions",
        {"prompt": "<u>" * 400_000},
        "the prompt has 1200000 characters, too many",
    ),
    "messages": (
        "/v1/chat/completions",
        said(*["a"] * 20_000),
        "the prompt has 20000 messages, too many for 1024 tokens",
    ),
    "empty messages": ("/v1/chat/completions", said(*[""] * 20_000), "the prompt has 20000 messages, too many"),
    "parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 20_000}]},
        "the prompt has 20000 parts of messages, too many",
    ),
    "what the context could just hold": (
        "/v1/chat/completions",
        said("-" * (LONGEST * CTX - 1)),
        f"the context holds {CTX} with the answer: shorten it",
    ),
    "tokens": (
        "/v1/completions",
        {"prompt": [5] * 200_000},
        "the prompt has at least 200000 tokens, the context holds 1024",
    ),
    "a text to count": ("/tokenize", {"text": "ab " * 1_000_000}, f"the text has over {1 << 20} tokens"),
}


@pytest.mark.parametrize("path, body, message", LONG.values(), ids=LONG)
def test_what_no_context_holds(path: str, body: dict[str, Any], message: str, server: Server) -> None:
    data = json.dumps(body).encode()
    began = time.monotonic()
    status, _headers, answer = server.request("POST", path, data)
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert message in error["message"]
    assert time.monotonic() - began < 5


def test_long_requests_delay_no_short_ones(server: Server) -> None:
    """Six of much markup wait for one that renders for ever: ordinary questions are answered, and the six when its client leaves."""
    padding = b" " * lanes.SHORT_BYTES
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(
            server.request("POST", "/v1/chat/completions", json.dumps(said("</s>" * 16_000)).encode() + padding)[0]
        )

    threads = [threading.Thread(target=ask) for _ in range(6)]
    with connected(server) as slow:
        slow.sendall(posted(said("slow"), extra=len(padding)) + padding)
        time.sleep(0.2)
        for thread in threads:
            thread.start()
        began = time.monotonic()
        for _ in range(5):
            assert server.request("GET", "/health")[0] == 200
            assert server.chat(max_tokens=1)[0] == 200
        assert time.monotonic() - began < 4
        assert statuses == []
    for thread in threads:
        thread.join(20)
    assert statuses == [400] * 6
    assert time.monotonic() - began < 9  # the template may take 10 s


def test_a_count_beyond_the_context(server: Server) -> None:
    """What /tokenize counts may be longer than the context: the page says by how much."""
    answer = json.loads(server.request("POST", "/tokenize", {"text": "x" * 100_000})[2])
    assert answer == {"tokens": 100_000, "context": CTX}


REFUSED_JSON = {
    "deep": ('{"metadata":' + "[" * 300 + "]" * 300 + "}", "recursion limit exceeded"),
    "very deep": ("[" * 1_000_000, "recursion limit exceeded"),
    "NaN": ('{"messages":[],"temperature":NaN}', "expected value"),
    "minus infinity": ('{"messages":[],"min_p":-Infinity}', "the request is not valid JSON"),
    "half a character": (r'{"messages":[{"role":"user","content":"\ud83d"}]}', "lone leading surrogate|hex escape"),
    "the other half": (r'{"messages":[{"role":"user","content":"\ude00"}]}', "surrogate"),
    "no UTF-8": (b'{"messages":[{"role":"user","content":"\xff"}]}', "invalid unicode code point"),
    "UTF-16": ('{"messages":[]}'.encode("utf-16"), "the request is not valid JSON"),
    "a line break in a text": ('{"user":"a\nb"}', "control character"),
    "two values": ("{} {}", "trailing characters"),
    "a comma at the end": ('{"messages":[],}', "trailing comma"),
    "4,400 digits": ('{"seed":' + "9" * 4400 + "}", "number out of range"),
    "nothing": ("", "must be a JSON object"),
    "spaces": (" \n" * 1000, "must be a JSON object"),
    "null": ("null", "must be a JSON object"),
    "a list": ("[" + "[]," * 100_000 + "0]", "must be a JSON object"),
}


@pytest.mark.parametrize("body, reason", REFUSED_JSON.values(), ids=REFUSED_JSON)
def test_json_that_is_refused(body: str | bytes, reason: str) -> None:
    with pytest.raises(YarnEdgeError, match=reason):
        parsed(ChatRequest, body if isinstance(body, bytes) else body.encode())


REFUSED_VALUES: dict[str, tuple[type[CompletionRequest] | type[ChatRequest], str, str]] = {
    "a seed of 4,000 digits": (ChatRequest, f'"seed":{"9" * 4000}', "seed: Input should be less than"),
    "a negative one": (ChatRequest, f'"seed":-{"9" * 4000}', "seed: Input should be greater than"),
    "a seed without end": (ChatRequest, '"seed":1e999', "seed: Input should be a finite number"),
    "a seed in words": (ChatRequest, f'"seed":"{"1" * 5000}"', "seed: Unable to parse"),
    "top_k": (ChatRequest, f'"top_k":{"9" * 4000}', "top_k: Input should be less than"),
    "max_tokens": (ChatRequest, '"max_tokens":1e400', "max_tokens: Input should be a finite number"),
    "temperature without end": (ChatRequest, '"temperature":1e999', "temperature is inf, not a finite number"),
    "temperature of 4,000 digits": (
        ChatRequest,
        f'"temperature":{"9" * 4000}',
        "temperature: Input should be a valid number",
    ),
    "top_p without end": (ChatRequest, '"top_p":-1e999', "top_p is -inf"),
    "repeat_penalty in words": (ChatRequest, '"repeat_penalty":"nan"', "repeat_penalty is nan"),
    "1,000 stops": (ChatRequest, '"stop":[' + '"a",' * 999 + '"a"]', "stop: at most 16 texts"),
    "a million stops": (
        ChatRequest,
        '"stop":[' + "0," * 999_999 + "0]",
        r"stop is \[0, 0.*, but must be a text or a list of texts",
    ),
    "an empty stop": (ChatRequest, '"stop":""', "stop: at most 16 texts of 1 to 256"),
    "a list in stop": (ChatRequest, '"stop":["a",["b"]]', "stop is .* but must be"),
    "a table in stop": (ChatRequest, '"stop":{"a":1}', "stop is .* but must be"),
    "logit_bias": (ChatRequest, '"logit_bias":{"1":-101}', "logit_bias.1 is -101"),
    "a million fields": (ChatRequest, ",".join(f'"f{i}":0' for i in range(100_000)), "f0 is not supported"),
    "a prompt of words": (
        CompletionRequest,
        '"prompt":[' + "null," * 999_999 + "null]",
        "prompt is .None, None.* but must be a text or",
    ),
    "truth": (CompletionRequest, '"prompt":[true]', "prompt is .True., but must be"),
    "fractions": (CompletionRequest, '"prompt":[[1.5]]', "prompt is .1.5., but must be"),
    "a table": (CompletionRequest, '"prompt":{}', "prompt is {}, but must be"),
    "two prompts": (CompletionRequest, '"prompt":[[1],[2]]', "prompt: only one prompt"),
}


@pytest.mark.parametrize("kind, fields, reason", REFUSED_VALUES.values(), ids=REFUSED_VALUES)
def test_values_that_are_refused(kind: Any, fields: str, reason: str) -> None:
    """By the name of the field, in a message whose length the value does not set."""
    from yarn_edge.engine.sampling import Sampling

    start = (
        '"messages":[{"role":"user","content":"a"}],'
        if kind is ChatRequest
        else ('"prompt":"a",' if '"prompt"' not in fields else "")
    )

    def read() -> None:
        parsed(kind, ("{" + start + fields + "}").encode()).question(Sampling())

    with pytest.raises(YarnEdgeError, match=f"^{reason}") as caught:
        read()
    assert len(str(caught.value)) < 200


def test_json_that_is_read() -> None:
    """A byte order mark, pairs of surrogates, the last of two equal fields; garbage collection goes on afterwards."""
    import gc

    assert (
        parsed(TokenizeRequest, b'\xef\xbb\xbf{"text": "\\ud83d\\ude00\\u0000", "text": "\\ud83d\\ude00"}').text == "😀"
    )
    assert gc.isenabled()
    with pytest.raises(YarnEdgeError):
        parsed(TokenizeRequest, b"[")
    assert gc.isenabled()


class Body:
    """A request whose body comes in parts; "left" is the end of the connection."""

    def __init__(self, *parts: bytes | str, **headers: str) -> None:
        self.headers = {"content-type": "application/json", **{n.replace("_", "-"): v for n, v in headers.items()}}
        self.parts = list(parts)

    async def receive(self) -> dict[str, Any]:
        part = self.parts.pop(0)
        if isinstance(part, str):
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}


def test_bodies() -> None:
    """Too large by its header, or by what comes; too many at once; a client that leaves. Nothing of them stays."""
    bodies = Bodies(100)

    async def read(*parts: bytes | str, **headers: str) -> bytes:
        async with bodies.read(Body(*parts, **headers)) as body:  # type: ignore[arg-type]
            assert bodies.held_bytes == len(body)
            return body

    assert asyncio.run(read(b"a" * 60, b"b" * 40)) == b"a" * 60 + b"b" * 40
    for parts, headers, refusal in (
        ((b"a" * 60, b"b" * 41), {}, TooLargeError),
        ((b"",), {"content_length": "101"}, TooLargeError),
        ((b"a" * 60, "left"), {}, ClientLeftError),
    ):
        with pytest.raises(refusal):
            asyncio.run(read(*parts, **headers))
        assert bodies.held_bytes == 0
    bodies.held_bytes = AT_ONCE * 100 - 50
    with pytest.raises(BusyError, match="all the memory that is for requests"):
        asyncio.run(read(b"a" * 51))
    assert bodies.held_bytes == AT_ONCE * 100 - 50


class Rendering:
    """A renderer that works until it is interrupted."""

    def __init__(self) -> None:
        self.interrupted = threading.Event()

    def tokens(self, *_given: Any) -> list[int]:
        assert self.interrupted.wait(10)
        return []

    def interrupt(self) -> None:
        self.interrupted.set()

    def close(self) -> None:
        raise AssertionError


def test_a_lane() -> None:
    """Too many are refused, one that leaves while it waits never runs, one that leaves while it renders is interrupted."""
    renderer = Rendering()
    ran: list[int] = []

    async def use() -> None:
        lane = TextLane(renderer)
        first = asyncio.ensure_future(lane.run(lambda own: own.tokens(None, [])))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(lane.run(lambda _own, i=i: ran.append(i))) for i in range(lanes.MAX_WAITING)]
        await asyncio.sleep(0)
        assert lane.waiting == lanes.MAX_WAITING
        with pytest.raises(BusyError, match=f"{lanes.MAX_WAITING} requests are already waiting"):
            await lane.run(lambda _own: None)
        others[3].cancel()
        await asyncio.sleep(0.05)
        assert not renderer.interrupted.is_set()  # that one only waited
        first.cancel()
        await asyncio.wait(others)
        assert renderer.interrupted.is_set()
        assert ran == [i for i in range(lanes.MAX_WAITING) if i != 3]
        assert lane.idle
        lane.shut_down()
        with pytest.raises(StoppingError):
            await lane.run(lambda _own: None)

    asyncio.run(use())


def up_to_stop(pieces: Iterable[str], stops: list[str]) -> tuple[list[str], str | None]:
    """What is handed on of an answer, and the stop text that ended it."""
    texts, said = StopTexts(stops), []
    for piece in pieces:
        said.append(texts.feed(piece))
        if texts.found is not None:
            break
    return [text for text in [*said, texts.end()] if text], texts.found


def test_stop_texts_cost_little() -> None:
    """16 of 256 characters, none of which begins in the answer, over 50,000 pieces; and what is held back is no more than needed."""
    stops = ["Z" + chr(65 + i) * 255 for i in range(16)]
    began = time.process_time()
    assert "".join(up_to_stop(["word "] * 50_000, stops)[0]) == "word " * 50_000
    assert time.process_time() - began < 3
    assert up_to_stop(["ab", "a", "bac", "x"], ["abac", "bb"]) == (["ab"], "abac")
    assert up_to_stop(["ab", "a", "b"], ["abac"]) == (["ab", "ab"], None)


def posted(body: dict[str, Any], path: str = "/v1/chat/completions", extra: int = 0) -> bytes:
    """A whole request. extra: bytes that will still follow."""
    data = json.dumps(body).encode()
    length = len(data) + extra
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()
        + data
    )


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


RAW: dict[str, tuple[bytes, bytes]] = {
    "head": (b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HTTP/1.1 200"),
    "options": (b"OPTIONS /v1/models HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.com\r\n\r\n", b"HTTP/1.1 403"),
    "put": (b"PUT /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 405"),
    "dots": (b"GET /v1/models/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HTTP/1.1 404"),
    "two slashes": (b"GET //health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HTTP/1.1 404"),
    "both lengths": (
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 400",
    ),
    "two lengths": (
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 400",
    ),
    "two hosts": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.com\r\n\r\n", b"HTTP/1.1 400"),
    "two origins": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.com\r\norigin: http://localhost\r\n\r\n",
        b"HTTP/1.1 400",
    ),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", b"HTTP/1.1 403"),
    "a wrong chunk": (
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"HTTP/1.1 400",
    ),
    "junk after the head": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n\x00\x01\x02\r\n\r\n", b"HTTP/1.1 200"),
    "a flood of headers": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 20_000, b"HTTP/1.1 400"),
    "a header without end": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 200_000, b"HTTP/1.1 400"),
    "a web socket": (
        b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n",
        b"HTTP/1.1 200",
    ),
}


@pytest.mark.parametrize("data, answer", RAW.values(), ids=RAW)
def test_raw_http(data: bytes, answer: bytes, server: Server) -> None:
    with connected(server) as client:
        client.sendall(data)
        assert client.recv(1 << 16).startswith(answer)


def test_kept_connections_do_not_wait_for_the_network(server: Server) -> None:
    """Head and body of an answer are two packets; the second must not wait for the acknowledgement of the first, which takes 40 ms."""
    times = []
    with connected(server) as client:
        for _ in range(10):
            began = time.monotonic()
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while b'"ok"' not in answer:
                answer += client.recv(1 << 16)
            times.append(time.monotonic() - began)
    assert min(times[3:]) < 0.03


def resets(client: socket.socket) -> None:
    client.sendall(
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
    )
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def pipelines(client: socket.socket) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 35\r\n\r\n"
    client.sendall(head + b'{"prompt":"aaaa","max_tokens":1000}' + b"x" * 10_000_000)


@pytest.mark.parametrize("misbehave", [resets, pipelines])
def test_clients_without_manners(misbehave: Callable[[socket.socket], None], server: Server) -> None:
    with connected(server) as client:
        try:
            misbehave(client)
        except ConnectionError:
            assert misbehave is pipelines  # it was sent away
    assert server.request("GET", "/health")[0] == 200


def test_too_many_connections(server: Server) -> None:
    """Those beyond the limit get 503; others are served again when they are gone."""
    held = []
    try:
        for _ in range(connections.max_connections()):
            held.append(connected(server))
        time.sleep(0.3)
        with connected(server) as extra:
            assert extra.recv(1 << 16).startswith(b"HTTP/1.1 503")
    finally:
        for client in held:
            client.close()
    time.sleep(0.3)
    assert server.request("GET", "/health")[0] == 200


class Transport:
    """What a connection does to its socket."""

    def __init__(self) -> None:
        self.aborted, self.paused = False, False

    def get_extra_info(self, _name: str) -> Any:
        return self

    def setsockopt(self, *option: Any) -> None:
        assert option == (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getpeername = getsockname

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def write(self, _data: bytes) -> None:
        pass

    def close(self) -> None:
        self.aborted = True


SLOW_CLIENTS: dict[str, tuple[list[bytes], bool]] = {
    "nothing": ([], True),
    "half a head": ([b"GET / HTTP/1.1\r\n", b"host: "], True),
    "half a body": ([b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n", b"1", b"2"], True),
    "a body in bytes": (
        [b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", *[b"1\r\na\r\n"] * 50],
        True,
    ),
    "all of it": ([b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"], False),
    "a whole body": ([b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n", b"1", b"2"], False),
    "the next one at once": ([b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\n"], False),
    "a megabyte of the next ones": ([b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"x" * 1_000_000], True),
}


@pytest.mark.parametrize("parts, sent_away", SLOW_CLIENTS.values(), ids=SLOW_CLIENTS)
def test_slow_clients(parts: list[bytes], sent_away: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not send the head, or the body, in time."""
    import uvicorn
    from uvicorn.server import ServerState

    monkeypatch.setattr(connections, "HEADER_S", 0.1)
    monkeypatch.setattr(connections, "BODY_S", 0.1)

    async def answer(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def serve() -> None:
        transport = Transport()
        config = uvicorn.Config(answer, ws="none", log_level="critical")
        client = connections.Connection(config, ServerState(), {}, asyncio.get_running_loop())
        client.connection_made(transport)  # type: ignore[arg-type]
        for part in parts:
            client.data_received(part)
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.25)
        assert transport.aborted == sent_away
        client.connection_lost(None)
        await asyncio.sleep(0.01)

    asyncio.run(serve())


def test_who_does_not_read_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn
    from uvicorn.server import ServerState

    monkeypatch.setattr(connections, "READ_S", 0.05)

    async def serve(reads_again: bool) -> bool:
        transport = Transport()
        config = uvicorn.Config(lambda: None, ws="none", log_level="critical")
        client = connections.Connection(config, ServerState(), {}, asyncio.get_running_loop())
        client.connection_made(transport)  # type: ignore[arg-type]
        client.pause_writing()
        if reads_again:
            client.resume_writing()
        await asyncio.sleep(0.1)
        sent_away = transport.aborted
        client.connection_lost(None)
        return sent_away

    assert asyncio.run(serve(False))
    assert not asyncio.run(serve(True))


def test_fuzzed_requests() -> None:
    """The first thousand of `python -m support.fuzz.requests`, the same ones each time."""
    with fuzz_requests.fuzzed_server() as server:
        outcome = asyncio.run(fuzz_requests.fuzz(server.port, 0, range(1000), 8, lambda: server.process.poll() is None))
        assert outcome.failures == []
        assert list(server.faults()) == []
        assert sum(n for what, n in outcome.counts.items() if what.endswith(" 200")) > 50  # not all are refused
        assert server.end() < 5


def test_fuzzed_requests_can_be_reproduced() -> None:
    assert fuzz_requests.made(3, 77) == fuzz_requests.made(3, 77)
    assert fuzz_requests.made(3, 77) != fuzz_requests.made(4, 77)
