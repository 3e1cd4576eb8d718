"""`yarn-edge serve MODEL`: an OpenAI-compatible server for one model, and a page to chat in the browser.

127.0.0.1 alone unless another address is asked for, and then only with a key. The web framework is the one of llama_cpp.server
(`pip install 'yarn-edge[serve]'`); the model behind it is ours: `yarn_edge.engine.opened`, `yarn_edge.serve.worker`.
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
GRACE_S = 5  # for streams that run when the server is to stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="GGUF file")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1; others need a key)")
    add("--port", type=count(0, 65535), default=8080, metavar="N", help="0: any that is free (default: 8080)")
    add("--api-key", metavar="KEY", help=f"that requests must show (default: ${KEY_VARIABLE}, if that is set)")
    add("--ctx", type=length, metavar="N", help="context in tokens (default: the model's, or what fits)")
    add("--kv-type", metavar="TYPE", help="type of the KV cache (default: f16, q8_0 where that does not fit)")
    add("--max-request", type=memory_size, default=16 << 20, metavar="SIZE", help="of one request (default: 16MiB)")
    add("--name", metavar="NAME", help="of the model for clients (default: the file's)")
    add_threads_flag(parser)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge serve`, until Ctrl-C or SIGTERM."""
    try:
        import uvicorn

        from yarn_edge.serve.app import Served, make_app
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
            f"--host {args.host}: others could use the model there: it needs --api-key (or ${KEY_VARIABLE})"
        )
    wanted = Wanted(args.backend, args.ctx, args.kv_type, args.memory, args.threads, args.flash_attention)
    with ExitStack() as held:
        listener = held.enter_context(closing(listening(args.host, args.port)))
        generation = held.enter_context(opened(args.model, wanted, engine_settings(args)))
        renderer = _renderer(generation.context.model)
        if renderer is not None:
            held.enter_context(closing(renderer))
        worker = Worker(generation, renderer)
        hosts = LOOPBACK if loopback else None
        served = Served(worker, args.name or args.model.stem, Sampling(), key, hosts, args.max_request)
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
        note(f"http://{shown}:{port}/ is the page, http://{shown}:{port}/v1 the OpenAI interface; Ctrl-C ends it")
        with suppress(KeyboardInterrupt, Terminated):  # it is how one ends a server
            _server(config, worker).run(sockets=[listener])
    note("the server has ended")
    return 0


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """A socket on this address and no other. Raises YarnEdgeError where it is taken, or is none of ours."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _kind, _protocol, _name, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise YarnEdgeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _renderer(model: Model) -> Renderer | None:
    from yarn_edge.chat.template import ChatTemplate

    if model.chat_template is None:
        note("the model has no chat template: only /v1/completions can be used")
        return None
    return ChatTemplate.of(model)


def _server(config: Any, worker: Worker) -> Any:
    """uvicorn's server, which ends what runs when it is told to end."""
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            worker.shut_down()
            super().handle_exit(sig, frame)

    return Server(config)
