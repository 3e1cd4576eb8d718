"""What protects the server: who may ask, from which page, with which key, and how large a request may be.

No response carries CORS headers, so pages of other origins cannot read it. On a loopback address only requests that name that
address are answered: a foreign page cannot reach the server through a host name of its own. With an API key, only the built-in
page's own files and /health are open to those who do not have it.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from yarn_edge.errors import one_line

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may ask. api_key: None for everybody; hosts: names that requests may use for this server, None for any."""

    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    max_request_bytes: int = 16 << 20


def error_response(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": one_line(message, 2000), "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status)


class Guard:
    """ASGI middleware, the first to see a request. open_paths: paths that need no key."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], access: Access, open_paths: frozenset[str]
    ) -> None:
        self.app, self.access, self.open_paths = app, access, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        seen, began = 0, False

        async def limited() -> AsgiMessage:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.access.max_request_bytes:
                raise _TooLarge
            return message

        async def noted(message: AsgiMessage) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self.app(scope, limited, noted)
        except _TooLarge:
            if not began:
                await self._too_large()(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if not self._is_meant(headers.get(b"host", b""), headers.get(b"origin")):
            return error_response(403, "this server does not answer to that host or origin", "forbidden")
        if not self._knows_key(path, headers.get(b"authorization", b"")):
            return error_response(401, "the API key is missing or wrong", "invalid_api_key")
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.access.max_request_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        limit = self.access.max_request_bytes
        return error_response(413, f"the request is larger than {limit} bytes", "request_too_large")

    def _is_meant(self, host: bytes, origin: bytes | None) -> bool:
        """Whether the request names this server; a foreign page does not, whatever its name resolves to."""
        if origin is not None and origin.partition(b"://")[2] != host:
            return False
        name = host.decode("latin-1").lower()
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.rpartition(":")[0] or name
        return self.access.hosts is None or name in self.access.hosts

    def _knows_key(self, path: str, authorization: bytes) -> bool:
        key = self.access.api_key
        if key is None or path in self.open_paths:
            return True
        kind, _, given = authorization.partition(b" ")
        return kind.lower() == b"bearer" and secrets.compare_digest(given.strip(), key.encode())


class _TooLarge(Exception):
    pass
