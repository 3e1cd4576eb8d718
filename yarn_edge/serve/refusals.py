"""Why a request is not answered: errors with a status and a code, and how clients read them."""

from __future__ import annotations

from starlette.responses import JSONResponse

from yarn_edge.errors import YarnEdgeError, one_line


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


def error_response(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": one_line(message, 2000), "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status)
