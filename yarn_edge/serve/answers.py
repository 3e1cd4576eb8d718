"""Answers over HTTP as OpenAI's clients read them: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.bodies import Bodies
from yarn_edge.serve.guard import Access, Receive, Scope, Send
from yarn_edge.serve.leaving import cancelled, unless_left
from yarn_edge.serve.prompts import Prompts
from yarn_edge.serve.refusals import ClientLeftError, RequestError, error_response
from yarn_edge.serve.requests import Sampled
from yarn_edge.serve.worker import AnswerPiece, Asked, Worker

PING_S = 5.0  # of silence, after which a stream says that it is alive


@dataclass(frozen=True)
class Served:
    """What the routes need. model: its name for clients; created: when its file was written, in seconds since 1970; usual: sampling
    for requests that do not set it.
    """

    worker: Worker
    prompts: Prompts
    bodies: Bodies
    model: str
    created: int
    usual: Sampling
    access: Access

    def refused(self, problem: Exception, status: int = 400) -> Response:
        """An error for clients, without the path of the model's file. status: for those that do not say theirs."""
        message = str(problem).replace(str(self.worker.model.path), self.model)
        if isinstance(problem, RequestError):
            return error_response(problem.status, message, problem.code)
        return error_response(status, message)


@dataclass(frozen=True)
class Head:
    """What all parts of a response share. n_prompt: the prompt's length in tokens; wants_usage: whether a stream ends with the counts."""

    model: str
    prefix: str
    n_prompt: int
    wants_usage: bool
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> dict[str, Any]:
        """Those of an object of this kind."""
        return {"id": f"{self.prefix}-{self.number}", "created": self.created, "model": self.model, "object": kind}


@dataclass(frozen=True)
class AnswerForm:
    """How chat and completions differ. prefix: of an answer's id; whole, chunk: names of the objects; reasons: whether reasoning
    is separated from the answer; choice: (texts by kind, whether it is a chunk) -> the fields of a choice; last: those of the
    chunk that ends a stream.
    """

    prefix: str
    whole: str
    chunk: str
    reasons: bool
    choice: Callable[[dict[str, str], bool], dict[str, Any]]
    last: dict[str, Any]


def _chat_choice(texts: dict[str, str], chunk: bool) -> dict[str, Any]:
    names = {"answer": "content", "reasoning": "reasoning_content"}
    said = {names[kind]: text for kind, text in texts.items() if text or kind == "answer"}
    return {"delta": said} if chunk else {"message": {"role": "assistant", **said}}


def _text_choice(texts: dict[str, str], _chunk: bool) -> dict[str, Any]:
    return {"text": texts.get("answer", "")}


CHAT = AnswerForm("chatcmpl", "chat.completion", "chat.completion.chunk", True, _chat_choice, {"delta": {}})
TEXT = AnswerForm("cmpl", "text_completion", "text_completion", False, _text_choice, {"text": ""})


async def answered(served: Served, receive: Receive, body: Sampled, asked: Asked, form: AnswerForm) -> Response:
    """The response to a prompt. receive: of the request, whose body was read."""
    served.worker.check_room()
    head = Head(served.model, form.prefix, len(asked.tokens), body.wants_usage)
    pieces = served.worker.answer(asked)
    if body.stream:
        return EventStream(_events(served, pieces, head, form))
    return await unless_left(receive, _whole(pieces, head, form), served.worker.stopping)


async def _whole(pieces: AsyncGenerator[AnswerPiece, None], head: Head, form: AnswerForm) -> Response:
    texts: dict[str, str] = {"answer": ""}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.kind == "end":
                break
            texts[piece.kind] = texts.get(piece.kind, "") + piece.text
    choice = {"index": 0, "finish_reason": piece.ended, "logprobs": None, **form.choice(texts, False)}
    numbers = usage(head.n_prompt, piece)
    return JSONResponse({**head.fields(form.whole), "choices": [choice], "usage": numbers})


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
    served: Served, pieces: AsyncGenerator[AnswerPiece, None], head: Head, form: AnswerForm
) -> AsyncGenerator[str, None]:
    """Server-sent events like OpenAI's: chunks, the usage if it is wanted, [DONE]. An error is an event, too."""
    same = head.fields(form.chunk)

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**same, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

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
                yield event([{"index": 0, **form.last, "finish_reason": piece.ended}])
                if head.wants_usage:
                    yield event([], usage=usage(head.n_prompt, piece))
                yield "data: [DONE]\n\n"
                return
            yield event([{"index": 0, **form.choice({piece.kind: piece.text}, True), "finish_reason": None}])
            following = asyncio.ensure_future(anext(pieces))
    except YarnEdgeError as problem:
        yield f"data: {bytes(served.refused(problem, 500).body).decode()}\n\n"
    finally:
        await cancelled(following)
        await pieces.aclose()


def usage(n_prompt: int, end: AnswerPiece) -> dict[str, Any]:
    """Token counts under OpenAI's names, and our timings. Cached tokens only as far as the client itself had them evaluated: others
    could find out from them what somebody asked.
    """
    stats = end.stats
    if stats is None:
        return {"prompt_tokens": n_prompt, "completion_tokens": 0, "total_tokens": n_prompt}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": n_prompt + stats.generated_tokens,
        **({} if end.cached is None else {"prompt_tokens_details": {"cached_tokens": end.cached}}),
        "ttft_s": stats.ttft_s,
        "tok_per_s": stats.tok_per_s,
    }
