"""The server as its clients see it: the `openai` package, raw requests, many at once, and requests it must refuse."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from yarn_edge.addresses import is_loopback
from yarn_edge.cli import main
from yarn_edge.gguf.read import read_gguf

from support.serving import KEY, MODEL, QUESTION, Server
from support.templates import with_template

PARIS = str(read_gguf(MODEL).metadata["tokenizer.ggml.tokens"].index("ĠParis"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server("--api-key", KEY, "--name", "small")
    yield made
    assert made.end() == 0, made.notes
    assert "Traceback" not in made.notes


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0, timeout=120) as made:
        yield made


def test_the_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    model = client.models.retrieve("small")
    assert (model.id, model.object, model.created) == ("small", "model", int(MODEL.stat().st_mtime))
    assert model == client.models.list().data[0]
    for name in ("large", "org/large", "small/", "smal"):
        with pytest.raises(openai.NotFoundError, match=f"the model '{name}' does not exist") as missing:
            client.models.retrieve(name)
        assert missing.value.code == "model_not_found"
    asked: dict[str, Any] = {"model": "small", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    asked["prompt_cache_key"] = "mine"
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1  # of the same prompt
    text = client.completions.create(model="small", prompt="The capital of France is", max_tokens=1, temperature=0)
    assert text.choices[0].text == " Paris"


def test_stops_and_seeds(server: Server) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    _status, plain = server.chat(**asked)
    said = plain["choices"][0]["message"]["content"]
    word = said.split()[5]
    _status, cut = server.chat(**asked, stop=[word, "never said"])
    assert cut["choices"][0]["message"]["content"] == said[: said.index(word)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    anthropic = {"messages": QUESTION, "stop_sequences": [word, "never said"], **asked}
    message = json.loads(server.request("POST", "/v1/messages", anthropic)[2])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", word)
    assert message["content"][0]["text"] == said[: said.index(word)]
    answers = [server.chat(temperature=1.5, seed=3, max_completion_tokens=8)[1] for _ in range(2)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert server.chat(**asked, messages=parts)[1]["choices"] == plain["choices"]


def test_probabilities_biases_and_several_answers(client: openai.OpenAI) -> None:
    """At temperature 0 the most probable token is taken, until a bias forbids it; answers with seeds are those of single requests."""
    asked: dict[str, Any] = {"model": "small", "messages": QUESTION, "temperature": 0, "max_tokens": 4}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    told = choice.logprobs.content or []
    assert "".join(token.token for token in told) == choice.message.content
    for token in told:
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob
    first = client.completions.create(model="small", prompt="The capital of France is", max_tokens=1, temperature=0)
    assert first.choices[0].text == " Paris"
    biased = client.completions.create(
        model="small", prompt="The capital of France is", max_tokens=1, temperature=0, logit_bias={PARIS: -100}
    )
    assert biased.choices[0].text != " Paris"
    sampled = {**asked, "temperature": 1.5, "max_tokens": 6}
    three = client.chat.completions.create(**sampled, seed=7, n=3)
    alone = [client.chat.completions.create(**sampled, seed=7 + n).choices[0].message.content for n in range(3)]
    assert [one.message.content for one in three.choices] == alone


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    """As the openai package dumps it, with all of its empty fields; a seed and a top_k of any client."""
    asked: dict[str, Any] = {"model": "small", "messages": QUESTION, "max_tokens": 4}
    said = client.chat.completions.create(**asked).choices[0].message
    echoed = [*QUESTION, said.model_dump(), {"role": "user", "content": "And to a cat?"}]
    assert client.chat.completions.create(**{**asked, "messages": echoed}).choices[0].message.content
    for seed in (-1, 2**32 - 1, 2**53, -(2**63), 2**63 + 1):
        assert client.chat.completions.create(**asked, seed=seed, extra_body={"top_k": -1}).choices
    large = [client.chat.completions.create(**asked, temperature=1.5, seed=2**40).choices[0] for _ in range(2)]
    assert large[0] == large[1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": [{"type": "function"}]}, "tools[0].function is None, but must be an object"),
    "many answers": ({"n": 17}, "n: Input should be less than or equal to 16"),
    "tool calls": (
        {"messages": [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "messages[1].tool_calls[0].function is None, but must be an object",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]: a part of type 'image_url' is not supported",
    ),
    "a role": ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role is 'function'"),
    "no messages": ({"messages": []}, "messages: "),
    "temperature": ({"temperature": -1}, "temperature is -1"),
    "a word": ({"temperature": "hot"}, "temperature: "),
    "max_tokens": ({"max_tokens": 0}, "max_tokens: "),
    "stops": ({"stop": ["a"] * 17}, "stop: at most 16"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 2000}]}, "tokens, the context holds 1024"),
    "too large": ({"messages": [{"role": "user", "content": "x" * (20 << 20)}]}, "larger than"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_refused(fields: dict[str, Any], message: str, server: Server) -> None:
    status, body = server.chat(**fields)
    assert status in (400, 413)
    assert message in body["error"]["message"]
    assert "--t" not in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


def test_raw_refusals(server: Server) -> None:
    for body in (b"{", b"\xff\xfe", b"[1, 2]", b'{"messages": ' + b"[" * 100_000, b""):
        status, _headers, answer = server.request("POST", "/v1/chat/completions", body)
        assert status in (400, 422), body[:20]
        assert "message" in json.loads(answer)["error"]
    for body, message in {
        b"": "the request must be a JSON object",
        b"[1, 2]": "the request must be a JSON object",
        b'{"messages": [}': "the request is not valid JSON: expected value at line 1 column 15",
        b"{}": "messages: Field required",
        b'{"messages": [{"role": "user", "content": "a"}], "stop": 3}': "stop is 3, but must be a text or a list of texts",
    }.items():
        assert json.loads(server.request("POST", "/v1/chat/completions", body)[2])["error"]["message"] == message
    for path in "/v1/none", "/chat/completions", "/v1/v1/messages":  # a base address without /v1, and one with it twice
        status, _headers, answer = server.request("POST", path, b"{}")
        assert status == 404
        assert json.loads(answer)["error"]["message"].startswith(
            f"there is no '{path}': interfaces begin with /v1 once"
        )
    assert server.request("POST", "/tokenize", {"text": "a", "add_special": True})[0] == 400
    assert server.request("DELETE", "/v1/models")[0] == 405
    assert server.request("POST", "/v1/completions", {"prompt": ["a", "b"]})[0] == 400
    assert server.request("POST", "/v1/completions", {"prompt": [10**9]})[0] == 400
    assert server.request("POST", "/v1/completions", {"prompt": ""})[0] == 400
    assert server.request("GET", "/../../etc/passwd")[0] in (401, 404)


CONTENT_TYPES = {
    "application/json; charset=utf-8": 200,
    "Application/JSON;charset=UTF-8": 200,
    "application/vnd.api+json": 200,
    "application/x-www-form-urlencoded": 415,  # curl -d without a header
    "text/plain;charset=UTF-8": 415,
    "text/json": 415,
    "application/jsonl": 415,
    "json": 415,
    "": 415,
}


@pytest.mark.parametrize("kind, status", CONTENT_TYPES.items(), ids=CONTENT_TYPES)
@pytest.mark.parametrize(
    "path, body", [("/tokenize", {"text": "a"}), ("/v1/completions", {"prompt": "a", "max_tokens": 1})]
)
def test_content_types(path: str, body: Any, kind: str, status: int, server: Server) -> None:
    answer = server.request("POST", path, body, Content_Type=kind)
    assert answer[0] == status
    if status == 415:
        message = json.loads(answer[2])["error"]["message"]
        assert message.startswith("the header Content-Type is ")
        assert message.endswith(", but must be application/json")


def test_keys(server: Server, client: openai.OpenAI) -> None:
    for key in (None, "another", "", KEY + "x"):
        assert server.request("GET", "/v1/models", key=key)[0] == 401
        assert server.request("POST", "/tokenize", {"text": "x"}, key=key)[0] == 401
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    assert server.request("GET", "/health", key=None)[0] == 200


def test_strangers_pages_are_not_answered(server: Server) -> None:
    """A host name that resolves to this machine, and a request from another page."""
    assert server.request("GET", "/v1/models", Host="evil.example")[0] == 403
    assert server.request("GET", "/v1/models", Host=f"localhost:{server.port}")[0] == 200
    assert server.request("GET", "/v1/models", Origin="https://evil.example")[0] == 403
    own = f"127.0.0.1:{server.port}"
    status, headers, _body = server.request("GET", "/v1/models", Origin=f"http://{own}")
    assert status == 200
    assert not any(name.lower().startswith("access-control") for name in headers)


def test_the_page_needs_nothing_else(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")):
        status, headers, body = server.request("GET", path, key=None)
        assert status == 200
        assert kind in headers["content-type"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert not re.search(rb"(https?:)?//[a-z]", re.sub(rb"^\s*//.*$", b"", body, flags=re.M)), path


def test_only_the_loopback_address_is_listened_to(server: Server) -> None:
    found = [c.laddr for c in psutil.Process(server.process.pid).net_connections("tcp") if c.status == "LISTEN"]
    assert [(address.ip, address.port) for address in found] == [("127.0.0.1", server.port)]


def test_many_at_once(server: Server) -> None:
    """Eight streams, one of them cut, together with a prompt of 2 MB, bad JSON and a missing key."""
    answers: dict[int, str] = {}
    asked = {"stream": True, "temperature": 0, "max_tokens": 24}

    def stream(number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"Tell me about the number {number}."}], **asked}
        with server.open("POST", "/v1/chat/completions", body) as reply:
            if number == 3:
                reply.read(1)
                return  # the connection is closed in the middle
            text = reply.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        answers[number] = "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    status, body = server.chat(messages=[{"role": "user", "content": "word " * 400_000}])
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert server.request("POST", "/v1/chat/completions", b"{")[0] == 400
    assert server.request("POST", "/v1/chat/completions", {"messages": QUESTION}, key=None)[0] == 401
    for thread in threads:
        thread.join(120)
    assert answers.keys() == set(range(8)) - {3}
    assert all(answers.values())
    for number, answer in answers.items():  # each got its own
        alone = server.chat(
            messages=[{"role": "user", "content": f"Tell me about the number {number}."}], temperature=0, max_tokens=24
        )
        assert alone[1]["choices"][0]["message"]["content"].split()[:3] == answer.split()[:3]


def test_a_client_that_leaves_frees_the_model(server: Server) -> None:
    body = {"messages": QUESTION, "stream": True, "max_tokens": 900, "temperature": 0}
    with server.open("POST", "/v1/chat/completions", body) as reply:
        reply.read(200)
    began = time.monotonic()
    assert server.chat(max_tokens=2)[0] == 200
    assert time.monotonic() - began < 20  # the whole other answer takes longer


def test_without_a_key_and_its_end_in_the_middle() -> None:
    made = Server()
    assert made.request("GET", "/v1/models", key=None)[0] == 200
    body = {"messages": QUESTION, "stream": True, "max_tokens": 900}
    with made.open("POST", "/v1/chat/completions", body) as reply:
        reply.read(100)
        began = time.monotonic()
        assert made.end(signal.SIGINT) == 0
        assert time.monotonic() - began < 15
    assert "the server has stopped" in made.notes
    assert "Traceback" not in made.notes


def test_a_base_model_completes(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(MODEL.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_TEMPLATE"))
    made = Server(model=path)
    try:
        status, body = made.chat(max_tokens=2)
        assert (status, "has no chat template" in body["error"]["message"]) == (400, True)
        status, _headers, answer = made.request(
            "POST", "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 1}
        )
        assert (status, json.loads(answer)["choices"][0]["finish_reason"]) == (200, "length")
    finally:
        made.end()


def test_clients_see_no_paths(tmp_path: Path) -> None:
    """A template refuses a role, loses a text, or is broken: its words, and neither the file's folder nor a flag."""
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content if m.role == 'user' and m.content != 'lost' and m.content != 'nothing' }}{% endfor %}"
        "{{ 'x' if messages[-1].content == 'lost' }}{{ 1 / 0 if messages[0].content == 'broken' }}"
    )
    made = Server(model=with_template(tmp_path / "picky.gguf", source))
    system = {"role": "system", "content": "Be brief."}
    refused = {
        "TemplateError: no system": [system, *QUESTION],
        "makes a prompt without all of the user's last message": [{"role": "user", "content": "lost"}],
        "renders nothing": [{"role": "user", "content": "nothing"}],
        "ZeroDivisionError": [{"role": "user", "content": "broken"}],
    }
    try:
        assert made.chat(max_tokens=1)[0] == 200
        for reason, messages in refused.items():
            for stream in (False, True):
                status, body = made.chat(messages=messages, stream=stream)
                message = body["error"]["message"]
                assert (status, message.startswith(f"the model's chat template: {reason}")) == (400, True), message
                assert str(tmp_path) not in message
                assert "--" not in message
    finally:
        made.end()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_need_a_key(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YARN_EDGE_API_KEY", raising=False)
    assert not is_loopback(host)
    assert main(["serve", str(MODEL), "--host", host]) == 2
    assert "needs --api-key" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(MODEL), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
