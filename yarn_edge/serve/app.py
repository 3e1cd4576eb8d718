"""The server's routes: the OpenAI interface (chat, completions, models), the built-in page, and what protects them.

Only text/event-stream and JSON go out. Nothing is answered to other origins (no CORS); on a loopback address only to requests that
name one (a page of a stranger cannot reach it by a name of its own); with a key, to nobody without it but the page's own files.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from yarn_edge import __version__
from yarn_edge.engine.generation import AnswerStats
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.serve.requests import ChatRequest, CompletionRequest, Sampled, TokenizeRequest
from yarn_edge.serve.worker import AnswerPiece, TooLongError, Worker

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
PING_S = 5.0  # of silence, after which a stream says that it lives
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Served:
    """What the routes need. model: its name for clients; usual: sampling where a request says nothing."""

    worker: Worker
    model: str
    usual: Sampling
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    max_request_bytes: int = 16 << 20
    max_waiting: int = 64


def error(status: int, message: str, code: str | None = None) -> JSONResponse:
    """As OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": one_line(message, 2000), "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status)


class Guard:
    """The first to see a request: whom it was sent to, from which page, its key and its size."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], served: Served) -> None:
        self.app, self.served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        limit = self.served.max_request_bytes
        too_large = error(413, f"the request is larger than {limit} bytes", "request_too_large")
        declared = headers.get(b"content-length", b"0")
        if not self._is_meant(headers.get(b"host", b""), headers.get(b"origin")):
            await error(403, "this server does not answer to that host or origin", "forbidden")(scope, receive, send)
        elif not self._knows_key(scope["path"], headers.get(b"authorization", b"")):
            await error(401, "the API key is missing or wrong", "invalid_api_key")(scope, receive, send)
        elif not declared.isdigit() or int(declared) > limit:
            await too_large(scope, receive, send)
        else:
            seen, began = 0, False

            async def limited() -> MutableMapping[str, Any]:
                nonlocal seen
                message = await receive()
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise _TooLarge
                return message

            async def told(message: MutableMapping[str, Any]) -> None:
                nonlocal began
                began = True
                await send(message)

            try:
                await self.app(scope, limited, told)
            except _TooLarge:
                if not began:
                    await too_large(scope, receive, send)

    def _is_meant(self, host: bytes, origin: bytes | None) -> bool:
        """A page of a stranger, whatever its name resolves to, is not to ask this server."""
        if origin is not None and origin.partition(b"://")[2] != host:
            return False
        name = host.decode("latin-1").lower()
        name = name.partition("]")[0] + "]" if name.startswith("[") else name.rpartition(":")[0] or name
        return self.served.hosts is None or name in self.served.hosts

    def _knows_key(self, path: str, authorization: bytes) -> bool:
        key = self.served.api_key
        if key is None or path.removeprefix("/") in PAGE_FILES or path == "/health":
            return True
        kind, _, given = authorization.partition(b" ")
        return kind.lower() == b"bearer" and secrets.compare_digest(given.strip(), key.encode())


class _TooLarge(Exception):
    pass


def make_app(served: Served) -> FastAPI:
    """The application. Its worker belongs to it."""
    app = FastAPI(title="yarn-edge", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    worker = served.worker

    @app.exception_handler(YarnEdgeError)
    async def refused(_request: Request, refusal: YarnEdgeError) -> Response:
        code = "context_length_exceeded" if isinstance(refusal, TooLongError) else None
        return error(400, str(refusal), code)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return error(400, f"{where}: {first['msg']}" if where else str(first["msg"]))

    @app.exception_handler(HTTPException)
    async def refused_by_framework(_request: Request, problem: HTTPException) -> Response:
        return error(problem.status_code, str(problem.detail))

    @app.middleware("http")
    async def safe_headers(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await go_on(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": served.model, "object": "model", "owned_by": "yarn-edge", "context_length": worker.n_ctx}
        return {"object": "list", "data": [model]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, int]:
        count = await asyncio.to_thread(worker.model.tokenize, body.text, add_special=False, parse_special=False)
        return {"tokens": len(count), "context": worker.n_ctx}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check()
        return await _answered(
            served,
            request,
            body,
            await asyncio.to_thread(worker.chat_tokens, body.as_messages()),
            body.most_tokens,
            CHAT,
        )

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        body.check()
        tokens = await asyncio.to_thread(worker.text_tokens, body.one_prompt())
        return await _answered(served, request, body, tokens, body.max_tokens, TEXT)

    for name, file in PAGE_FILES.items():
        app.add_api_route(f"/{name}", _page_file(file), methods=["GET"], include_in_schema=False)

    app.add_middleware(Guard, served=served)
    return app


def _page_file(name: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return FileResponse(PAGE / name)

    return file


@dataclass(frozen=True)
class Form:
    """What chat and completions have of their own: names of objects, and how a piece of text is told."""

    prefix: str
    whole: str
    chunk: str
    reasons: bool
    choice: Callable[
        [dict[str, str], bool], dict[str, Any]
    ]  # texts by kind, whether it is a chunk -> what a choice says


def _chat_choice(texts: dict[str, str], chunk: bool) -> dict[str, Any]:
    names = {"answer": "content", "reasoning": "reasoning_content"}
    said = {names[kind]: text for kind, text in texts.items() if text or kind == "answer"}
    return {"delta": said} if chunk else {"message": {"role": "assistant", **said}}


CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", True, _chat_choice)
TEXT = Form(
    "cmpl", "text_completion", "text_completion", False, lambda texts, _chunk: {"text": texts.get("answer", "")}
)


async def _answered(
    served: Served, request: Request, body: Sampled, tokens: list[int], max_tokens: int | None, form: Form
) -> Response:
    sampling, stops = body.sampling(served.usual), body.stops()
    if served.worker.waiting >= served.max_waiting:
        return error(503, f"{served.max_waiting} requests wait already: try again later", "overloaded")
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.model}
    pieces = served.worker.answer(tokens, sampling, max_tokens, stops, form.reasons)
    if body.stream:
        events = _events(pieces, {**head, "object": form.chunk}, form, len(tokens), body.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    texts: dict[str, str] = {"answer": ""}
    async with aclosing(pieces):
        async for piece in _while_connected(pieces, request):
            if piece.kind == "end":
                choice = {"index": 0, "finish_reason": piece.ended, "logprobs": None, **form.choice(texts, False)}
                return JSONResponse(
                    {**head, "object": form.whole, "choices": [choice], "usage": usage(len(tokens), piece.stats)}
                )
            texts[piece.kind] = texts.get(piece.kind, "") + piece.text
    return error(499, "the client left")


async def _while_connected(pieces: AsyncIterator[AnswerPiece], request: Request) -> AsyncIterator[AnswerPiece]:
    """The pieces, until the client is gone."""
    following: asyncio.Future[AnswerPiece] = asyncio.ensure_future(anext(pieces))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=1.0)
            if done:
                try:
                    piece = following.result()
                except StopAsyncIteration:
                    return
                yield piece
                following = asyncio.ensure_future(anext(pieces))
            elif await request.is_disconnected():
                return
    finally:
        await _cancelled(following)


async def _events(
    pieces: AsyncGenerator[AnswerPiece, None], head: dict[str, Any], form: Form, n_prompt: int, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's: chunks, the numbers if they were asked for, [DONE]. An error is an event, too."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    following: asyncio.Future[AnswerPiece] = asyncio.ensure_future(anext(pieces))
    try:
        if form is CHAT:
            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        while True:
            done, _ = await asyncio.wait({following}, timeout=PING_S)
            if not done:
                yield ": still here\n\n"
                continue
            piece = following.result()
            if piece.kind == "end":
                empty: dict[str, Any] = {"delta": {}} if form is CHAT else {"text": ""}
                yield event([{"index": 0, **empty, "finish_reason": piece.ended}])
                if with_usage:
                    yield event([], usage=usage(n_prompt, piece.stats))
                yield "data: [DONE]\n\n"
                return
            yield event([{"index": 0, **form.choice({piece.kind: piece.text}, True), "finish_reason": None}])
            following = asyncio.ensure_future(anext(pieces))
    except (YarnEdgeError, ConnectionAbortedError) as problem:
        yield f"data: {error(500, str(problem)).body.decode()}\n\n"  # type: ignore[union-attr]
    finally:
        await _cancelled(following)
        await pieces.aclose()


async def _cancelled(following: asyncio.Future[AnswerPiece]) -> None:
    following.cancel()
    await asyncio.wait({following})


def usage(n_prompt: int, stats: AnswerStats | None) -> dict[str, Any]:
    """Numbers of tokens as OpenAI has them, and ours."""
    if stats is None:
        return {"prompt_tokens": n_prompt, "completion_tokens": 0, "total_tokens": n_prompt}
    cached = stats.prompt_tokens_reused + stats.prompt_tokens_restored
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": n_prompt + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "ttft_s": stats.ttft_s,
        "tok_per_s": stats.tok_per_s,
    }
