"""One request and its answer while it is read and generated."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from yarn_edge.engine.chances import TokenChance
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError

if TYPE_CHECKING:
    from yarn_edge.engine.cached_tokens import CachedTokens
    from yarn_edge.runtime.model import Model

# stop: the model ended its turn; length: max_tokens; context: the cache is full; interrupted: Ctrl-C, a closed stream.
FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class AnswerRequest:
    """tokens: a whole prompt. canonical: reuse only what equals a fresh evaluation to the bit. visible: tokens that are shown though
    they are control tokens. top_logprobs: alternatives of each token, None for no probabilities. key: whose request it is, "" for
    nobody's. only_read: bring the prompt into the cache, and no more.
    """

    tokens: Sequence[int]
    sampling: Sampling
    max_tokens: int | None = None
    canonical: bool = False
    visible: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    key: str = ""
    only_read: bool = False

    @property
    def repeatable(self) -> bool:
        """Whether the same request is to get the same answer."""
        return self.sampling.temperature == 0 or self.sampling.seed is not None


@dataclass(frozen=True)
class AnswerStats:
    """The cost of one answer. Prompt tokens are evaluated, reused from the cache, or restored from disk; times are in seconds.

    draft_tokens: tokens proposed by prompt lookup; draft_accepted: how many of them the model chose.
    """

    prompt_tokens_evaluated: int
    prompt_tokens_reused: int
    prompt_tokens_restored: int
    generated_tokens: int
    ttft_s: float | None
    tok_per_s: float | None
    finish_reason: FinishReason
    draft_tokens: int
    draft_accepted: int
    context_used: int
    n_ctx: int


class RunningAnswer:
    """An answer from its request to its end. Times come from `time.perf_counter`.

    say: gets each piece of text, and the chances of its tokens. ended: called once, with an error or None, which is `error` then.
    paused: whether whoever reads the answer is behind, so that it is not continued now.
    """

    def __init__(
        self,
        request: AnswerRequest,
        model: Model,
        n_ctx: int,
        say: Callable[[str, tuple[TokenChance, ...]], None] = lambda _text, _tokens: None,
        ended: Callable[[BaseException | None], None] = lambda _error: None,
    ) -> None:
        self.request, self.model, self.n_ctx = request, model, n_ctx
        self.tokens, self.n_prompt = list(request.tokens), len(request.tokens)
        self.paused: Callable[[], bool] = lambda: False
        self.cached: CachedTokens | None = None
        self.reason: FinishReason = "interrupted"
        self.error: BaseException | None = None
        self.cancelled = self.done = False
        self.reused = self.restored = self.own = self.generated = self.drafted = self.accepted = self.context_used = 0
        self.began, self.first_at, self.last_at = time.perf_counter(), 0.0, 0.0
        self._say, self._ended = say, ended
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ExitStack()
        self._chances: list[TokenChance] = []
        self._chain: Any = None

    def chain(self) -> Any:
        """The samplers of this answer, as `Sampling.chain` makes them."""
        if self._chain is None:
            self._chain = (self._held.enter_context(self.request.sampling.chain(self.model, self.request.tokens)),)
        return self._chain[0]

    @property
    def to_read(self) -> int:
        """Tokens that are still to be read before the next one can be chosen, or evaluated: 1 while the answer is generated."""
        return len(self.tokens) - (len(self.cached) if self.cached is not None else 0)

    @property
    def reading(self) -> bool:
        """Whether the prompt, or an answer that had to make room, is read."""
        return not self.generated or self.to_read > 1

    def take(self, token: int, chance: TokenChance | None = None) -> None:
        """The token that was chosen. It is part of the answer, or ends it."""
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        request, shown = self.request, token in self.request.visible
        is_end = self.model.is_end(token)
        if not is_end:
            self.generated += 1
            self.tokens.append(token)
            if chance is not None:
                self._chances.append(chance)
        if not is_end or shown:
            self._tell(self._decoder.decode(self.model.token_bytes(token, special=shown)))
        if self.done:
            return
        if is_end:
            # A character cut by the limit is left out; one that the model itself left incomplete is shown as U+FFFD.
            self._tell(self._decoder.decode(b"", final=True))
            self.reason = "stop"
        elif self.generated == request.max_tokens:
            self.reason = "length"
        elif self.n_prompt + self.generated > self.n_ctx:
            self.reason = "context"
        else:
            return
        self.end()

    def stop(self) -> None:
        """The text that was said so far ends the answer, as the model ending its turn does."""
        self.reason = "stop"
        self.end()

    def _tell(self, text: str) -> None:
        if text:
            chances, self._chances = tuple(self._chances), []
            self._say(text, chances)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing follows. An answer that could not be held to its constraint ends with that error."""
        if not self.done:
            self.done = True
            self.context_used = min(len(self.cached) if self.cached is not None else 0, self.n_prompt + self.generated)
            try:
                self._held.close()
            except YarnEdgeError as failure:
                error = error or failure
            self.error = error
            self._ended(error)

    def stats(self) -> AnswerStats:
        """The cost so far."""
        steps = self.generated if self.reason == "stop" else self.generated - 1  # tokens after the first one
        took = self.last_at - self.first_at
        return AnswerStats(
            prompt_tokens_evaluated=self.n_prompt - self.reused - self.restored,
            prompt_tokens_reused=self.reused,
            prompt_tokens_restored=self.restored,
            generated_tokens=self.generated,
            ttft_s=self.first_at - self.began if self.first_at else None,
            tok_per_s=steps / took if steps > 0 and took > 0 else None,
            finish_reason=self.reason,
            draft_tokens=self.drafted,
            draft_accepted=self.accepted,
            context_used=self.context_used,
            n_ctx=self.n_ctx,
        )
