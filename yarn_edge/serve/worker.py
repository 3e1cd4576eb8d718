"""The one model behind the server: requests go to the engine's thread, which answers several at once; pieces come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from yarn_edge.chat.reasoning import ReasoningSplitter, opened_by, undecided
from yarn_edge.engine.answer import AnswerRequest, AnswerStats, RunningAnswer
from yarn_edge.engine.chances import TokenChance
from yarn_edge.engine.generation import Generation, check_request
from yarn_edge.engine.load import EngineLoad
from yarn_edge.engine.sampling import Sampling
from yarn_edge.serve.deliveries import Deliveries
from yarn_edge.serve.refusals import BusyError, StoppingError

Ended = Literal["stop", "length"]
_AHEAD = 64  # pieces that may wait for a slow client before its answer waits, too
_PAUSE_S = 0.01  # when there are answers, but all of them wait for their clients


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer, or (kind end) how and why it ended. cached: prompt tokens that the same client had evaluated; None for a
    client without a cache key. tokens: those that the text is made of, if their probabilities were asked for. stopped_by: the stop
    text that ended the answer.
    """

    kind: Literal["answer", "reasoning", "end"]
    text: str = ""
    ended: Ended = "stop"
    stats: AnswerStats | None = None
    cached: int | None = None
    tokens: tuple[TokenChance, ...] = ()
    stopped_by: str | None = None


@dataclass(frozen=True)
class Asked:
    """What the model is to do. reasons: whether reasoning is separated from the answer; cache_key: the client's name for its
    part of the cache, "" for none. top_logprobs: alternatives of each token that are wanted, None for no probabilities.
    visible: control tokens whose text is part of the answer.
    """

    tokens: Sequence[int]
    sampling: Sampling
    max_tokens: int | None
    stops: Sequence[str]
    reasons: bool
    cache_key: str = ""
    top_logprobs: int | None = None
    visible: frozenset[int] = frozenset()


_Arrived = asyncio.Queue[tuple[int, AnswerPiece | BaseException] | None]


class Worker:
    """An engine that many clients share. max_waiting: requests that may wait for it."""

    def __init__(self, generation: Generation, max_waiting: int = 64) -> None:
        self.engine, self.max_waiting = generation.engine, max_waiting
        self.model, self.n_ctx = generation.context.model, generation.engine.n_ctx
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._working = self._stopped = False
        self._told: asyncio.Future[None] | None = None
        self._deliveries: Deliveries | None = None

    @property
    def stopping(self) -> asyncio.Future[None]:
        """Done when the server stops."""
        if self._told is None:
            self._told = asyncio.get_running_loop().create_future()
        return self._told

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self.engine.n_waiting

    def load(self) -> EngineLoad:
        """What the engine does, and has done."""
        return self.engine.load()

    def check_room(self) -> None:
        """Raise BusyError if too many requests are waiting."""
        if self.waiting >= self.max_waiting:
            raise BusyError(f"{self.max_waiting} requests are already waiting: try again later")

    async def answers(
        self, several: Sequence[Asked], silence_s: float
    ) -> AsyncGenerator[tuple[int, AnswerPiece] | None, None]:
        """Yield (number of the answer, piece) as pieces are generated, for each answer at last one of kind end. None: nothing came for
        silence_s to twice as many seconds. Leaving the iteration stops the answers. Raises StoppingError when the server stops.
        """
        for asked in several:
            check_request(asked.tokens, asked.max_tokens, self.n_ctx)
        loop, arrived = asyncio.get_running_loop(), _Arrived()
        self._deliveries = self._deliveries or Deliveries(loop)
        told = [_Told(number, asked, self, self._deliveries, arrived) for number, asked in enumerate(several)]
        watch = _Watch(loop, arrived, silence_s)
        try:
            for one in told:
                self._submit(one.running)
            left = len(told)
            while left:
                item = await arrived.get()
                if item is None:
                    yield None
                    continue
                number, piece = item
                told[number].taken += 1
                watch.heard = True
                if isinstance(piece, BaseException):
                    raise piece if isinstance(piece, Exception) else StoppingError
                left -= piece.kind == "end"
                yield number, piece
        finally:
            watch.end()
            for one in told:
                self.cancel(one.running)

    def _submit(self, running: RunningAnswer) -> None:
        with self._changed:
            if self._stopped:
                raise StoppingError
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model", daemon=True)
                self._thread.start()
            self._working = True
            self.engine.submit(running)
            self._changed.notify()

    def cancel(self, running: RunningAnswer) -> None:
        """End an answer, if it has not ended."""
        if not running.done:
            self.engine.cancel(running)
            with self._changed:
                self._changed.notify()

    def _work(self) -> None:
        """The engine's thread."""
        while True:
            with self._changed:
                while not (self.engine.busy or self._stopped):
                    self._working = False
                    self._changed.wait()
                self._working = True
            if self._stopped:
                self.engine.fail(StoppingError())
                self._working = False
                return
            try:
                if not self.engine.step():
                    self._pause()
                if not self.engine.busy:
                    self.engine.keep_on_disk()
            except KeyboardInterrupt:  # what ran was cancelled
                continue
            except BaseException as error:  # whatever it is, the clients must learn of it, not this thread
                self.engine.fail(error)

    def _pause(self) -> None:
        with self._changed:
            if self.engine.busy and not self._stopped:
                self._changed.wait(_PAUSE_S)

    def shut_down(self) -> None:
        """Called in the loop: begin nothing more, and stop what runs."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if not self.stopping.done():
            self.stopping.set_result(None)
        for running in (*self.engine.running, *self.engine.waiting):
            self.engine.cancel(running)

    @property
    def idle(self) -> bool:
        """Whether nothing runs; after `shut_down` that is final once no request is left."""
        return not self._working


class _Watch:
    """Tells those who read what arrives of a silence. heard: whether there was something since it last looked."""

    def __init__(self, loop: asyncio.AbstractEventLoop, arrived: _Arrived, silence_s: float) -> None:
        self._loop, self._arrived, self._silence_s = loop, arrived, silence_s
        self._look_later()

    def _look_later(self) -> None:
        self.heard = False
        self._timer = self._loop.call_later(self._silence_s, self._look)

    def _look(self) -> None:
        if not self.heard and self._arrived.empty():
            self._arrived.put_nowait(None)
        self._look_later()

    def end(self) -> None:
        """Nobody reads any more."""
        self._timer.cancel()


class _Told:
    """One answer on its way from the engine's thread to the loop."""

    def __init__(self, number: int, asked: Asked, worker: Worker, deliveries: Deliveries, arrived: _Arrived) -> None:
        self.taken = self._given = 0
        self._number, self._deliveries, self._arrived = number, deliveries, arrived
        self._asked, self._model = asked, worker.model
        self._stops = StopTexts(asked.stops)
        self._split: ReasoningSplitter | None = None
        self._tokens: list[TokenChance] = []
        request = AnswerRequest(
            asked.tokens,
            asked.sampling,
            asked.max_tokens,
            visible=asked.visible,
            top_logprobs=asked.top_logprobs,
            key=asked.cache_key,
        )
        self.running = RunningAnswer(request, worker.model, worker.n_ctx, self._said, self._ended)
        self.running.paused = lambda: self._given - self.taken >= _AHEAD

    def _give(self, item: AnswerPiece | BaseException) -> None:
        self._given += 1
        self._deliveries.put(self._arrived, (self._number, item))

    def _said(self, text: str, tokens: tuple[TokenChance, ...]) -> None:
        if self._stops.found is not None:
            return
        self._tokens += tokens
        self._label(self._stops.feed(text))
        if self._stops.stopped:
            self.running.stop()

    def _label(self, text: str, last: bool = False) -> None:
        """Hand on text, as an answer or as reasoning."""
        if self._split is None and (text or last):
            self._split = ReasoningSplitter(
                opened_by(self._model, self._asked.tokens) if self._asked.reasons else None, self._asked.reasons
            )
        if self._split is None:
            return
        for kind, piece in [*self._split.feed(text), *(self._split.end() if last else ())]:
            tokens, self._tokens = tuple(self._tokens), []
            self._give(AnswerPiece(kind, piece, tokens=tokens))

    def _ended(self, error: BaseException | None) -> None:
        if error is not None:
            self._give(error)
            return
        self._label(self._stops.end(), last=True)
        stats = self.running.stats()
        full = stats.finish_reason in ("length", "context") and not self._stops.stopped
        cached = self.running.own if self._asked.cache_key else None
        tokens = tuple(self._tokens)
        ended: Ended = "length" if full else "stop"
        self._give(AnswerPiece("end", "", ended, stats, cached, tokens, self._stops.found))


class StopTexts:
    """The text up to the first of the stop texts; what could be the beginning of one is held back. found: the one that was there."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether one was there."""
        return self.found is not None

    def feed(self, piece: str) -> str:
        """The text that is certain, with one more piece."""
        held = self._held + piece
        places = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if places:
            (at, self.found), self._held = min(places), ""
            return held[:at]
        keep = undecided(held, self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held
