"""Hostile requests for a real server with a tiny model: `cd tests && python -m support.fuzz.requests --inputs 10000`.

Each input is bytes for one connection, reproducible from the seed and its number. The run fails if the server ends, answers with 500,
says nothing within 5 s of a whole request, prints a traceback, or takes more memory than the model's file and 1 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.fuzz.one_field import one_field
from support.tiny_chat import tiny_chat_model

ANSWER_S, SILENT_S, MEMORY_BYTES, CTX = 5.0, 0.1, 1_000_000_000, 1024
KEY = "a-key"
TALKS = ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens")
POSTS = (*TALKS, "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize")
LARGE = 2000  # one input in so many may have megabytes


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Raw JSON, much of it none.
NUMBERS = (
    *_words(
        "0 -0 1 -1 2 0.5 1e999 -1e999 1e308 1e-45 1e-320 3.5e38 NaN Infinity -Infinity 1e 0x1 01 true false null [] {} [1]"
    ),
    *_words("2147483648 4294967295 4294967296 9223372036854775807 9223372036854775808 18446744073709551616"),
    *("9" * 30, "9" * 4000, "9" * 5000, "-" + "9" * 4000, "1." + "0" * 500, '"1"', '"' + "1" * 5000 + '"'),
)
STRINGS = (
    *_words(
        r'"" "a" "\u0000" "\ud800" "\udc00\ud800" "\ud83d\ude00" "\" "</s>" "<u><v><s></s>" "\u202e\u001b[31m" null 7 [] {} ["a"] [["a"]]'
    ),
    *('"\n"', '"\ue0f0\ue0f1"', '"{{ 7 * 7 }}{% raw %}"', '"ab abc"', '"é𝔘\u0301"', '"\xff"'),
)
_CALL = '{"id":"1","type":"function","function":{"name":"f","arguments":"{\\"a\\":[1]}"}}'
_SCHEMA = '{"type":"object","properties":{"a":{"$ref":"#/$defs/b"}},"$defs":{"b":{"anyOf":[{"$ref":"#/$defs/b"},{"type":"string","pattern":"^(a|b)+$"}]}}}'
# Fields that are whole: tools in three forms, JSON by a schema, calls and results.
WHOLE = (
    f'"tools":[{{"type":"function","function":{{"name":"f","parameters":{_SCHEMA}}}}}]',
    f'"tools":[{{"type":"function","name":"f","parameters":{_SCHEMA}}}]',
    f'"tools":[{{"name":"f","input_schema":{_SCHEMA}}}]',
    '"tools":[{"type":"function","function":{"name":"</s>","description":"</s>"}}]',
    '"tool_choice":"required"',
    '"tool_choice":{"type":"any"}',
    '"tool_choice":{"type":"function","function":{"name":"f"}}',
    f'"response_format":{{"type":"json_schema","json_schema":{{"name":"f","schema":{_SCHEMA}}}}}',
    '"response_format":{"type":"json_object"}',
    f'"text":{{"format":{{"type":"json_schema","name":"f","schema":{_SCHEMA}}}}}',
    '"logprobs":true,"top_logprobs":20',
    '"logprobs":5',
    '"n":3',
    '"logit_bias":{"5":-100,"261":100}',
    f'"messages":[{{"role":"user","content":"a"}},{{"role":"assistant","tool_calls":[{_CALL}]}},{{"role":"tool","tool_call_id":"1","content":"</s>"}}]',
    '"messages":[{"role":"user","content":"a"},{"role":"assistant","content":[{"type":"tool_use","id":"1","name":"f","input":{"a":"</s>"}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"1"}]}]',
    '"input":[{"type":"function_call","call_id":"1","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"1","output":"a"}]',
)
RUNS = ("a", " ", "-", "\\n", "</s>", "<u>", "é", "1", "\\t ", "ab ", "0a", "\\u0000")
FIELDS = (
    *_words(
        "temperature top_p top_k min_p repeat_penalty frequency_penalty presence_penalty seed max_tokens max_completion_tokens n best_of"
    ),
    *_words(
        "logprobs top_logprobs logit_bias stop stream stream_options tools model user metadata prompt_cache_key response_format echo"
    ),
    *_words("suffix messages prompt text role a\\u0000b"),
    "",
)
HOSTS = (
    *_words(
        "127.0.0.1 localhost LOCALHOST localhost. [::1] [::1].evil.com [::ffff:127.0.0.1] 127.0.0.1:99999 127.0.0.1: [ 127.1 evil.com"
    ),
    *_words("user@127.0.0.1 127.0.0.1@evil.com 127.0.0.1:80:80"),
    *("a" * 3000, "", "127.0.0.1 ", "127.0.0.1, evil.com", "\xff"),
)
ORIGINS = _words(
    "null http://127.0.0.1 https://evil.com http:// file:// :// http://127.0.0.1.evil.com http://127.0.0.1:1"
)
KINDS = (
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "",
    "application/x+json",
    ";",
    "\xff/json",
)
PATHS = (
    *_words(
        "/ // /page.js /page.css /health /health/ /%68ealth /metrics /openapi.json /v1/messages /v1/models /v1/models/ /v1/models/%2e%2e/%2e%2e/etc/passwd /v1/models/%00"
    ),
    *_words(
        "/v1/models/%ff%fe /v1//models /../page.js /page.js/..%2f..%2fetc%2fpasswd /v1/chat/completions/ http://evil.com/health * /%"
    ),
    *_words("/v1/models/model /tokenize?x=1#y"),
    *("/" + "a" * 5000, "/?" + "a=b&" * 500, "/%0d%0aX: y"),
)
METHODS = (*_words("GET HEAD OPTIONS PUT DELETE TRACE CONNECT PATCH POST get PRI"), "A" * 100)


@dataclass
class Input:
    """Bytes to send, in parts. whole: whether an answer must come; after: what is done then (read the answer, leave, …)."""

    parts: list[bytes]
    whole: bool = True
    after: str = "read"
    what: str = ""


def number_or(rng: random.Random) -> str:
    return rng.choice(NUMBERS if rng.random() < 0.7 else STRINGS)


def run_of(rng: random.Random, large: bool) -> str:
    length = rng.choice((1, 10, 100, 1000, 5000, 30_000, 70_000)) if rng.random() < 0.5 else 8
    return f'"{rng.choice(RUNS) * (length * (100 if large else 1))}"'


def text(rng: random.Random, large: bool) -> str:
    return rng.choice(STRINGS) if rng.random() < 0.3 else run_of(rng, large)


def content(rng: random.Random, large: bool) -> str:
    if rng.random() < 0.8:
        return text(rng, large)
    kind = rng.choice(('"text"', '"text"', '"text"', '"image_url"', "null"))
    part = f'{{"type":{kind},"text":{rng.choice(STRINGS)}}}'
    return "[" + ",".join([part] * rng.choice((0, 1, 2, 50))) + "]"


def message(rng: random.Random, large: bool) -> str:
    role = rng.choice(
        ('"user"', '"user"', '"user"', '"assistant"', '"system"', '"developer"', '"tool"', "null", "[]", "1e9")
    )
    more = f',"{rng.choice(FIELDS)}":{number_or(rng)}' if rng.random() < 0.1 else ""
    return f'{{"role":{role},"content":{content(rng, large)}{more}}}'


def ordinary(rng: random.Random, path: str, large: bool) -> list[str]:
    """Fields of a request that may well be answered."""
    if path == "/tokenize":
        return [f'"text":{text(rng, large)}']
    few = f'"max_tokens":{rng.randint(1, 3)}'
    if path == "/v1/embeddings":
        inputs = (text(rng, large), "[1,2]", "[[1],[262]]", "[]", '["a","b"]')
        return [f'"input":{rng.choice(inputs)}']
    if path == "/v1/responses":
        talk = f"[{message(rng, large)},{message(rng, False)}]"
        return [f'"input":{talk if rng.random() < 0.5 else text(rng, large)}', '"max_output_tokens":2']
    if path == "/v1/completions":
        tokens = json.dumps([rng.choice((0, 5, 97, 261, 262, -1, 2**31)) for _ in range(rng.choice((1, 5, 1500)))])
        return [f'"prompt":{tokens if rng.random() < 0.3 else text(rng, large)}', few]
    count = rng.choice((1, 1, 1, 2, 3, 30, 1100))
    one = message(rng, large) if count < 4 else '{"role":"user","content":"</s>"}'
    return [
        f'"messages":[{",".join([message(rng, False) for _ in range(min(count, 3) - 1)] + [one] * max(1, count - 2))}]',
        few,
    ]


def json_body(rng: random.Random, path: str, large: bool) -> bytes:
    """Fields, some of them hostile, twice, or in the wrong request."""
    fields = ordinary(rng, path, large)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5))):
        fields.append(f'"{rng.choice(FIELDS)}":{number_or(rng)}')
    if rng.random() < 0.3:
        fields += rng.sample(WHOLE, rng.choice((1, 1, 2)))
    if rng.random() < 0.1:
        fields.append(f'"stop":[{",".join([rng.choice(STRINGS)] * rng.choice((1, 16, 17, 1000)))}]')
    if rng.random() < 0.15:
        fields.append('"stream":true')
    rng.shuffle(fields)
    return ("{" + ",".join(fields) + "}").encode("utf-8" if rng.random() < 0.95 else "latin-1", "replace")


def structure(rng: random.Random, path: str, large: bool) -> bytes:
    """Deep, wide or empty JSON."""
    n = rng.choice((1, 10, 190, 300, 5000, 50_000)) * (50 if large else 1)
    names = {"/tokenize": "text", "/v1/completions": "prompt", "/v1/responses": "input", "/v1/embeddings": "input"}
    name = names.get(path, "messages")
    unit = rng.choice(
        ("[]", "{}", "0", "null", '""', '"ab"', "1.5", "[[]]", '{"a":0}', '{"role":"user","content":""}', "true", "NaN")
    )
    forms: tuple[Callable[[], str], ...] = (
        lambda: "[" * n,
        lambda: "[" * n + "]" * n,
        lambda: '{"a":' * n + "0" + "}" * n,
        lambda: f'{{"{name}":[{",".join([unit] * n)}]}}',
        lambda: f'{{"{name}":{{{",".join(f"{json.dumps(str(i))}:{unit}" for i in range(n))}}}}}',
        lambda: "{" + ",".join(f'"k{i}":null' for i in range(n)) + "}",
        lambda: f'{{"metadata":{"[" * min(n, 190)}{"]" * min(n, 190)},"{name}":{unit}}}',
        lambda: unit,
        lambda: "",
        lambda: " " * n + "{}",
        lambda: "\ufeff{}",
    )
    return rng.choice(forms)().encode()


def mutated(rng: random.Random, body: bytes) -> bytes:
    out = bytearray(body or b"{}")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + rng.randint(1, 16)]
        else:
            out[at:at] = rng.choice((rng.randbytes(4), b"\xff", b'"', b"\x00", b"\\u", b"[[[[", b",,", b"\xed\xa0\x80"))
    return bytes(out)


def head(method: str, path: str, headers: Sequence[tuple[str, str]], version: str = "HTTP/1.1") -> bytes:
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


USUAL = [("host", "127.0.0.1"), ("authorization", f"Bearer {KEY}"), ("content-type", "application/json")]


def chunked(rng: random.Random, body: bytes) -> bytes:
    size = rng.choice((1, 7, 1000, 100_000)) if len(body) < 5000 else 10_000
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    out = [b"%x%s\r\n%s\r\n" % (len(part), rng.choice((b"", b"", b";x=y")), part) for part in parts]
    return b"".join(out) + rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"00000\r\n\r\n"))


def posted(rng: random.Random, large: bool) -> tuple[str, bytes]:
    if rng.random() < 0.2:
        return one_field(rng)
    path = rng.choice(POSTS)
    body = (structure if rng.random() < 0.2 else json_body)(rng, path, large)
    return path, mutated(rng, body) if rng.random() < 0.15 else body


def a_body(rng: random.Random, large: bool) -> Input:
    path, body = posted(rng, large)
    if rng.random() < 0.1:
        return Input([head("POST", path, [*USUAL, ("transfer-encoding", "chunked")]), chunked(rng, body)])
    return Input([head("POST", path, [*USUAL, ("content-length", str(len(body)))]) + body])


def headers(rng: random.Random, large: bool) -> Input:
    """Other hosts, origins, types and keys, some of them twice."""
    path, body = posted(rng, large)
    given = [*USUAL, ("content-length", str(len(body)))]
    for _ in range(rng.randint(1, 3)):
        name, values = rng.choice(
            (
                ("host", HOSTS),
                ("origin", ORIGINS),
                ("content-type", KINDS),
                ("authorization", ("", "Bearer", "Basic x", f"bearer  {KEY}")),
                ("x-" + "y" * rng.choice((1, 1000)), ("z" * rng.choice((1, 5000)),)),
                ("expect", ("100-continue", "x")),
                ("upgrade", ("websocket",)),
                ("connection", ("close", "upgrade", "keep-alive", "x")),
                ("accept-encoding", ("gzip",)),
                ("cookie", ("a=b" * 100,)),
            )
        )
        if rng.random() < 0.7:
            given = [item for item in given if item[0] != name]
        given.insert(rng.randrange(len(given) + 1), (name, rng.choice(values)))
    if rng.random() < 0.05:
        given += [(f"h{i}", "v") for i in range(rng.choice((100, 3000)))]
    return Input(
        [head("POST", path, given, rng.choice(("HTTP/1.1",) * 8 + ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0"))) + body],
        whole=False,
    )


def smuggled(rng: random.Random, large: bool) -> Input:
    """Bodies whose end is told twice, or wrongly."""
    path, body = posted(rng, large)
    length = rng.choice(
        (len(body), 0, len(body) - 1, len(body) + 5, "-1", "1e3", "0x10", "+5", "9" * 25, "1" * 19, "", " 5", "5, 5")
    )
    coding = rng.choice(("chunked", "identity", "gzip, chunked", "chunked, chunked", "CHUNKED", "\x0bchunked"))
    which = rng.choice(
        (
            [("content-length", str(length))],
            [("transfer-encoding", coding)],
            [("content-length", str(length)), ("transfer-encoding", coding)],
            [("content-length", str(len(body))), ("content-length", str(length))],
        )
    )
    data = rng.choice((body, chunked(rng, body), b"zz\r\n" + body, b"ffffffffffffffffff\r\n", b"5\r\nabc"))
    return Input([head("POST", path, [*USUAL, *which]) + data], whole=False)


def paths(rng: random.Random, _large: bool) -> Input:
    asked = [item for item in USUAL if rng.random() < 0.9]
    return Input([head(rng.choice(METHODS), rng.choice(PATHS), asked)], whole=False)


def garbage(rng: random.Random, _large: bool) -> Input:
    whole = mutated(rng, head("POST", rng.choice(POSTS), [*USUAL, ("content-length", "2")]) + b"{}")
    return Input(
        [
            rng.choice(
                (
                    whole,
                    rng.randbytes(rng.choice((1, 100, 10_000))),
                    b"\r\n" * 1000,
                    b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 20_000,
                )
            )
        ],
        whole=False,
    )


def pipelined(rng: random.Random, _large: bool) -> Input:
    one = a_body(rng, False).parts
    return Input(
        [b"".join([*one, *rng.choice((one, [head("GET", "/health", USUAL)], [b"junk"], [b"x" * 200_000]))])],
        whole=False,
    )


def leaving(rng: random.Random, large: bool) -> Input:
    """The client leaves in the middle of the request, or before the answer."""
    made = a_body(rng, large)
    data = b"".join(made.parts)
    if rng.random() < 0.5:
        data = data[: rng.randrange(1, len(data))]
    return Input([data], whole=False, after=rng.choice(("leave", "reset", "half", "one byte")))


MIX: tuple[tuple[Callable[[random.Random, bool], Input], int], ...] = (
    (a_body, 60),
    (headers, 10),
    (smuggled, 6),
    (paths, 8),
    (garbage, 4),
    (pipelined, 3),
    (leaving, 9),
)


def made(seed: int, number: int) -> Input:
    """Input `number`."""
    rng = random.Random(f"{seed}-requests-{number}")
    maker = rng.choices([maker for maker, _weight in MIX], [weight for _maker, weight in MIX])[0]
    result = maker(rng, number % LARGE == LARGE - 1)
    result.what = maker.__name__
    return result


@dataclass
class Outcome:
    """counts: by kind of input and what came; failures: (number, what no input may do)."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


class Client:
    """One connection after another; kept open where the server keeps it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, asked: Input) -> str:
        """What came: a status, "closed", "left". Raises TimeoutError."""
        if self.streams is None:
            self.streams = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", self.port), ANSWER_S)
        reader, writer = self.streams
        try:
            for part in asked.parts:
                writer.write(part)
            if asked.after == "leave":
                return self.drop("left")
            with suppress(ConnectionError):
                await asyncio.wait_for(writer.drain(), ANSWER_S)
            if asked.after == "reset":
                with suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                return self.drop("left")
            if asked.after == "half" and writer.can_write_eof():
                writer.write_eof()
            if asked.after == "one byte":
                await asyncio.wait_for(reader.read(1), SILENT_S)
                return self.drop("left")
            status, kept = await asyncio.wait_for(_answer(reader), ANSWER_S if asked.whole else SILENT_S)
        except asyncio.TimeoutError:
            self.drop("")
            if asked.whole:
                raise
            return "nothing yet"
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            return self.drop("closed")
        if not kept or not asked.whole:
            self.drop("")
        return str(status)

    def drop(self, outcome: str) -> str:
        if self.streams is not None:
            self.streams[1].transport.abort() if outcome != "left" else self.streams[1].close()
        self.streams = None
        return outcome


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the connection goes on."""
    first = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(first.split(" ", 2)[1])
    if status == 100:
        return await _answer(reader)
    length = re.search(r"content-length: (\d+)", first)
    if "transfer-encoding: chunked" in first:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            await reader.readexactly(size + 2)
        await reader.readuntil(b"\r\n")
    elif length is not None:
        await reader.readexactly(int(length[1]))
    return status, "connection: close" not in first and length is not None


class FuzzedServer:
    """A server with a tiny model in a process of its own, whose log is kept."""

    def __init__(self, folder: Path) -> None:
        model = tiny_chat_model(folder / "model.gguf")
        command = [
            sys.executable,
            "-m",
            "yarn_edge",
            "serve",
            str(model),
            *f"--port 0 --ctx {CTX} --threads 1".split(),
            "--api-key",
            KEY,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
        self.log: list[str] = []
        self._port: list[int] = []
        self._ready = threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        assert self._ready.wait(60), self.log
        assert self._port, self.log
        self.port, self.file_bytes, self.before = self._port[0], model.stat().st_size, self.memory("VmRSS")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if (found := re.search(r"http://\S+?:(\d+)/ is the page", line)) is not None:
                self._port.append(int(found[1]))
                self._ready.set()
        self._ready.set()

    def memory(self, name: str) -> int:
        """VmRSS (now) or VmHWM (at most), in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name))) << 10

    def faults(self) -> Iterator[str]:
        """What no server may do."""
        if self.process.poll() is not None:
            yield f"the server ended with {self.process.returncode}: {''.join(self.log[-20:])}"
        elif (grown := self.memory("VmHWM") - self.before) > self.file_bytes + MEMORY_BYTES:
            yield f"the server took {grown >> 20} MiB more"
        if any("Traceback" in line for line in self.log):
            yield f"a traceback: {''.join(self.log)[-3000:]}"

    def close(self) -> None:
        """End the process, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reading.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def end(self) -> float:
        """Seconds from SIGTERM to its end; 0 status is checked."""
        began = time.monotonic()
        self.process.terminate()
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
        assert code == 0, (code, self.log[-20:])
        return time.monotonic() - began


@contextmanager
def fuzzed_server() -> Iterator[FuzzedServer]:
    """A server, ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="yarn-edge-fuzz-") as folder:
        server = FuzzedServer(Path(folder))
        try:
            yield server
        finally:
            server.close()


async def fuzz(port: int, seed: int, numbers: range, n_clients: int, alive: Callable[[], bool]) -> Outcome:
    """Send the inputs of these numbers."""
    outcome, waiting = Outcome(), iter(numbers)

    async def one_client() -> None:
        client = Client(port)
        for number in waiting:
            asked = made(seed, number)
            try:
                came = await client.send(asked)
            except (asyncio.TimeoutError, TimeoutError):
                came = "timeout"
                outcome.failures.append((number, f"{asked.what}: no answer within {ANSWER_S:g} s"))
            except OSError as error:
                came = "refused"
                if not alive():
                    outcome.failures.append((number, f"{asked.what}: {error}"))
                    return
            if came == "500":
                outcome.failures.append((number, f"{asked.what}: 500"))
            outcome.counts[f"{asked.what} {came}"] += 1
        client.drop("")

    await asyncio.gather(*(one_client() for _ in range(n_clients)))
    return outcome


def main() -> int:
    """Fuzz, print the record, 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Hostile requests for a server with a tiny model.")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    numbers = range(args.start, args.start + args.inputs)
    with fuzzed_server() as server:
        began = time.monotonic()
        outcome = asyncio.run(
            fuzz(server.port, args.seed, numbers, args.clients, lambda: server.process.poll() is None)
        )
        took = time.monotonic() - began
        faults = [*(f"input {number}: {what}" for number, what in outcome.failures), *server.faults()]
        out = sys.stdout.write
        out(f"{args.inputs} requests from seed {args.seed} in {took:.0f} s ({args.inputs / took:.0f}/s)\n")
        out("".join(f"  {what}: {n}\n" for what, n in sorted(outcome.counts.items())))
        if server.process.poll() is None:
            out(
                f"memory: {server.memory('VmHWM') - server.before >> 20} MiB more at most; ended in {server.end():.1f} s\n"
            )
        out(f"{len(faults)} failures\n" + "".join(f"  {fault}\n" for fault in faults[:50]))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
