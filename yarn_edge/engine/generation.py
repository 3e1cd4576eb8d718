"""Generation from tokens to text for one user: the engine's loop, run by whoever wants the text. No messages, no templates."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from yarn_edge.engine.answer import AnswerRequest, AnswerStats, RunningAnswer
from yarn_edge.engine.batching import Engine
from yarn_edge.engine.cached_tokens import CachedTokens
from yarn_edge.engine.prompt_lookup import PromptLookup
from yarn_edge.engine.sampling import Sampling
from yarn_edge.engine.state_cache import StateCache
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar
from yarn_edge.runtime.context import Context

_TIMED = 128  # minimum number of tokens to measure the reading speed on
_FIRST_GUESS_TOK_PER_S = 100.0


class Generation:
    """An engine that one user has to themselves. `stats` describes the last answer; None if there was none.

    states: where evaluated prompts are kept, or None. lookup: the source of drafts, or None.
    """

    def __init__(self, context: Context, states: StateCache | None = None, lookup: PromptLookup | None = None) -> None:
        self.context, self.states, self.lookup = context, states, lookup
        self.engine = Engine(context, states, lookup)
        self.stats: AnswerStats | None = None
        self._prompt_tok_per_s = _FIRST_GUESS_TOK_PER_S
        self._busy = self._stopped = False
        self._answer: RunningAnswer | None = None

    @property
    def cached(self) -> CachedTokens:
        """What the cache holds."""
        return self.engine.pool.sequences[0]

    def stop(self) -> None:
        """Called from another thread: end the running evaluation and generation, which raises KeyboardInterrupt there."""
        self._stopped = True
        if (answer := self._answer) is not None:
            self.engine.cancel(answer)

    def generate(
        self, tokens: Sequence[int], sampling: Sampling, max_tokens: int | None = None, *, canonical: bool = False
    ) -> Generator[str, None, None]:
        """Continue `tokens`, a whole prompt, reusing what the cache holds of it. Yields text in pieces of whole characters.

        canonical: reuse only what equals a fresh evaluation to the bit. Sets `stats` at the end, however it ends. Closing the
        iterator or Ctrl-C (raised again as KeyboardInterrupt) stops it. Raises YarnEdgeError if the prompt is empty or does not
        fit.
        """
        if self._busy:
            raise RuntimeError("this context is generating an answer: close that stream first")
        check_request(tokens, max_tokens, self.context.n_ctx)
        said: deque[str] = deque()
        request = AnswerRequest(tokens, sampling, max_tokens, canonical)
        with self._running(request, lambda text, _tokens: said.append(text)) as answer:
            self._read(answer)
            while True:
                while said:
                    yield said.popleft()
                if answer.done:
                    return
                self._step(answer)

    def preload(self, tokens: Sequence[int]) -> None:
        """Bring the beginning of a prompt into the cache, unless it is there. Raises YarnEdgeError, KeyboardInterrupt."""
        if self.cached.common([*tokens, -1]) < len(tokens):
            stats = self.stats
            try:
                with self._running(
                    AnswerRequest(tokens, Sampling(), only_read=True), lambda _text, _tokens: None
                ) as one:
                    self._read(one)
            finally:
                self.stats = stats

    def keep_on_disk(self) -> None:
        """Save the evaluated prompt, if it is worth a file. Call this when nobody is waiting."""
        self.engine.keep_on_disk()

    @contextmanager
    def _running(self, request: AnswerRequest, say: Callable[..., None]) -> Iterator[RunningAnswer]:
        self._busy, self._stopped = True, False
        answer = self._answer = RunningAnswer(request, self.context.model, self.context.n_ctx, say)
        try:
            self.engine.submit(answer)
            yield answer
        finally:
            self._busy, self._answer = False, None
            self.engine.release(answer)
            self.stats = answer.stats()

    def _step(self, answer: RunningAnswer) -> None:
        if self._stopped:
            raise KeyboardInterrupt
        self.engine.step()
        if answer.error is not None:
            raise answer.error

    def _read(self, answer: RunningAnswer) -> None:
        """Bring the prompt into the cache, with a progress bar if that takes long, and choose the first token."""
        self.engine.admit()
        n_new, began = answer.to_read, time.perf_counter()
        with _maybe_bar(n_new > self._prompt_tok_per_s, n_new) as advance:
            while not answer.done and not answer.generated:
                left = answer.to_read
                self._step(answer)
                advance(left - (0 if answer.done or answer.generated else answer.to_read))
        if n_new >= _TIMED:
            self._prompt_tok_per_s = n_new / max(time.perf_counter() - began, 1e-9)


def check_request(tokens: Sequence[int], max_tokens: int | None, n_ctx: int) -> None:
    """Raise YarnEdgeError for a prompt that is empty or does not fit, or an answer without tokens."""
    if max_tokens is not None and max_tokens < 1:
        raise YarnEdgeError(f"--max-tokens is {max_tokens}, must be above 0")
    if not tokens:
        raise YarnEdgeError("the prompt is empty")
    if len(tokens) > n_ctx:
        raise YarnEdgeError(f"the prompt has {len(tokens)} tokens, the context holds {n_ctx}")


@contextmanager
def _maybe_bar(shown: bool, n_tokens: int) -> Iterator[Callable[[float], None]]:
    if not shown:
        yield lambda _amount: None
        return
    with bar("Reading the prompt", n_tokens, "tokens") as advance:
        yield advance
