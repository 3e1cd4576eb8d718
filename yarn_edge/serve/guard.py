"""What protects the server: who may ask, from which page, with which key.

No response carries CORS headers, so pages of other origins cannot read it. On a loopback address only requests that name that
address are answered: a foreign page cannot reach the server through a host name of its own. With an API key, only the built-in
page's own files and /health are open to those who do not have it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from yarn_edge.serve.refusals import error_response, form_of

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_SAFE = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
# Headers that decide who may ask and where a request ends. Programs differ on which of two counts.
_ONCE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-length", b"content-type", b"transfer-encoding")
_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may ask. api_key: None for everybody; hosts: names that requests may use for this server, None for any."""

    api_key: str | None = None
    hosts: tuple[str, ...] | None = None


class Guard:
    """ASGI middleware, the first to see a request. open_paths: paths that need no key."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], access: Access, open_paths: frozenset[str]
    ) -> None:
        self.app, self.access, self.open_paths = app, access, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on. Every response gets HEADERS."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def safe(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_SAFE]
            await send(message)

        await (self._refusal(scope["path"], scope["headers"]) or self.app)(scope, receive, safe)

    def _refusal(self, path: str, given: Sequence[tuple[bytes, bytes]]) -> JSONResponse | None:
        form, headers = form_of(path), dict[bytes, bytes]()
        for name, value in given:
            if name in _ONCE and name in headers:
                return error_response(400, f"the header {name.decode()} is there twice", None, form)
            headers[name] = value
        if b"content-length" in headers and b"transfer-encoding" in headers:
            return error_response(400, "the request has both content-length and transfer-encoding", None, form)
        if not self._is_meant(headers.get(b"host", b""), headers.get(b"origin")):
            return error_response(403, "this server does not answer to that host or origin", "forbidden", form)
        if not self._knows_key(path, headers):
            return error_response(401, "the API key is missing or wrong", "invalid_api_key", form)
        return None

    def _is_meant(self, host: bytes, origin: bytes | None) -> bool:
        """Whether the request names this server; a foreign page does not, whatever its name resolves to."""
        if origin is not None and origin not in (b"http://" + host, b"https://" + host):
            return False
        if self.access.hosts is None:
            return True
        named = _HOST.fullmatch(host)
        return named is not None and named[1].decode().lower() in self.access.hosts

    def _knows_key(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the key came in a header: OpenAI's clients use one, Anthropic's another."""
        key = self.access.api_key
        if key is None or path in self.open_paths:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        bearer = given.strip() if kind.lower() == b"bearer" else b""
        sent = (bearer, headers.get(b"x-api-key", b"").strip())
        return any([secrets.compare_digest(one, key.encode()) for one in sent])  # noqa: C419  always both comparisons
