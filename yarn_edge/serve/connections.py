"""uvicorn with limits: of connections, of the time that a request takes to arrive and a client to read, and of the time to stop."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS, BACKLOG = 512, 64
HEADER_S, BODY_S = 10.0, 120.0  # in which the head of a request and the rest of it must have arrived
READ_S = 30.0  # in which a client must read what was sent
PARSE_S = 2.0  # of processor time for the syntax of one request: a body in chunks of one byte is mostly syntax
MAX_PIPELINED = 64 << 10  # bytes that may follow a request before it is answered
# After the signal: connections are closed, tasks are cancelled, and have ended.
CLOSE_S, CANCEL_S, END_S = 1.5, 2.5, 0.5
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):  # type: ignore[misc]
    """An HTTP connection under these limits. Beyond them it is closed."""

    _arriving: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _in_body = False
    _parse_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Count it, and wait for a request."""
        super().connection_made(transport)
        # asyncio does so only where the protocol of the listening socket is spelled out; without, each answer waits for 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > max_connections():
            transport.write(_FULL)
            transport.close()
            return
        self._arriving = self.loop.call_later(HEADER_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if self._arriving is None:
            self._arriving = self.loop.call_later(HEADER_S, self.transport.abort)
        began = time.thread_time()
        super().data_received(data)
        self._parse_s += time.thread_time() - began
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            if not self._in_body:
                self._arriving.cancel()
                self._arriving = self.loop.call_later(BODY_S, self.transport.abort)
            self._in_body = True
            if self._parse_s > PARSE_S:
                self.transport.abort()
        elif state is not h11.IDLE:
            self._arrived()
            if len(self.conn.trailing_data[0]) > MAX_PIPELINED:
                self.transport.abort()
            else:
                self.flow.resume_reading()  # so that it is noticed when the client leaves

    def send_400_response(self, msg: str) -> None:
        """What arrived is no HTTP. uvicorn would also send what a request in progress answers, and fail."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
        self._arriving, self._in_body, self._parse_s = None, False, 0.0

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or was sent away."""
        super().connection_lost(exc)
        self._arrived()
        if self._unread is not None:
            self._unread.cancel()


def max_connections() -> int:
    """Of this process, whose number of open files may be limited."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_CONNECTIONS
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, limit // 2)


class HttpServer(uvicorn.Server):  # type: ignore[misc]
    """on_stop: called in the event loop when the server is told to stop; it should end what runs."""

    def __init__(self, app: Any, on_stop: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                backlog=BACKLOG,
                log_level="error",  # warnings are about bad requests, of which there may be many
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=CANCEL_S,
                h11_max_incomplete_event_size=64 << 10,
            )
        )
        self.on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what runs, give clients a moment to read the end of it, close the connections."""
        self.on_stop()
        closing = asyncio.get_running_loop().call_later(CLOSE_S, self._close)
        await super().shutdown(sockets)
        closing.cancel()
        self._close()  # a second Ctrl-C does not wait
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=END_S)

    def _close(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
