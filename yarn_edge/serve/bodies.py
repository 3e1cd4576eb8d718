"""Bodies of requests, read under limits: their type, their size, and the memory that all of them take together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from yarn_edge.serve.fields import brief, is_json
from yarn_edge.serve.refusals import BusyError, ClientLeftError, NotJsonError, TooLargeError

AT_ONCE = 8  # bodies of the largest size that may be held at the same time


class Bodies:
    """The bodies that are held. max_bytes: of one of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held_bytes = max_bytes, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body; its bytes count as held until the context ends. Raises RequestError."""
        kind = request.headers.get("content-type", "")
        if not is_json(kind):
            what = f"is {brief(kind)}" if kind else "is missing"
            raise NotJsonError(f"the header Content-Type {what}, but must be application/json")
        if int(request.headers.get("content-length", "0")) > self.max_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        try:
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
                size += len(parts[-1])
                self.held_bytes += len(parts[-1])
                if size > self.max_bytes:
                    raise self._too_large()
                if self.held_bytes > AT_ONCE * self.max_bytes:
                    raise BusyError("other requests take all the memory that is for requests: try again later")
            whole = b"".join(parts)
            parts.clear()
            yield whole
        finally:
            self.held_bytes -= size

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the request is larger than {self.max_bytes} bytes")
