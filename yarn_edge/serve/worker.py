"""The one model behind the server. Requests wait in a queue; each is answered in the model's thread, and stopped if its client leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Literal

from yarn_edge.chat.reasoning import Kind, opened_by, split
from yarn_edge.engine.generation import AnswerStats, Generation
from yarn_edge.engine.sampling import Sampling
from yarn_edge.serve.refusals import BusyError, StoppingError

Ended = Literal["stop", "length"]
_AHEAD = 64  # pieces that may wait for a slow client before the model waits, too
_STOP_S = 0.2


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer, or (kind end) how and why it ended. cached: prompt tokens that the same client had evaluated; None for a
    client without a cache key.
    """

    kind: Literal["answer", "reasoning", "end"]
    text: str = ""
    ended: Ended = "stop"
    stats: AnswerStats | None = None
    cached: int | None = None


@dataclass(frozen=True)
class Asked:
    """What the model is to do. reasons: whether reasoning is separated from the answer; cache_key: the client's name for its
    part of the cache, "" for none.
    """

    tokens: Sequence[int]
    sampling: Sampling
    max_tokens: int | None
    stops: Sequence[str]
    reasons: bool
    cache_key: str = ""


class Worker:
    """A generation that many clients share. max_waiting: requests that may wait for it."""

    def __init__(self, generation: Generation, max_waiting: int = 64) -> None:
        self.generation, self.max_waiting = generation, max_waiting
        self.model, self.n_ctx = generation.context.model, generation.context.n_ctx
        self.waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._turn = asyncio.Lock()  # first come, first served
        self._running: Future[None] | None = None
        self._last_key = ""  # whose tokens the cache holds
        self._stopped = False
        self._ending: asyncio.Future[None] | None = None
        self._told: asyncio.Future[None] | None = None

    @property
    def stopping(self) -> asyncio.Future[None]:
        """Done when the server stops."""
        if self._told is None:
            self._told = asyncio.get_running_loop().create_future()
        return self._told

    def check_room(self) -> None:
        """Raise BusyError if too many requests are waiting."""
        if self.waiting >= self.max_waiting:
            raise BusyError(f"{self.max_waiting} requests are already waiting: try again later")

    async def answer(self, asked: Asked) -> AsyncGenerator[AnswerPiece, None]:
        """Yield pieces as they are generated, at last one of kind end. Leaving the iteration stops the answer.

        Raises StoppingError when the server stops.
        """
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        if self._stopped:
            self._turn.release()
            raise StoppingError
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[AnswerPiece | BaseException] = asyncio.Queue()
        room = threading.Semaphore(_AHEAD)
        left = threading.Event()

        done = loop.create_future()
        done.add_done_callback(lambda _done: self._turn.release())  # the next one begins when this thread is done

        def work() -> None:
            try:
                for piece in self._pieces(asked):
                    while not room.acquire(timeout=_STOP_S):
                        if left.is_set():
                            return
                    _tell(loop, pieces.put_nowait, piece)
                self.generation.keep_on_disk()
            except BaseException as error:  # whatever it is, the client must learn of it, not this thread
                _tell(loop, pieces.put_nowait, error)
            finally:
                _tell(loop, done.set_result, None)

        self._running = self._thread.submit(work)
        ended = False
        try:
            while not ended:
                item = await pieces.get()
                room.release()
                if isinstance(item, BaseException):
                    ended = True
                    raise item if isinstance(item, Exception) else StoppingError
                ended = item.kind == "end"
                yield item
        finally:
            left.set()
            if not ended:
                self._ending = asyncio.ensure_future(self._stop(done))

    async def _stop(self, done: asyncio.Future[None]) -> None:
        """Stop the thread. It takes several tries if the thread has not started yet."""
        while not done.done():
            self.generation.stop()
            await asyncio.sleep(_STOP_S)

    def _pieces(self, asked: Asked) -> Iterator[AnswerPiece]:
        stopped = [False]
        own = bool(asked.cache_key) and asked.cache_key == self._last_key
        self._last_key = (
            ""  # until the prompt is evaluated, the cache holds only what it shares with that of somebody else
        )
        with closing(self.generation.generate(asked.tokens, asked.sampling, asked.max_tokens)) as said:
            text = until(said, asked.stops, lambda: stopped.__setitem__(0, True)) if asked.stops else said
            parts: Iterator[tuple[Kind, str]] = (
                split(text, lambda: opened_by(self.model, asked.tokens))
                if asked.reasons
                else (("answer", t) for t in text)
            )
            for kind, piece in parts:
                self._last_key = asked.cache_key
                yield AnswerPiece(kind, piece)
        self._last_key = asked.cache_key
        stats = self.generation.stats
        full = stats is not None and stats.finish_reason in ("length", "context") and not stopped[0]
        reused = stats.prompt_tokens_reused if stats is not None and own else 0
        cached = reused if asked.cache_key else None
        yield AnswerPiece("end", ended="length" if full else "stop", stats=stats, cached=cached)

    def shut_down(self) -> None:
        """Called in the loop: begin nothing more, and stop the answer that runs."""
        self._stopped = True
        if not self.stopping.done():
            self.stopping.set_result(None)
        self._thread.shutdown(wait=False)
        self.generation.stop()

    @property
    def idle(self) -> bool:
        """Whether nothing runs; after `shut_down` that is final once no request is left."""
        return self._running is None or self._running.done()


def _tell(loop: asyncio.AbstractEventLoop, tell: Callable[..., object], what: object) -> None:
    """Call a function in the loop, if there is still one."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(tell, what)


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
        keep = max((_beginning(held, stop) for stop in stops), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def _beginning(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
