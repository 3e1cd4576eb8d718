"""The conversation, without a terminal: messages, what of them is in the KV cache, and answers as a stream of text.

A turn evaluates only what differs from the cache: the longest common prefix of tokens stays. The cache is cut, never
shifted: `llama_memory_seq_add` would rotate the cached keys once more, on a YaRN model with its attention factor. When
the context is full the oldest turns are dropped and the rest is evaluated anew from the common prefix.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from yarn_edge.chat_template import Message, Renderer
from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_api import deferred_ctrl_c
from yarn_edge.progress import bar
from yarn_edge.runtime import Context
from yarn_edge.sampling import Sampling

# stop: the model ended its turn; length: max_tokens; context: the cache is full; interrupted: Ctrl-C, a closed stream.
FinishReason = Literal["stop", "length", "context", "interrupted"]

# Tokens that are kept free for an answer before turns are dropped, when the caller sets no max_tokens.
ANSWER_ROOM = 1024
_TIMED = 128  # tokens of a prompt that tell the speed of the next one
_FIRST_GUESS_TOK_PER_S = 100.0


@dataclass(frozen=True)
class AnswerStats:
    """What one answer cost. Prompt tokens are either evaluated or reused from the cache; times in seconds."""

    prompt_tokens_evaluated: int
    prompt_tokens_reused: int
    generated_tokens: int
    ttft_s: float | None
    tok_per_s: float | None
    finish_reason: FinishReason
    dropped_turns: int
    context_used: int
    n_ctx: int


class Session:
    """A conversation in a context that is this session's alone.

    `messages` is the history as the template sees it, the system prompt not among them; it may be replaced between
    answers. `notice` is called with one line when turns are dropped. `stats` describes the last answer, None if it did
    not come to one.
    """

    def __init__(
        self,
        context: Context,
        template: Renderer,
        sampling: Sampling,
        system: str | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.context, self.template, self.sampling, self.system = context, template, sampling, system
        self.messages: list[Message] = []
        self.dropped_turns = 0
        self.stats: AnswerStats | None = None
        self._notice = notice or (lambda _message: None)
        self._cached: list[int] = []  # tokens whose keys and values are surely in the cache
        self._prompt_tok_per_s = _FIRST_GUESS_TOK_PER_S
        self._busy = False

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of the system prompt and `messages`, up to where the assistant speaks."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.tokens(self.context.model, [*first, *messages])

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.messages.clear()
        self.dropped_turns = 0

    def stream(self, user_text: str, max_tokens: int | None = None) -> Generator[str, None, None]:
        """Answer `user_text`: pieces of text as they come, whole characters only.

        Closing the iterator or Ctrl-C (raised again as KeyboardInterrupt) stops the answer; what was said so far stays
        in the history. A turn that got no word of an answer is taken back. Raises YarnEdgeError where the message alone
        exceeds the context, or the template refuses the conversation.
        """
        self.stats = None
        dropped_before = self.dropped_turns
        question: Message = {"role": "user", "content": user_text}
        history, tokens = self._fit([*self.messages, question], max_tokens)
        said: list[str] = []
        complete = False
        try:
            for piece in self.generate(tokens, max_tokens, self.dropped_turns - dropped_before):
                said.append(piece)
                yield piece
            complete = True
        finally:
            if complete or said:
                self.messages = [*history, {"role": "assistant", "content": "".join(said)}]
            else:
                self.messages = history[:-1]

    def _fit(self, messages: list[Message], max_tokens: int | None) -> tuple[list[Message], list[int]]:
        """`messages` without as many of the oldest turns as it takes to leave room for an answer, and their tokens."""
        n_ctx = self.context.n_ctx
        room = max(1, min(max_tokens or ANSWER_ROOM, n_ctx // 4))
        dropped = 0
        tokens = self.prompt(messages)
        while len(tokens) + room > n_ctx and len(messages) > 2:
            messages = messages[2:]
            dropped += 1
            tokens = self.prompt(messages)
        if len(tokens) >= n_ctx:
            raise YarnEdgeError(
                f"the message needs {len(tokens)} tokens and room for an answer, the context holds {n_ctx}; "
                "shorten it or give a larger --ctx"
            )
        if dropped:
            self.dropped_turns += dropped
            turns = "oldest turn was" if dropped == 1 else f"{dropped} oldest turns were"
            self._notice(f"the context of {n_ctx} tokens is full: the {turns} dropped from the conversation")
        return messages, tokens

    def generate(
        self, tokens: Sequence[int], max_tokens: int | None = None, dropped_turns: int = 0
    ) -> Generator[str, None, None]:
        """Continue `tokens`, a whole prompt, with what the cache already holds of it. Leaves `messages` alone.

        Sets `stats` at the end, however it ends. Raises YarnEdgeError on an empty prompt or one that does not fit.
        """
        if self._busy:
            raise RuntimeError("this session is answering; close that stream first")
        if max_tokens is not None and max_tokens < 1:
            raise YarnEdgeError(f"--max-tokens is {max_tokens}, must be above 0")
        if not tokens:
            raise YarnEdgeError("the prompt is empty")
        self._busy = True
        began = time.perf_counter()
        reused = self._common(tokens)
        generated, first_at, last_at = 0, 0.0, 0.0
        reason: FinishReason = "interrupted"
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        model = self.context.model
        try:
            self._evaluate(tokens, reused)
            with self.sampling.chain(model, tokens) as chain:
                while True:
                    token = self.context.sample(chain)
                    last_at = time.perf_counter()
                    first_at = first_at or last_at
                    if model.is_end(token):
                        reason = "stop"
                        break
                    generated += 1
                    if piece := decoder.decode(model.token_bytes(token, special=False)):
                        yield piece
                    if generated == max_tokens:
                        reason = "length"
                        break
                    if len(self._cached) >= self.context.n_ctx:
                        reason = "context"
                        break
                    self.context.evaluate([token], len(self._cached))
                    self._cached.append(token)
            # A character that the limit cut is left out; one that the model itself left open is shown as U+FFFD.
            if reason == "stop" and (piece := decoder.decode(b"", final=True)):
                yield piece
        finally:
            self._busy = False
            steps = generated if reason == "stop" else generated - 1  # tokens after the first one that was sampled
            self.stats = AnswerStats(
                prompt_tokens_evaluated=len(tokens) - reused,
                prompt_tokens_reused=reused,
                generated_tokens=generated,
                ttft_s=first_at - began if first_at else None,
                tok_per_s=steps / (last_at - first_at) if steps > 0 and last_at > first_at else None,
                finish_reason=reason,
                dropped_turns=dropped_turns,
                context_used=len(self._cached),
                n_ctx=self.context.n_ctx,
            )

    def _common(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of the prompt the cache holds; the last one is always evaluated, for its logits."""
        same = 0
        for mine, theirs in zip(self._cached, tokens[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        return same

    def _evaluate(self, tokens: Sequence[int], reused: int) -> None:
        """Bring the cache to exactly `tokens`. After an interruption `_cached` holds what is surely there."""
        if len(tokens) > self.context.n_ctx:
            raise YarnEdgeError(f"the prompt has {len(tokens)} tokens, the context holds {self.context.n_ctx}")
        del self._cached[reused:]
        self.context.keep(reused)  # also what an interrupted evaluation left behind
        n_new = len(tokens) - reused
        began = time.perf_counter()
        slow = n_new > self._prompt_tok_per_s
        with (
            self.context.interruptible() as interrupt,
            deferred_ctrl_c(interrupt),  # stops inside a batch, not after it
            _maybe_bar(slow, n_new) as advance,
        ):
            while (at := len(self._cached)) < len(tokens):
                part = tokens[at : at + self.context.n_batch]
                self.context.evaluate(part, at, "last" if at + len(part) == len(tokens) else "none")
                self._cached.extend(part)
                advance(len(part))
        if n_new >= _TIMED:
            self._prompt_tok_per_s = n_new / max(time.perf_counter() - began, 1e-9)


@contextmanager
def _maybe_bar(shown: bool, n_tokens: int) -> Iterator[Callable[[float], None]]:
    if not shown:
        yield lambda _amount: None
        return
    with bar("Reading the prompt", n_tokens, "tokens") as advance:
        yield advance
