"""The one model behind the server. Requests wait in a queue; each is answered in a thread, and stopped if its client leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from yarn_edge.chat.reasoning import Kind, opened_by, split
from yarn_edge.chat.template import Message, RawText, Renderer
from yarn_edge.engine.generation import AnswerStats, Generation
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError

Ended = Literal["stop", "length"]
_AHEAD = 64  # pieces that may wait for a slow client before the model waits, too
_STOP_S = 0.2


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer, or (kind end) how and why it ended."""

    kind: Literal["answer", "reasoning", "end"]
    text: str = ""
    ended: Ended = "stop"
    stats: AnswerStats | None = None


class TooLongError(YarnEdgeError):
    """A prompt that does not fit into the context."""


class Worker:
    """A generation that many clients share. renderer: the chat template, None for a base model."""

    def __init__(self, generation: Generation, renderer: Renderer | None) -> None:
        self.generation, self.renderer = generation, renderer
        self.model, self.n_ctx = generation.context.model, generation.context.n_ctx
        self._turn = asyncio.Lock()  # first come, first served
        self._template = threading.Lock()  # the template's process renders one prompt at a time
        self.waiting = 0
        self._stopping: asyncio.Future[None] | None = None

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat. Raises YarnEdgeError if the template refuses the messages, or there is none."""
        if self.renderer is None:
            raise YarnEdgeError("the model has no chat template (a base model?): use /v1/completions")
        with self._template:
            return self._fitting(self.renderer.tokens(self.model, messages))

    def text_tokens(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt that is continued as it is."""
        if isinstance(prompt, str):
            return self._fitting(RawText().tokens(self.model, [{"role": "user", "content": prompt}]))
        if any(not 0 <= token < self.model.n_vocab for token in prompt):
            raise YarnEdgeError(f"prompt: tokens are from 0 to {self.model.n_vocab - 1}")
        return self._fitting(prompt)

    def _fitting(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise YarnEdgeError("the prompt is empty")
        if len(tokens) >= self.n_ctx:
            raise TooLongError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx} with the answer: shorten it, or start the "
                "server with a larger --ctx (yarn-edge fit shows what fits in memory)"
            )
        return tokens

    async def answer(
        self, tokens: Sequence[int], sampling: Sampling, max_tokens: int | None, stops: Sequence[str], reasons: bool
    ) -> AsyncGenerator[AnswerPiece, None]:
        """Yield pieces as they are generated, at last one of kind end. Leaving the iteration stops the answer.

        reasons: whether reasoning is separated from the answer.
        """
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[AnswerPiece | BaseException] = asyncio.Queue()
        room = threading.Semaphore(_AHEAD)
        left = threading.Event()

        def put(item: AnswerPiece | BaseException) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        def work() -> None:
            try:
                for piece in self._pieces(tokens, sampling, max_tokens, stops, reasons):
                    while not room.acquire(timeout=_STOP_S):
                        if left.is_set():
                            return
                    put(piece)
                self.generation.keep_on_disk()
            except BaseException as error:  # whatever it is, the client must learn of it, not this thread
                put(error)

        running = loop.run_in_executor(None, work)
        running.add_done_callback(lambda _done: self._turn.release())  # the next one begins when this thread is done
        ended = False
        try:
            while not ended:
                item = await pieces.get()
                room.release()
                if isinstance(item, BaseException):
                    ended = True
                    raise item if isinstance(item, Exception) else ConnectionAbortedError("the server is shutting down")
                ended = item.kind == "end"
                yield item
        finally:
            left.set()
            if not ended:
                self._stopping = asyncio.ensure_future(self._stop(running))

    async def _stop(self, running: asyncio.Future[None]) -> None:
        """Stop the thread. It takes several tries if the thread has not started yet."""
        while not running.done():
            self.generation.stop()
            await asyncio.sleep(_STOP_S)

    def _pieces(
        self, tokens: Sequence[int], sampling: Sampling, max_tokens: int | None, stops: Sequence[str], reasons: bool
    ) -> Iterator[AnswerPiece]:
        stopped = [False]
        with closing(self.generation.generate(tokens, sampling, max_tokens)) as said:
            text = until(said, stops, lambda: stopped.__setitem__(0, True)) if stops else said
            parts: Iterator[tuple[Kind, str]] = (
                split(text, lambda: opened_by(self.model, tokens)) if reasons else (("answer", t) for t in text)
            )
            for kind, piece in parts:
                yield AnswerPiece(kind, piece)
        stats = self.generation.stats
        full = stats is not None and stats.finish_reason in ("length", "context") and not stopped[0]
        yield AnswerPiece("end", ended="length" if full else "stop", stats=stats)

    def shut_down(self) -> None:
        """Stop the answer that runs."""
        self.generation.stop()


def until(pieces: Iterator[str], stops: Sequence[str], on_stop: Callable[[], None]) -> Iterator[str]:
    """Yield the text up to the first of the stop texts; text that could be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        places = [at for stop in stops if (at := held.find(stop)) >= 0]
        if places:
            on_stop()
            if held[: min(places)]:
                yield held[: min(places)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
