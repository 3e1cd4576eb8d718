"""--rpc and --layers-on: the same for every command that runs a model, and their values as one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from yarn_edge.addresses import INSECURE_FLAG, host_and_port
from yarn_edge.errors import YarnEdgeError

AUTO = "auto"


@dataclass(frozen=True)
class SplitRequest:
    """Where the layers of a model are to go. workers: HOST:PORT of each; False if nothing was asked for.

    layers_on: the number of layers by name of a device, "auto" for what suits their memory. insecure: whether workers may be beyond
    this machine.
    """

    workers: tuple[str, ...] = ()
    layers_on: str = AUTO
    insecure: bool = False

    def __bool__(self) -> bool:
        return bool(self.workers) or self.layers_on != AUTO

    def flags(self) -> tuple[str, ...]:
        """The flags that ask for this."""
        rpc = ("--rpc", ",".join(self.workers)) if self.workers else ()
        layers = () if self.layers_on == AUTO else ("--layers-on", self.layers_on)
        return (*rpc, *layers, *((INSECURE_FLAG,) if self.insecure else ()))


NO_SPLIT = SplitRequest()


def _workers(text: str) -> tuple[str, ...]:
    try:
        for item in text.split(","):
            host_and_port(item)
    except YarnEdgeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return tuple(dict.fromkeys(text.split(",")))


def layer_numbers(text: str) -> dict[str, int]:
    """The number of layers by device, in the order given. Raises YarnEdgeError for anything but NAME=NUMBER,…"""
    numbers: dict[str, int] = {}
    for item in text.split(","):
        name, equals, number = item.rpartition("=")
        if not equals or not name or not number.isdecimal() or len(number) > 6:
            raise YarnEdgeError(f"{item!r} is not DEVICE=NUMBER, such as cpu=10 or vulkan0=20")
        if name.lower() in numbers:
            raise YarnEdgeError(f"{name} appears twice")
        numbers[name.lower()] = int(number)
    return numbers


def _layers(text: str) -> str:
    if text != AUTO:
        try:
            layer_numbers(text)
        except YarnEdgeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_split_flags(parser: argparse.ArgumentParser) -> None:
    """Add --rpc, --layers-on and --insecure-network."""
    add = parser.add_argument
    add(
        "--rpc",
        type=_workers,
        default=(),
        metavar="HOST:PORT,…",
        help="also use the devices of these workers (yarn-edge worker): they become rpc0, rpc1, …",
    )
    add(
        "--layers-on",
        type=_layers,
        default=AUTO,
        metavar="DEVICE=N,…|auto",
        help="how many layers go on which device, such as cpu=10,rpc0=20; the remaining ones go on the CPU (default: auto, with --rpc: "
        "GPUs of this machine first, then the workers by their memory, then the CPU)",
    )
    add(
        INSECURE_FLAG,
        action="store_true",
        help="allow workers beyond this machine: RPC has no password and no encryption",
    )


def split_request(args: argparse.Namespace) -> SplitRequest:
    """The values of `add_split_flags`. Raises YarnEdgeError if they contradict each other."""
    request = SplitRequest(args.rpc, args.layers_on, args.insecure_network)
    if request.insecure and not request.workers:
        raise YarnEdgeError(f"{INSECURE_FLAG} is about workers: it needs --rpc")
    return request
