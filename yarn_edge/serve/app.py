"""The server's routes: OpenAI's and Anthropic's interfaces, /tokenize, /health, /metrics, and the built-in page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.answering import Served, answered
from yarn_edge.serve.fields import brief
from yarn_edge.serve.guard import Guard
from yarn_edge.serve.leaving import unless_left
from yarn_edge.serve.metrics import Counted, HttpCounts, metrics_text
from yarn_edge.serve.openapi import openapi_schema
from yarn_edge.serve.refusals import ANTHROPIC_PATH, anthropic_error, error_response, form_of, openai_error
from yarn_edge.serve.requests import CheckedRequest, TokenizeRequest
from yarn_edge.serve.surfaces.anthropic import CountRequest, MessagesRequest, MessagesWriter
from yarn_edge.serve.surfaces.chat import ChatRequest, ChatWriter
from yarn_edge.serve.surfaces.completions import CompletionRequest, CompletionWriter
from yarn_edge.serve.surfaces.embeddings import EmbeddingsRequest, embeddings_response
from yarn_edge.serve.surfaces.responses import ResponsesRequest
from yarn_edge.serve.surfaces.responses_answers import ResponsesWriter
from yarn_edge.serve.writing import Interface

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
INTERFACES = {
    "/v1/chat/completions": Interface(ChatRequest, ChatWriter, openai_error),
    "/v1/completions": Interface(CompletionRequest, CompletionWriter, openai_error),
    "/v1/responses": Interface(ResponsesRequest, ResponsesWriter, openai_error),
    ANTHROPIC_PATH: Interface(MessagesRequest, MessagesWriter, anthropic_error),
}
OTHER_REQUESTS: dict[str, type[CheckedRequest]] = {
    "/v1/embeddings": EmbeddingsRequest,
    f"{ANTHROPIC_PATH}/count_tokens": CountRequest,
    "/tokenize": TokenizeRequest,
}
T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(served: Served) -> Starlette:
    """The application. Its worker and lanes belong to it."""

    async def refused(request: Request, problem: Exception) -> Response:
        status, body = served.error(problem, form_of(request.url.path))
        return JSONResponse(body, status)

    async def refused_by_framework(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        path, message = request.url.path, problem.detail
        if problem.status_code == 404:
            message = f"there is no {brief(path)}: interfaces begin with /v1 once, and /openapi.json lists everything"
        return error_response(problem.status_code, message, None, form_of(path))

    counts = HttpCounts()
    routes = [
        *_facts(served, counts),
        *_texts(served),
        *(Route(path, _answering(served, form), methods=["POST"]) for path, form in INTERFACES.items()),
        *(Route(path, _page_file(file)) for path, file in PAGE_FILES.items()),
    ]
    open_paths = frozenset({*PAGE_FILES, "/health"})
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Counted, counts=counts, routes=routes),
            Middleware(Guard, access=served.access, open_paths=open_paths),
        ],
        exception_handlers={YarnEdgeError: refused, HTTPException: refused_by_framework},
    )


def _facts(served: Served, counts: HttpCounts) -> list[Route]:
    """Routes that do not read a body."""
    worker, prompts = served.worker, served.prompts
    written = datetime.fromtimestamp(served.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = {"id": served.model, "object": "model", "created": served.created, "owned_by": "yarn-edge"}
    # Anthropic's clients read the second row.
    listed = {
        **about,
        "context_length": worker.n_ctx,
        "type": "model",
        "display_name": served.model,
        "created_at": written,
    }
    schema = openapi_schema({**{path: form.request for path, form in INTERFACES.items()}, **OTHER_REQUESTS}, PAGE_FILES)

    def in_lanes() -> int:
        return sum(lane.waiting for lane in prompts.lanes)

    async def health(_request: Request) -> Response:
        load = worker.load()
        facts = {"waiting": worker.waiting + in_lanes(), "running": load.running, "parallel": load.parallel}
        return JSONResponse({"status": "ok", **facts})

    async def metrics(_request: Request) -> Response:
        text = metrics_text(worker.load(), counts, in_lanes())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(_request: Request) -> Response:
        pages = {"has_more": False, "first_id": served.model, "last_id": served.model}
        return JSONResponse({"object": "list", "data": [listed], **pages})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != served.model:
            return error_response(404, f"the model {brief(name)} does not exist", "model_not_found")
        return JSONResponse(listed)

    async def openapi(_request: Request) -> Response:
        return JSONResponse(schema)

    return [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _texts(served: Served) -> list[Route]:
    """Routes that read a body and do not generate."""
    prompts, usual = served.prompts, served.usual

    async def tokenize(request: Request) -> Response:
        counted = await _of_body(served, request, prompts.count)
        return JSONResponse({"tokens": counted, "context": served.worker.n_ctx})

    async def count_tokens(request: Request) -> Response:
        counted = await _of_body(served, request, lambda body: prompts.counted(body, CountRequest, usual))
        return JSONResponse({"input_tokens": counted})

    async def embedded(body: bytes) -> dict[str, Any]:
        asked, texts = await prompts.embedded(body)
        vectors = await served.vectors.vectors(texts)
        return embeddings_response(served.model, vectors, sum(map(len, texts)), asked.encoding_format)

    async def embeddings(request: Request) -> Response:
        return JSONResponse(await _of_body(served, request, embedded))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route(f"{ANTHROPIC_PATH}/count_tokens", count_tokens, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]


def _answering(served: Served, interface: Interface) -> Endpoint:
    """A route that runs the model."""

    async def answer(request: Request) -> Response:
        served.worker.check_room()
        prepared = await _of_body(
            served, request, lambda body: served.prompts.prepared(body, interface.request, served.usual)
        )
        return await answered(served, request.receive, prepared, interface)

    return answer


async def _of_body(served: Served, request: Request, work: Callable[[bytes], Awaitable[T]]) -> T:
    """What `work` makes of the request's body, which is freed then."""
    async with served.bodies.read(request) as body:
        return await unless_left(request.receive, work(body), served.worker.stopping)


def _page_file(name: str) -> Endpoint:
    async def file(_request: Request) -> Response:
        return FileResponse(PAGE / name)

    return file
