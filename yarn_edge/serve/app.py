"""The server's routes: the OpenAI interface (chat, completions, models), /tokenize, /health, and the built-in page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.answers import CHAT, TEXT, AnswerForm, Served, answered
from yarn_edge.serve.fields import brief
from yarn_edge.serve.guard import Guard
from yarn_edge.serve.leaving import unless_left
from yarn_edge.serve.refusals import error_response
from yarn_edge.serve.requests import ChatRequest, CompletionRequest
from yarn_edge.serve.worker import Asked

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(served: Served) -> Starlette:
    """The application. Its worker and lanes belong to it."""

    async def refused(_request: Request, problem: Exception) -> Response:
        return served.refused(problem)

    async def refused_by_framework(_request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        return error_response(problem.status_code, problem.detail)

    open_paths = frozenset({*PAGE_FILES, "/health"})
    return Starlette(
        routes=[
            *_facts(served),
            Route("/v1/chat/completions", _answering(served, served.prompts.chat, CHAT), methods=["POST"]),
            Route("/v1/completions", _answering(served, served.prompts.completion, TEXT), methods=["POST"]),
            *(Route(path, _page_file(file)) for path, file in PAGE_FILES.items()),
        ],
        middleware=[Middleware(Guard, access=served.access, open_paths=open_paths)],
        exception_handlers={YarnEdgeError: refused, HTTPException: refused_by_framework},
    )


def _facts(served: Served) -> list[Route]:
    """Routes that do not run the model."""
    worker, prompts = served.worker, served.prompts
    about = {"id": served.model, "object": "model", "created": served.created, "owned_by": "yarn-edge"}
    listed = {**about, "context_length": worker.n_ctx}

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": worker.waiting + sum(lane.waiting for lane in prompts.lanes)})

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [listed]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != served.model:
            return error_response(404, f"the model {brief(name)} does not exist", "model_not_found")
        return JSONResponse(listed)

    async def tokenize(request: Request) -> Response:
        counted = await _of_body(served, request, prompts.count)
        return JSONResponse({"tokens": counted, "context": worker.n_ctx})

    return [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/tokenize", tokenize, methods=["POST"]),
    ]


def _answering(
    served: Served,
    prompt: Callable[[bytes], Awaitable[tuple[ChatRequest | CompletionRequest, list[int]]]],
    form: AnswerForm,
) -> Endpoint:
    """A route that runs the model."""

    async def answer(request: Request) -> Response:
        served.worker.check_room()
        body, tokens = await _of_body(served, request, prompt)
        asked = Asked(tokens, body.sampling(served.usual), body.most_tokens, body.stops(), form.reasons, body.cache_key)
        return await answered(served, request.receive, body, asked, form)

    return answer


async def _of_body(served: Served, request: Request, work: Callable[[bytes], Awaitable[T]]) -> T:
    """What `work` makes of the request's body, which is freed then."""
    async with served.bodies.read(request) as body:
        return await unless_left(request.receive, work(body), served.worker.stopping)


def _page_file(name: str) -> Endpoint:
    async def file(_request: Request) -> Response:
        return FileResponse(PAGE / name)

    return file
