"""Who may ask: hosts, origins, keys, headers that are there twice. The guard alone, without a socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.command import LOOPBACK, api_key
from yarn_edge.serve.guard import HEADERS, Access, Guard

from support.serving import MODEL

Headers = list[tuple[str, str]]
HOST: Headers = [("host", "127.0.0.1:8080")]


def asked(headers: Headers, access: Access, path: str = "/v1/models") -> tuple[int, str]:
    """Status and message; 200 where the guard passes the request on."""
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(n.encode(), v.encode("latin-1")) for n, v in headers]}
    asyncio.run(Guard(app, access, frozenset({"/health"}))(scope, None, send))  # type: ignore[arg-type]
    assert {name.lower().encode() for name in HEADERS} <= {name for name, _value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(sent[1]["body"]).get("error", {}).get("message", "")


HOSTS = {
    "127.0.0.1": True,
    "127.0.0.1:8080": True,
    "localhost:1": True,
    "LocalHost": True,
    "[::1]": True,
    "[::1]:8080": True,
    "[::1].evil.com": False,
    "[::1]evil.com": False,
    "[::1]:80.evil.com": False,
    "[::1": False,
    "::1": False,
    "[::ffff:127.0.0.1]": False,
    "127.0.0.1.evil.com": False,
    "127.0.0.1:80:80": False,
    "127.0.0.1:": False,
    "127.0.0.1:http": False,
    "user@127.0.0.1": False,
    "127.0.0.1@evil.com": False,
    "127.0.0.1, evil.com": False,
    "localhost.": False,
    "127.1": False,
    "evil.com": False,
    "\xff": False,
    "": False,
}


@pytest.mark.parametrize("host, known", HOSTS.items(), ids=[repr(host) for host in HOSTS])
def test_hosts(host: str, known: bool) -> None:
    status, message = asked([("host", host)], Access(hosts=LOOPBACK))
    assert (status, "does not answer to that host" in message) == ((200, False) if known else (403, True))
    assert asked([("host", host)], Access())[0] == 200  # other addresses have a key instead


@pytest.mark.parametrize(
    "origin, own",
    [
        ("http://127.0.0.1:8080", True),
        ("https://127.0.0.1:8080", True),  # behind a proxy with TLS
        ("http://127.0.0.1", False),
        ("http://localhost:8080", False),
        ("evil://127.0.0.1:8080", False),
        ("http://evil.com", False),
        ("http://127.0.0.1:8080.evil.com", False),
        ("://127.0.0.1:8080", False),
        ("null", False),
        ("", False),
    ],
)
def test_origins(origin: str, own: bool) -> None:
    for access in (Access(hosts=LOOPBACK), Access()):
        assert asked([*HOST, ("origin", origin)], access)[0] == (200 if own else 403)


def test_a_request_without_a_host_has_no_origin() -> None:
    """HTTP/1.0 needs no host. "null" and "file://" name nothing either, and must not count as the same."""
    for origin in ("null", "file://", "http://", "://"):
        assert asked([("origin", origin)], Access(hosts=None))[0] in (403, 200 if origin == "http://" else 403)
    assert asked([("origin", "null")], Access(hosts=None))[0] == 403


@pytest.mark.parametrize(
    "name", ["host", "origin", "authorization", "content-length", "content-type", "transfer-encoding"]
)
@pytest.mark.parametrize("second", ["same", "other"])
def test_headers_that_are_there_twice(name: str, second: str) -> None:
    usual = {
        "host": "127.0.0.1:8080",
        "origin": "http://127.0.0.1:8080",
        "authorization": "Bearer k",
        "content-length": "2",
    }
    first = usual.get(name, "x")
    one = [(n, v) for n, v in usual.items() if n == "host" or (n != name and n != "content-length")]
    given = [item for item in one if item[0] != name] + [
        (name, first),
        (name, first if second == "same" else first + "1"),
    ]
    for order in (given, given[::-1]):
        assert asked(order, Access("k", LOOPBACK)) == (400, f"the header {name} is there twice")


def test_two_ends_of_a_body() -> None:
    status, message = asked([*HOST, ("content-length", "2"), ("transfer-encoding", "chunked")], Access())
    assert (status, message) == (400, "the request has both content-length and transfer-encoding")


KEYS = {
    "Bearer secret": 200,
    "bearer secret": 200,
    "BEARER   secret ": 200,
    "Bearer secre": 401,
    "Bearer secret2": 401,
    "Bearer": 401,
    "Bearer ": 401,
    "secret": 401,
    "Basic secret": 401,
    "Bearer s\xe9cret": 401,
    "": 401,
}


@pytest.mark.parametrize("given, status", KEYS.items(), ids=[repr(key) for key in KEYS])
def test_keys_of_requests(given: str, status: int) -> None:
    assert asked([*HOST, ("authorization", given)], Access("secret"))[0] == status
    assert asked([*HOST, ("authorization", given)], Access("secret"), "/health")[0] == 200
    for path in ("//health", "/health/", "/Health", "/health/../v1/models"):
        assert asked([*HOST, ("authorization", "")], Access("secret"), path)[0] == 401


def test_keys_of_anthropics_clients() -> None:
    """x-api-key instead of authorization; two of them are refused, and errors have Anthropic's form where its clients ask."""
    for given, status in {"secret": 200, "secre": 401, "": 401, "Bearer secret": 401}.items():
        assert asked([*HOST, ("x-api-key", given)], Access("secret"))[0] == status
    assert asked([*HOST, ("x-api-key", "secret"), ("authorization", "Bearer old")], Access("secret"))[0] == 200
    assert asked([*HOST, ("x-api-key", "secret"), ("x-api-key", "x")], Access("secret"))[0] == 400
    assert asked(HOST, Access("secret"), "/v1/messages") == (401, "the API key is missing or wrong")


WRONG_KEYS = {
    "empty": ("", "is empty: give it a key, or leave it out"),
    "a space": (" ", "has a space, a line break or a character that is not ASCII"),
    "words": ("two words", "has a space"),
    "a line break": ("key\n", "has a space, a line break"),
    "a header": ("key\r\nx: y", "has a space, a line break"),
    "umlauts": ("schlüssel", "that is not ASCII"),
    "NUL": ("a\x00b", "a header cannot carry it"),
}


@pytest.mark.parametrize("key, reason", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_keys_that_no_client_could_send(key: str, reason: str) -> None:
    with pytest.raises(YarnEdgeError) as flag:
        api_key(key, "good")
    with pytest.raises(YarnEdgeError) as variable:
        api_key(None, key)
    for error, origin in ((flag, "--api-key "), (variable, "$YARN_EDGE_API_KEY ")):
        assert str(error.value).startswith(origin)
        assert reason in str(error.value)
        assert not key.strip() or key not in str(error.value)


def test_which_key_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert api_key(None, None) is None
    assert api_key("flag", "variable") == "flag"
    assert api_key("flag", "") == "flag"
    assert api_key(None, "sk-A1_~!") == "sk-A1_~!"
    monkeypatch.setenv("YARN_EDGE_API_KEY", "")
    for words in ([], ["--host", "0.0.0.0"], ["--api-key", ""]):
        assert main(["serve", str(MODEL), *words]) == 2
        assert " is empty: give it a key, or leave it out" in capsys.readouterr().err
