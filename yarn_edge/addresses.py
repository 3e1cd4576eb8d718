"""Network addresses: HOST:PORT, whether only this machine can reach one, and a socket that listens there."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from yarn_edge.errors import YarnEdgeError

if TYPE_CHECKING:
    import socket

INSECURE_FLAG = "--insecure-network"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_and_port(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises YarnEdgeError; llama.cpp's RPC knows names and IPv4 addresses only."""
    host, colon, port = text.rpartition(":")
    plain = text.isascii() and not any(c.isspace() for c in text)
    if not plain or not colon or not host or ":" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise YarnEdgeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:50052")
    return host, int(port)


def listening(host: str, port: int, family: int = 0) -> socket.socket:
    """A socket on this address only. family: such as AF_INET, 0 for any. Raises YarnEdgeError if it is in use or not this machine's."""
    import socket

    try:
        addresses = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        found, _kind, _protocol, _name, address = addresses[0]
        return socket.create_server(address[:2], family=found, backlog=128)
    except OSError as error:
        raise YarnEdgeError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def check_network(host: str, allowed: bool, flag: str) -> None:
    """Raises YarnEdgeError for an address beyond this machine that was not allowed. flag: what named it."""
    if not is_loopback(host) and not allowed:
        raise YarnEdgeError(
            f"{flag} {host}: llama.cpp's RPC has no password and no encryption, and whoever reaches a worker can read its memory "
            f"and crash it: use 127.0.0.1 and a tunnel (ssh -N -L 50052:127.0.0.1:50052 HOST), or {INSECURE_FLAG} in a network "
            "where you trust everybody"
        )
