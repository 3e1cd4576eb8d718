"""`yarn-edge worker`: lend this machine's devices to another one, which puts layers of its model on them (`--rpc`)."""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import threading
from contextlib import closing
from typing import Any

from yarn_edge.addresses import INSECURE_FLAG, check_network, listening
from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import add_backend_flag, add_threads_flag, count, memory_size
from yarn_edge.progress import note

PORT = 50052  # that of llama.cpp's rpc-server
READY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `worker`."""
    add = parser.add_argument
    add(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help=f"address to listen on; others than this machine's own need {INSECURE_FLAG} (default: 127.0.0.1)",
    )
    add(
        "--port",
        metavar="N",
        type=count(0, 65535),
        default=PORT,
        help="port to listen on; 0 takes any free one (default: %(default)s)",
    )
    add(
        "--memory",
        metavar="SIZE",
        type=memory_size,
        help="memory of each device that may be used, such as 16GiB (default: what is free now, minus the smaller of 1 GiB and an "
        "eighth)",
    )
    add(
        INSECURE_FLAG,
        action="store_true",
        help="listen where others can connect: RPC has no password and no encryption",
    )
    add_backend_flag(parser, "which devices to lend (default: all GPUs, or the CPU if there is none)")
    add_threads_flag(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge worker`, until Ctrl-C or SIGTERM."""
    check_network(args.host, args.insecure_network, "--host")
    from yarn_edge.runtime import ggml
    from yarn_edge.runtime.devices import devices_of, missing
    from yarn_edge.runtime.llama_api import physical_threads
    from yarn_edge.runtime.machine import spare_bytes
    from yarn_edge.runtime.rpc import rpc_function
    from yarn_edge.runtime.worker_link import versions
    from yarn_edge.worker.door import Door
    from yarn_edge.worker.limit import limit_device

    start = rpc_function("ggml_backend_rpc_start_server")
    if args.backend is None:
        lent = ggml.gpus() or [ggml.cpu_device()]
    elif not (lent := devices_of(args.backend)):
        raise YarnEdgeError(missing(args.backend))
    with closing(listening(args.host, args.port, socket.AF_INET)) as listener:
        for device in lent:
            if args.memory is not None or device.kind == "cpu":
                limit_device(device, args.memory or spare_bytes())

        def described() -> dict[str, Any]:
            fields = ("name", "kind", "description")
            each = [{n: getattr(d, n) for n in fields} | {"free": ggml.device_memory(d)[0]} for d in lent]
            return {"versions": versions(), "devices": each, "threads": args.threads or physical_threads()}

        handles = (ctypes.c_void_p * len(lent))(*map(ggml.device_handle, lent))
        inside = _start(start, handles, args.threads or physical_threads())
        port = listener.getsockname()[1]
        names = ", ".join(f"{d['name']} with {d['free'] / 2**30:.2f} GiB" for d in described()["devices"])
        note(f"lending {names} at {args.host}:{port}; Ctrl-C stops the worker")
        note(f"on another machine: ssh -N -L {port}:127.0.0.1:{port} THIS-MACHINE, then --rpc 127.0.0.1:{port}")
        try:
            Door(listener, inside, described).serve()
        except (KeyboardInterrupt, Terminated):
            note("the worker has stopped")
    os._exit(0)  # the library's server cannot be stopped


def _start(start: Any, handles: Any, threads: int) -> tuple[str, int]:
    """Start the library's server in a thread. Returns where it listens, on this machine only."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        inside = free.getsockname()[:2]
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # the server prints to stdout
    ended = threading.Event()

    def serve() -> None:
        start(f"{inside[0]}:{inside[1]}".encode(), None, threads, len(handles), handles)
        ended.set()

    threading.Thread(target=serve, daemon=True).start()
    for _ in range(int(READY_S / 0.05)):
        if ended.wait(0.05):
            break
        try:
            with socket.create_connection(inside):
                return str(inside[0]), int(inside[1])
        except OSError:
            continue
    raise YarnEdgeError("llama.cpp's RPC server does not start")
