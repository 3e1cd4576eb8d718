"""`yarn-edge serve MODEL`: an OpenAI-compatible server for one model, and a page to chat in the browser.

It listens on 127.0.0.1; another address must be given with --host, and needs an API key. The web framework is that of
llama_cpp.server (`pip install 'yarn-edge[serve]'`). The model is run by `yarn_edge.engine.opened` and `yarn_edge.serve.worker`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.addresses import is_loopback, listening
from yarn_edge.engine.flags import MAX_PARALLEL, add_engine_flags, engine_settings
from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import add_kv_flags, add_threads_flag, count, length, memory_size
from yarn_edge.progress import note
from yarn_edge.split_flags import split_request

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model
    from yarn_edge.serve.lanes import TextLane
    from yarn_edge.serve.vectors import VectorLane
    from yarn_edge.serve.worker import Worker

KEY_VARIABLE = "YARN_EDGE_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LINGER_S = 1.0  # that threads have to end after the server has stopped
SWITCH_S = 0.0005  # that the model's thread waits for those that talk to clients; Python's default is 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="GGUF file")
    parallel = (
        "answers that may run at once, sharing the context (default: 4, fewer with a small context or linear attention)"
    )
    host = "address to listen on; others than 127.0.0.1 need --api-key (default: 127.0.0.1)"
    for flag, metavar, kind, default, text in (
        ("--host", "ADDRESS", str, "127.0.0.1", host),
        ("--port", "N", count(0, 65535), 8080, "port to listen on; 0 takes any free one (default: %(default)s)"),
        ("--api-key", "KEY", str, None, f"key that requests must send (default: ${KEY_VARIABLE}, if it is set)"),
        ("--ctx", "N", length, None, "context size in tokens (default: the model's, or what fits in memory)"),
        ("--max-request", "SIZE", memory_size, 16 << 20, "maximum request size in bytes (default: 16MiB)"),
        ("--parallel", "N", count(1, MAX_PARALLEL), None, parallel),
        ("--name", "NAME", str, None, "name of the model for clients (default: the file's name without .gguf)"),
    ):
        parser.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)
    add_kv_flags(parser, "the KV cache", None)
    add_threads_flag(parser)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge serve`, until Ctrl-C or SIGTERM."""
    try:
        from yarn_edge.serve.answering import Served
        from yarn_edge.serve.app import make_app
        from yarn_edge.serve.bodies import Bodies
        from yarn_edge.serve.connections import HttpServer
        from yarn_edge.serve.guard import Access
        from yarn_edge.serve.prompts import Prompts
        from yarn_edge.serve.vectors import VectorLane
        from yarn_edge.serve.worker import Worker
    except ImportError as error:
        raise YarnEdgeError("serving needs Starlette and uvicorn: pip install 'yarn-edge[serve]'") from error
    from yarn_edge.engine.embeddings import Embedder
    from yarn_edge.engine.opened import opened
    from yarn_edge.engine.sampling import Sampling
    from yarn_edge.memory.placement import Wanted
    from yarn_edge.runtime.kv_cache import requested_kv_type

    key = api_key(args.api_key, os.environ.get(KEY_VARIABLE))
    loopback = is_loopback(args.host)
    if not loopback and key is None:
        raise YarnEdgeError(
            f"--host {args.host} needs --api-key (or ${KEY_VARIABLE}): others can reach the model at that address"
        )
    kv_type = requested_kv_type(args.kv_type, args.kv_k, args.kv_v)
    asked = (args.backend, args.ctx, kv_type, args.memory, args.threads, args.attention)
    wanted = Wanted(*asked, split=split_request(args))
    settings = replace(engine_settings(args), parallel=args.parallel)
    with ExitStack() as held:
        listener = held.enter_context(closing(listening(args.host, args.port)))
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        generation = held.enter_context(opened(args.model, wanted, settings))
        model = generation.context.model
        lanes = _lanes(model, held)
        worker = Worker(generation)
        access = Access(key, (*LOOPBACK, shown) if loopback else None)
        prompts, bodies = Prompts(model, worker.n_ctx, lanes), Bodies(args.max_request)
        created = int(args.model.stat().st_mtime)
        embedder = held.enter_context(closing(Embedder(model, generation.context.settings, worker.n_ctx)))
        vectors = VectorLane(embedder)
        served = Served(worker, prompts, vectors, bodies, args.name or args.model.stem, created, Sampling(), access)

        def stop() -> None:
            worker.shut_down()
            for lane in (*lanes, vectors):
                lane.shut_down()

        server = HttpServer(make_app(served), stop)
        note(
            f"http://{shown}:{port}/ is the page, http://{shown}:{port}/v1 the OpenAI interface; Ctrl-C stops the server"
        )
        held.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_S)
        with suppress(KeyboardInterrupt, Terminated):  # the usual way to stop a server
            server.run(sockets=[listener])
        _wait_for(worker, *lanes, vectors)
    note("the server has stopped")
    return 0


def _wait_for(*workers: Worker | TextLane | VectorLane) -> None:
    """Wait until nothing uses the model any more. If a call into C does not end, neither waits the user: the process ends here."""
    deadline = time.monotonic() + LINGER_S
    while not all(worker.idle for worker in workers):
        if time.monotonic() > deadline:
            note("the server has stopped")
            os._exit(0)
        time.sleep(0.01)


def api_key(given: str | None, variable: str | None) -> str | None:
    """The key from the flag or the variable, None if there is neither. Raises YarnEdgeError for one that no client could send."""
    origin, key = ("--api-key", given) if given is not None else (f"${KEY_VARIABLE}", variable)
    if key is None:
        return None
    if not key:
        raise YarnEdgeError(f"{origin} is empty: give it a key, or leave it out")
    if not all("!" <= character <= "~" for character in key):
        raise YarnEdgeError(
            f"{origin} has a space, a line break or a character that is not ASCII: a header cannot carry it"
        )
    return key


def _lanes(model: Model, held: ExitStack) -> tuple[TextLane, TextLane]:
    from yarn_edge.chat.template import ChatTemplate
    from yarn_edge.serve.lanes import TextLane

    if model.chat_template is None:
        note("the model has no chat template: only /v1/completions works")
        return TextLane(None), TextLane(None)
    origin, remedy = "the model's chat template", "use /v1/completions to do without it"
    renderer = held.enter_context(ChatTemplate.of(model, origin=origin, remedy=remedy))
    return TextLane(renderer), TextLane(held.enter_context(renderer.another()))
