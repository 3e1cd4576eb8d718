"""Several clients at once: `serve` against llama-server of the pinned source, with the same libraries.

    python -m yarn_edge.bench.peers.serve MODEL.gguf [--peer DIR] [--clients 4,8,16]

Each side is a server in a process of its own; both run at once, and are asked in turns. Clients stream completions at depth 0, all at
the same time, and one after another for comparison. With --document, short questions are asked while a document is read; and, of
our server alone, several clients ask about one document, and one asks again after a restart with --cache.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from yarn_edge.engine.pace import ALONE_S
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count, length, length_from
from yarn_edge.sample_text import sample_text

from ..speed.command import listed
from .llama_bench import executable, our_libraries
from .race import Race, Results
from .server_process import ask, free_port, running_server
from .turns import markdown

OURS, PEER = "yarn-edge", "llama-server"
QUESTION = "Once upon a time there was"
_READERS, _ANSWER = 4, 16  # clients that ask about one document, and tokens of each of their answers
LEAST_SPEED, LEAST_GAIN, MOST_SLICES, MOST_AGAIN, MOST_EVALUATED = 0.95, 2.0, 2.0, 1 / 20, 1.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The race's own flags."""
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="folder of llama-server (default: without a peer)")
    parser.add_argument(
        "--clients", type=listed(count(1, 64)), default=[4, 8, 16], metavar="N,…", help="clients (default: 4,8,16)"
    )
    parser.add_argument("--ctx", type=length, default=32768, metavar="N", help="context (default: %(default)s)")
    parser.add_argument(
        "--gen-tokens", type=length_from(2, 4096), default=96, metavar="N", help="tokens of each answer"
    )
    parser.add_argument("--document", type=length, default=0, metavar="N", help="tokens of a document to read")


def streamed(port: int, prompt: str, n_tokens: int) -> tuple[float, float, int]:
    """(seconds to the first piece, to the last one, tokens of the answer) of one completion."""
    body = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True}
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    began, first, tokens = time.perf_counter(), 0.0, 0
    body["stream_options"] = {"include_usage": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if (event.get("choices") or [{}])[0].get("text"):
            first = first or time.perf_counter() - began
        if event.get("usage"):
            tokens = int(event["usage"]["completion_tokens"])
    connection.close()
    if not tokens:
        raise YarnEdgeError(f"port {port}: no answer ({reply.status})")
    return first, time.perf_counter() - began, tokens


def clients_at_once(n: int, ask: Callable[[int], tuple[float, float, int]]) -> tuple[float, list[float]]:
    """(tokens per second of n clients together, the seconds to each one's first token)."""
    answers: list[Any] = [None] * n

    def client(i: int) -> None:
        answers[i] = ask(i)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(n)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if None in answers:
        raise YarnEdgeError("a client got no answer")
    return sum(answer[2] for answer in answers) / took, [answer[0] for answer in answers]


def run(args: argparse.Namespace, results: Results) -> None:
    """The race."""
    most = max(args.clients)
    with ExitStack() as held:
        sides = {OURS: held.enter_context(_ours(args, most))}
        if args.peer is not None:
            program, port = executable(args.peer, "llama-server"), free_port()
            words = f"-c {args.ctx} -t {args.threads} -np {most} --kv-unified --port {port} --no-webui".split()
            peer = [str(program), "-m", str(args.model), *words]
            sides[PEER] = held.enter_context(running_server(peer, port, our_libraries()))
        for name, port in sides.items():
            streamed(port, QUESTION, 8)
            results.setdefault("speeds", {})[name] = {}
        for n in [1, *args.clients]:
            speeds: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(args.repeat):
                for name in list(sides)[:: -1 if turn % 2 else 1]:  # who goes first alternates
                    port = sides[name]
                    speeds[name].append(
                        clients_at_once(n, lambda i, p=port: streamed(p, f"{i}. {QUESTION}", args.gen_tokens))[0]  # type: ignore[misc]
                    )
            for name, of_side in speeds.items():
                results["speeds"][name][n] = statistics.median(of_side)
            if PEER in sides:
                pairs = zip(speeds[OURS], speeds[PEER], strict=True)
                results.setdefault("ratios", {})[n] = statistics.median(ours / peer for ours, peer in pairs)
        if args.document:
            document = _document(sides[OURS], args.document)
            for name, port in sides.items():
                results.setdefault("first_token_s", {})[name] = _beside_a_document(port, document)
    if args.document:
        results["document"] = _shared_and_again(args, document)


def _ours(args: argparse.Namespace, parallel: int, *more: str) -> AbstractContextManager[int]:
    port = free_port()
    words = f"--ctx {args.ctx} --threads {args.threads} --parallel {parallel} --lookup off --quiet --port {port}"
    return running_server([sys.executable, "-m", "yarn_edge", "serve", str(args.model), *words.split(), *more], port)


def _document(port: int, n_tokens: int) -> str:
    """A text of about n_tokens tokens."""
    text = re.sub(r"\s+", " ", sample_text())
    characters = round(len(text) * n_tokens / _count(port, text))
    return (text * (characters // len(text) + 1))[:characters]


def _count(port: int, text: str) -> int:
    """The tokens of a text."""
    return int(ask(port, "/tokenize", {"text": text}, 60)["tokens"])


def _beside_a_document(port: int, document: str) -> dict[str, float]:
    """Seconds to the first token of a short question alone, of the slowest of up to three while a document is read, and of that."""
    alone = streamed(port, f"Alone. {QUESTION}", 4)[0]
    long: list[tuple[float, float, int]] = []
    reader = threading.Thread(target=lambda: long.append(streamed(port, document, 4)))
    reader.start()
    beside = []
    for i in range(3):
        time.sleep(1)
        if reader.is_alive():
            beside.append(streamed(port, f"{i} beside. {QUESTION}", 4)[0])
    reader.join()
    if not beside:
        raise YarnEdgeError("the document was read before a question could be asked: choose a longer one")
    return {"alone": alone, "beside": max(beside), "document": long[0][0]}


def _shared_and_again(args: argparse.Namespace, document: str) -> dict[str, float]:
    """What several clients cost that ask about one document, and the seconds to the first token, also after a restart."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ("--cache", folder)
        with _ours(args, _READERS, *cache) as port:
            tokens = _count(port, document)
            streamed(port, QUESTION, 8)
            before = _metrics(port)
            _, first = clients_at_once(_READERS, lambda i: streamed(port, f"{document} {i}. {QUESTION}", _ANSWER))
            after = _metrics(port)
        with _ours(args, _READERS, *cache) as port:
            streamed(port, QUESTION, 8)
            again = streamed(port, f"{document} {_READERS}. {QUESTION}", _ANSWER)[0]
    evaluated, cells = "prompt_tokens_evaluated_total", "cache_cells_used"
    return {
        "tokens": tokens,
        "evaluated": after[evaluated] - before[evaluated],
        "cells": after[cells] - before[cells],
        "first_s": min(first),
        "again_s": again,
    }


def _metrics(port: int) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        found = re.findall(r"^yarn_edge_(\w+) ([\d.]+)$", reply.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def race_tables(results: Results) -> str:
    """Tokens per second, all clients together; then what a document costs."""
    speeds = results.get("speeds", {})
    counts = sorted({n for side in speeds.values() for n in side})
    rows = [[name, *(f"{side.get(n, 0):.1f}" for n in counts)] for name, side in speeds.items()]
    if ratios := results.get("ratios"):
        rows.append(["ratio of neighboring turns", *(f"{ratios[n]:.3f}" if n in ratios else "" for n in counts)])
    text = markdown(["tok/s", *(f"{n} clients" if n > 1 else "1 client" for n in counts)], rows)
    for name, seconds in results.get("first_token_s", {}).items():
        text += f"\n{name}: " + ", ".join(f"first token {how} after {s:.2f} s" for how, s in seconds.items())
    if cost := results.get("document"):
        text += (
            f"\n{_READERS} clients, one document of {cost['tokens']:.0f} tokens: {cost['evaluated']:.0f} tokens evaluated, "
            f"{cost['cells']:.0f} cells; first token after {cost['first_s']:.2f} s, {cost['again_s']:.2f} s after a restart"
        )
    return text


def passed(results: Results) -> bool:
    """Whether 4 clients get what they should, and a document costs what it should."""
    ours = results["speeds"][OURS]
    ratios = results.get("ratios", {})
    fast = all(ours[n] >= LEAST_GAIN * ours[1] and ratios.get(n, 1.0) >= LEAST_SPEED for n in ours if n == 4)
    cost = results.get("document")
    if cost is None:
        return fast
    most = MOST_EVALUATED * cost["tokens"]  # each client's own question comes on top
    once = cost["evaluated"] <= most and cost["cells"] <= most + _READERS * _ANSWER
    soon = results["first_token_s"][OURS]["beside"] <= MOST_SLICES * ALONE_S
    return fast and once and soon and cost["again_s"] <= MOST_AGAIN * cost["first_s"]


RACE = Race("serve", __doc__ or "", add_arguments, run, race_tables, passed, repeat=3)

if __name__ == "__main__":
    sys.exit(RACE.main())
