"""Why a request is not answered: errors with a status and a code, and how clients read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from yarn_edge.errors import YarnEdgeError, one_line

ANTHROPIC_PATH = "/v1/messages"
MOST_ERROR_CHARS = 2000


class RequestError(YarnEdgeError):
    """A request that is refused. status: of the response; code: for programs."""

    status: int = 400
    code: str | None = None


class NotJsonError(RequestError):
    """A body that is declared as something else."""

    status = 415


class TooLongError(RequestError):
    """A prompt that does not fit into the context."""

    code = "context_length_exceeded"


class TooLargeError(RequestError):
    """A body over the limit."""

    status, code = 413, "request_too_large"


class BusyError(RequestError):
    """More work than the server accepts at once."""

    status, code = 503, "overloaded"


class StoppingError(RequestError):
    """The server is told to stop."""

    status, code = 503, "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class ClientLeftError(RequestError):
    """Nobody reads the answer."""

    status = 499

    def __init__(self) -> None:
        super().__init__("the client left")


ErrorForm = Callable[[int, str, str | None], tuple[int, dict[str, Any]]]


def openai_error(status: int, message: str, code: str | None) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}
_ANTHROPIC_STATUS = {503: 529}


def anthropic_error(status: int, message: str, _code: str | None) -> tuple[int, dict[str, Any]]:
    """The same as Anthropic's clients read it."""
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error")
    return _ANTHROPIC_STATUS.get(status, status), {"type": "error", "error": {"type": kind, "message": message}}


def form_of(path: str) -> ErrorForm:
    """How the clients of a route read errors."""
    return anthropic_error if path.startswith(ANTHROPIC_PATH) else openai_error


def error_response(status: int, message: str, code: str | None = None, form: ErrorForm = openai_error) -> JSONResponse:
    """An error in the form of an interface."""
    status, body = form(status, one_line(message, MOST_ERROR_CHARS), code)
    return JSONResponse(body, status)
