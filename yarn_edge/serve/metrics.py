"""/metrics in Prometheus' text form: what the engine has to do and has done, and the requests by route and status."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence

from starlette.routing import Match, Route

from yarn_edge.engine.load import EngineLoad
from yarn_edge.serve.guard import AsgiMessage, Receive, Scope, Send

Kind = str  # counter, gauge
# field of EngineLoad -> kind, name, help
_ENGINE: dict[str, tuple[Kind, str, str]] = {
    "parallel": ("gauge", "parallel_limit", "Answers that may be generated at the same time."),
    "running": ("gauge", "requests_running", "Answers that are being generated."),
    "waiting": ("gauge", "requests_waiting", "Requests that wait for the model."),
    "prompt_tokens_evaluated": ("counter", "prompt_tokens_evaluated_total", "Tokens of prompts that were evaluated."),
    "prompt_tokens_shared": ("counter", "prompt_tokens_shared_total", "Tokens of prompts that were in the cache."),
    "prompt_tokens_restored": ("counter", "prompt_tokens_restored_total", "Tokens of prompts that came from the disk."),
    "generated_tokens": ("counter", "generated_tokens_total", "Tokens that were generated."),
    "cells_used": ("gauge", "cache_cells_used", "Cells of the KV cache that are in use."),
    "cells": ("gauge", "cache_cells", "Cells of the KV cache."),
    "requests_total": ("counter", "answers_total", "Answers that were begun."),
    "requests_cancelled": ("counter", "answers_cancelled_total", "Answers that were stopped before their end."),
}
_OTHER = "other"


class HttpCounts:
    """Requests since the server was started."""

    def __init__(self) -> None:
        self.began = time.time()
        self.open = 0
        self.answered: Counter[tuple[str, int]] = Counter()  # by route and status

    def lines(self) -> Iterator[str]:
        """As metrics."""
        yield from _metric("counter", "http_requests_total", "Requests by route and status; 0: the client left.")
        for (route, status), number in sorted(self.answered.items()):
            yield f'yarn_edge_http_requests_total{{route="{route}",status="{status}"}} {number}'
        yield from _metric("gauge", "http_requests_open", "Requests that are being answered.", self.open)
        yield from _metric("gauge", "start_time_seconds", "When the server was started, since 1970.", round(self.began))


class Counted:
    """ASGI middleware that counts requests. routes: their paths are told; all other paths are one."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], counts: HttpCounts, routes: Sequence[Route]
    ) -> None:
        self.app, self.counts, self.routes = app, counts, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def seen(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.counts.open += 1
        try:
            await self.app(scope, receive, seen)
        finally:
            self.counts.open -= 1
            self.counts.answered[self._route(scope), status] += 1

    def _route(self, scope: Scope) -> str:
        return next((route.path for route in self.routes if route.matches(scope)[0] is not Match.NONE), _OTHER)


def metrics_text(load: EngineLoad, counts: HttpCounts, waiting_texts: int) -> str:
    """All metrics. waiting_texts: requests whose text waits to be read."""
    lines: list[str] = []
    for field, (kind, name, text) in _ENGINE.items():
        lines += _metric(kind, name, text, getattr(load, field))
    lines += _metric("gauge", "texts_waiting", "Requests whose text waits to be read.", waiting_texts)
    return "\n".join([*lines, *counts.lines()]) + "\n"


def _metric(kind: Kind, name: str, text: str, value: float | None = None) -> list[str]:
    lines = [f"# HELP yarn_edge_{name} {text}", f"# TYPE yarn_edge_{name} {kind}"]
    return lines if value is None else [*lines, f"yarn_edge_{name} {value}"]
