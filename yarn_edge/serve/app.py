"""The server's routes: the OpenAI interface (chat, completions, models), /tokenize, /health, and the built-in page."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

from yarn_edge import __version__
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.answers import CHAT, TEXT, Served, answered
from yarn_edge.serve.fields import brief, complaint, is_json
from yarn_edge.serve.guard import HEADERS, Guard, error_response
from yarn_edge.serve.requests import ChatRequest, CompletionRequest, TokenizeRequest
from yarn_edge.serve.worker import TooLongError

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}


def make_app(served: Served) -> FastAPI:
    """The application. Its worker belongs to it."""
    app = FastAPI(title="yarn-edge", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _add_refusals(app, served)

    @app.middleware("http")
    async def safe_headers(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await go_on(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    _add_facts(app, served)
    _add_answers(app, served)
    for path, file in PAGE_FILES.items():
        app.add_api_route(path, _page_file(file), methods=["GET"], include_in_schema=False)
    app.add_middleware(Guard, access=served.access, open_paths=frozenset({*PAGE_FILES, "/health"}))
    return app


def _add_refusals(app: FastAPI, served: Served) -> None:
    """What the code raises, as errors that clients can read."""

    @app.exception_handler(YarnEdgeError)
    async def refused(_request: Request, refusal: YarnEdgeError) -> Response:
        code = "context_length_exceeded" if isinstance(refusal, TooLongError) else None
        return error_response(400, served.told(refusal), code)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, problem: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if not is_json(kind):
            what = f"is {brief(kind)}" if kind else "is missing"
            return error_response(415, f"the header Content-Type {what}, but must be application/json")
        return error_response(400, complaint(problem.errors()))

    @app.exception_handler(HTTPException)
    async def refused_by_framework(_request: Request, problem: HTTPException) -> Response:
        return error_response(problem.status_code, str(problem.detail))


def _add_facts(app: FastAPI, served: Served) -> None:
    """Routes that do not run the model."""
    worker = served.worker

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.waiting}

    about = {"id": served.model, "object": "model", "created": served.created, "owned_by": "yarn-edge"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{**about, "context_length": worker.n_ctx}]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any] | Response:
        if name != served.model:
            return error_response(404, f"the model {brief(name)} does not exist", "model_not_found")
        return {**about, "context_length": worker.n_ctx}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, int]:
        body.check()
        tokens = await asyncio.to_thread(worker.model.tokenize, body.text, add_special=False, parse_special=False)
        return {"tokens": len(tokens), "context": worker.n_ctx}


def _add_answers(app: FastAPI, served: Served) -> None:
    """Routes that run the model."""
    worker = served.worker

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check()
        tokens = await asyncio.to_thread(worker.chat_tokens, body.as_messages())
        return await answered(served, request, body, tokens, body.most_tokens, CHAT)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        body.check()
        tokens = await asyncio.to_thread(worker.text_tokens, body.one_prompt())
        return await answered(served, request, body, tokens, body.max_tokens, TEXT)


def _page_file(name: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return FileResponse(PAGE / name)

    return file
