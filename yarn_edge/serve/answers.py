"""Answers over HTTP as OpenAI's clients read them: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from yarn_edge.engine.generation import AnswerStats
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.guard import Access, error_response
from yarn_edge.serve.requests import Sampled
from yarn_edge.serve.worker import AnswerPiece, Worker

PING_S = 5.0  # of silence, after which a stream says that it is alive


@dataclass(frozen=True)
class Served:
    """What the routes need. model: its name for clients; created: when its file was written, in seconds since 1970; usual: sampling
    for requests that do not set it.
    """

    worker: Worker
    model: str
    created: int
    usual: Sampling
    access: Access
    max_waiting: int = 64

    def told(self, problem: Exception) -> str:
        """An error's message for clients, without the path of the model's file."""
        return str(problem).replace(str(self.worker.model.path), self.model)


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


async def answered(
    served: Served, request: Request, body: Sampled, tokens: list[int], max_tokens: int | None, form: AnswerForm
) -> Response:
    """The response to a prompt. Raises YarnEdgeError for values that are out of range."""
    sampling, stops = body.sampling(served.usual), body.stops()
    if served.worker.waiting >= served.max_waiting:
        return error_response(503, f"{served.max_waiting} requests are already waiting: try again later", "overloaded")
    head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.model}
    pieces = served.worker.answer(tokens, sampling, max_tokens, stops, form.reasons)
    if body.stream:
        head["object"] = form.chunk
        events = _events(served, pieces, head, form, len(tokens) if body.wants_usage else None)
        return StreamingResponse(events, media_type="text/event-stream")
    texts: dict[str, str] = {"answer": ""}
    async with aclosing(pieces):
        async for piece in _while_connected(pieces, request):
            if piece.kind == "end":
                choice = {"index": 0, "finish_reason": piece.ended, "logprobs": None, **form.choice(texts, False)}
                numbers = usage(len(tokens), piece.stats)
                return JSONResponse({**head, "object": form.whole, "choices": [choice], "usage": numbers})
            texts[piece.kind] = texts.get(piece.kind, "") + piece.text
    return error_response(499, "the client left")


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
    served: Served,
    pieces: AsyncGenerator[AnswerPiece, None],
    head: dict[str, Any],
    form: AnswerForm,
    n_prompt: int | None,
) -> AsyncIterator[str]:
    """Server-sent events like OpenAI's: chunks, the usage unless n_prompt is None, [DONE]. An error is an event, too."""

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
                yield event([{"index": 0, **form.last, "finish_reason": piece.ended}])
                if n_prompt is not None:
                    yield event([], usage=usage(n_prompt, piece.stats))
                yield "data: [DONE]\n\n"
                return
            yield event([{"index": 0, **form.choice({piece.kind: piece.text}, True), "finish_reason": None}])
            following = asyncio.ensure_future(anext(pieces))
    except (YarnEdgeError, ConnectionAbortedError) as problem:
        yield f"data: {bytes(error_response(500, served.told(problem)).body).decode()}\n\n"
    finally:
        await _cancelled(following)
        await pieces.aclose()


async def _cancelled(following: asyncio.Future[AnswerPiece]) -> None:
    following.cancel()
    await asyncio.wait({following})


def usage(n_prompt: int, stats: AnswerStats | None) -> dict[str, Any]:
    """Token counts under OpenAI's names, and our timings."""
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
