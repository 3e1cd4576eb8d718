"""`yarn-edge serve MODEL`: an OpenAI-compatible server for one model, and a page to chat in the browser.

It listens on 127.0.0.1; another address must be given with --host, and needs an API key. The web framework is that of
llama_cpp.server (`pip install 'yarn-edge[serve]'`). The model is run by `yarn_edge.engine.opened` and `yarn_edge.serve.worker`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yarn_edge.engine.flags import add_engine_flags, engine_settings
from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import add_threads_flag, count, length, memory_size
from yarn_edge.progress import note

if TYPE_CHECKING:
    from yarn_edge.chat.template import Renderer
    from yarn_edge.runtime.model import Model
    from yarn_edge.serve.worker import Worker

KEY_VARIABLE = "YARN_EDGE_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
GRACE_S = 5  # that streams have to end when the server is stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="GGUF file")
    host = "address to listen on; others than 127.0.0.1 need --api-key (default: 127.0.0.1)"
    for flag, metavar, kind, default, text in (
        ("--host", "ADDRESS", str, "127.0.0.1", host),
        ("--port", "N", count(0, 65535), 8080, "port to listen on; 0 takes any free one (default: %(default)s)"),
        ("--api-key", "KEY", str, None, f"key that requests must send (default: ${KEY_VARIABLE}, if it is set)"),
        ("--ctx", "N", length, None, "context size in tokens (default: the model's, or what fits in memory)"),
        ("--kv-type", "TYPE", str, None, "type of the KV cache (default: f16, or q8_0 if f16 does not fit)"),
        ("--max-request", "SIZE", memory_size, 16 << 20, "maximum request size in bytes (default: 16MiB)"),
        ("--name", "NAME", str, None, "name of the model for clients (default: the file's name)"),
    ):
        parser.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)
    add_threads_flag(parser)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge serve`, until Ctrl-C or SIGTERM."""
    try:
        import uvicorn

        from yarn_edge.serve.answers import Served
        from yarn_edge.serve.app import make_app
        from yarn_edge.serve.guard import Access
        from yarn_edge.serve.worker import Worker
    except ImportError as error:
        raise YarnEdgeError("serving needs FastAPI and uvicorn: pip install 'yarn-edge[serve]'") from error
    from yarn_edge.engine.opened import opened
    from yarn_edge.engine.sampling import Sampling
    from yarn_edge.memory.placement import Wanted

    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    loopback = is_loopback(args.host)
    if not loopback and key is None:
        raise YarnEdgeError(
            f"--host {args.host} needs --api-key (or ${KEY_VARIABLE}): others can reach the model at that address"
        )
    wanted = Wanted(args.backend, args.ctx, args.kv_type, args.memory, args.threads, args.flash_attention)
    with ExitStack() as held:
        listener = held.enter_context(closing(listening(args.host, args.port)))
        generation = held.enter_context(opened(args.model, wanted, engine_settings(args)))
        renderer = _renderer(generation.context.model)
        if renderer is not None:
            held.enter_context(closing(renderer))
        worker = Worker(generation, renderer)
        access = Access(key, LOOPBACK if loopback else None, args.max_request)
        created = int(args.model.stat().st_mtime)
        served = Served(worker, args.name or args.model.stem, created, Sampling(), access)
        config = uvicorn.Config(
            make_app(served),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
            date_header=False,
            h11_max_incomplete_event_size=64 << 10,
        )
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        note(
            f"http://{shown}:{port}/ is the page, http://{shown}:{port}/v1 the OpenAI interface; Ctrl-C stops the server"
        )
        with suppress(KeyboardInterrupt, Terminated):  # the usual way to stop a server
            _server(config, worker).run(sockets=[listener])
    note("the server has stopped")
    return 0


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """A socket on this address only. Raises YarnEdgeError if it is in use or is not this machine's."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _kind, _protocol, _name, address = addresses[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise YarnEdgeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _renderer(model: Model) -> Renderer | None:
    from yarn_edge.chat.template import ChatTemplate

    if model.chat_template is None:
        note("the model has no chat template: only /v1/completions works")
        return None
    return ChatTemplate.of(model, origin="the model's chat template", remedy="use /v1/completions to do without it")


def _server(config: Any, worker: Worker) -> Any:
    """uvicorn's server, which also stops the running answer when it is told to exit."""
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            worker.shut_down()
            super().handle_exit(sig, frame)

    return Server(config)
