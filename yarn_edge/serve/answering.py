"""From a question that is ready to the response, in the form of an interface: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.serve.blocks import AnswerBlocks, AnswerStep, Assembly
from yarn_edge.serve.bodies import Bodies
from yarn_edge.serve.guard import Access, Receive, Scope, Send
from yarn_edge.serve.leaving import unless_left
from yarn_edge.serve.prompts import Prepared, Prompts
from yarn_edge.serve.refusals import MOST_ERROR_CHARS, ClientLeftError, ErrorForm, RequestError
from yarn_edge.serve.vectors import VectorLane
from yarn_edge.serve.worker import Worker
from yarn_edge.serve.writing import Head, Interface, Writer

PING_S = 5.0  # of silence, or up to twice as many, after which a stream says that it is alive


@dataclass(frozen=True)
class Served:
    """What the routes need. model: its name for clients; created: when its file was written, in seconds since 1970; usual: sampling
    for requests that do not set it.
    """

    worker: Worker
    prompts: Prompts
    vectors: VectorLane
    bodies: Bodies
    model: str
    created: int
    usual: Sampling
    access: Access

    def error(self, problem: Exception, form: ErrorForm, status: int = 400) -> tuple[int, dict[str, Any]]:
        """Status and body of an error for clients, without the path of the model's file. status: for errors that do not say theirs."""
        message = one_line(str(problem).replace(str(self.worker.model.path), self.model), MOST_ERROR_CHARS)
        if isinstance(problem, RequestError):
            return form(problem.status, message, problem.code)
        return form(status, message, None)


async def answered(served: Served, receive: Receive, prepared: Prepared, interface: Interface) -> Response:
    """The response to a question. receive: of the request, whose body was read."""
    served.worker.check_room()
    model = served.worker.model
    n_prompt = len(prepared.asked[0].tokens)
    writer = interface.writer(Head(served.model, prepared.request, prepared.question, n_prompt, model.token_bytes))
    answers = [AnswerBlocks(index) for index in range(len(prepared.asked))]
    steps = _steps(served.worker, prepared, answers)
    if prepared.question.stream:
        return EventStream(_events(served, steps, answers, writer, interface.error))
    return await unless_left(receive, _whole(steps, answers, writer), served.worker.stopping)


async def _steps(
    worker: Worker, prepared: Prepared, answers: Sequence[AnswerBlocks]
) -> AsyncGenerator[AnswerStep | None, None]:
    """What happens to the answers, which are generated at the same time. None: nothing did for PING_S."""
    assemblies = [Assembly(answer, prepared.parser and prepared.parser()) for answer in answers]
    async with aclosing(worker.answers(prepared.asked, PING_S)) as arrived:
        async for one in arrived:
            if one is None:
                yield None
                continue
            number, piece = one
            for step in assemblies[number].read(piece):
                yield step


async def _whole(
    steps: AsyncGenerator[AnswerStep | None, None], answers: Sequence[AnswerBlocks], writer: Writer
) -> Response:
    async with aclosing(steps):
        async for _step in steps:
            pass
    return JSONResponse(writer.whole(answers))


class EventStream(Response):
    """Server-sent events, which end when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__()
        self.events = events
        del self.headers["content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        with suppress(ClientLeftError):
            await unless_left(receive, self._sent(send))

    async def _sent(self, send: Send) -> None:
        async with aclosing(self.events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(
    served: Served,
    steps: AsyncGenerator[AnswerStep | None, None],
    answers: Sequence[AnswerBlocks],
    writer: Writer,
    form: ErrorForm,
) -> AsyncGenerator[str, None]:
    """A stream as it is sent. An error is an event, too."""
    try:
        for event in writer.begin(answers):
            yield event.text()
        async with aclosing(steps):
            async for step in steps:
                if step is None:
                    yield writer.ping()
                    continue
                for event in writer.step(step):
                    yield event.text()
        for event in writer.end(answers):
            yield event.text()
    except YarnEdgeError as problem:
        yield writer.failed(served.error(problem, form, 500)[1]).text()
