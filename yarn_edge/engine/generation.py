"""Generation from tokens to text: reuse what the KV cache has of a prompt, evaluate the rest, sample an answer. No messages, no
templates.

The cache is cut, never shifted: `llama_memory_seq_add` would rotate the cached keys again, and on a YaRN model multiply them by the
attention factor again.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from yarn_edge.engine.cached_tokens import CachedTokens
from yarn_edge.engine.prompt_lookup import PromptLookup
from yarn_edge.engine.sampling import Sampling
from yarn_edge.engine.state_cache import StateCache, run_key
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar
from yarn_edge.runtime.context import Context
from yarn_edge.signals import deferred_ctrl_c

# stop: the model ended its turn; length: max_tokens; context: the cache is full; interrupted: Ctrl-C, a closed stream.
FinishReason = Literal["stop", "length", "context", "interrupted"]

MOST_REREAD = 0.25  # share of the tokens to read that may be read again so that the state can be kept on disk
KEEP_TOKENS = 1024  # minimum length of a prompt that is worth a file
_TIMED = 128  # minimum number of tokens to measure the reading speed on
_FIRST_GUESS_TOK_PER_S = 100.0


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


@dataclass
class _Answer:
    """An answer while it is generated. drafts: `Generation._drafts` before it. Times come from `time.perf_counter`."""

    n_prompt: int
    began: float
    reused: int
    drafts: tuple[int, int]
    restored: int = 0
    generated: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    reason: FinishReason = "interrupted"

    def sampled(self) -> None:
        """Note that a token has just been sampled."""
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at

    def stats(self, drafts: tuple[int, int], n_cached: int, n_ctx: int) -> AnswerStats:
        """The cost so far. drafts: `Generation._drafts` now; n_cached: tokens in the cache."""
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
            draft_tokens=drafts[0] - self.drafts[0],
            draft_accepted=drafts[1] - self.drafts[1],
            context_used=min(n_cached, self.n_prompt + self.generated),
            n_ctx=n_ctx,
        )


class Generation:
    """A context and what is in its cache. `stats` describes the last answer; None if there was none.

    states: where evaluated prompts are kept, or None. lookup: the source of drafts, or None.
    """

    def __init__(self, context: Context, states: StateCache | None = None, lookup: PromptLookup | None = None) -> None:
        self.context, self.states, self.lookup = context, states, lookup
        self.stats: AnswerStats | None = None
        self.cached = CachedTokens(context)
        self._run_key = "" if states is None else run_key(context)
        self._prompt_tok_per_s = _FIRST_GUESS_TOK_PER_S
        self._busy = self._stopped = False
        self._interrupt: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """Called from another thread: end the running evaluation and generation, which raises KeyboardInterrupt there."""
        self._stopped = True
        self._interrupt()

    def generate(
        self, tokens: Sequence[int], sampling: Sampling, max_tokens: int | None = None, *, canonical: bool = False
    ) -> Generator[str, None, None]:
        """Continue `tokens`, a whole prompt, reusing what the cache holds of it. Yields text in pieces of whole characters.

        canonical: reuse only what equals a fresh evaluation to the bit. Sets `stats` at the end, however it ends. Closing the
        iterator or Ctrl-C (raised again as KeyboardInterrupt) stops it. Raises YarnEdgeError if the prompt is empty or does not
        fit.
        """
        self._check_request(tokens, max_tokens)
        n_ctx, model = self.context.n_ctx, self.context.model
        self._busy, self._stopped = True, False
        answer = _Answer(len(tokens), time.perf_counter(), self.cached.common(tokens), self._drafts())
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            answer.reused, answer.restored = self._read(tokens, canonical)
            with sampling.chain(model, tokens) as chain:
                for token in self._sampled(chain, sampling):
                    if self._stopped:
                        raise KeyboardInterrupt
                    answer.sampled()
                    if model.is_end(token):
                        answer.reason = "stop"
                        break
                    answer.generated += 1
                    if piece := decoder.decode(model.token_bytes(token, special=False)):
                        yield piece
                    if answer.generated == max_tokens:
                        answer.reason = "length"
                        break
                    if len(tokens) + answer.generated > n_ctx:
                        answer.reason = "context"
                        break
            # A character cut by the limit is left out; one that the model itself left incomplete is shown as U+FFFD.
            if answer.reason == "stop" and (piece := decoder.decode(b"", final=True)):
                yield piece
        finally:
            self._busy = False
            self.stats = answer.stats(self._drafts(), len(self.cached), n_ctx)

    def _check_request(self, tokens: Sequence[int], max_tokens: int | None) -> None:
        if self._busy:
            raise RuntimeError("this context is generating an answer: close that stream first")
        if max_tokens is not None and max_tokens < 1:
            raise YarnEdgeError(f"--max-tokens is {max_tokens}, must be above 0")
        if not tokens:
            raise YarnEdgeError("the prompt is empty")
        if len(tokens) > self.context.n_ctx:
            raise YarnEdgeError(f"the prompt has {len(tokens)} tokens, the context holds {self.context.n_ctx}")

    def _drafts(self) -> tuple[int, int]:
        """Tokens drafted and accepted so far, in all answers."""
        return (self.lookup.drafted, self.lookup.accepted) if self.lookup else (0, 0)

    def preload(self, tokens: Sequence[int]) -> None:
        """Bring the beginning of a prompt into the cache, unless it is there. Raises YarnEdgeError, KeyboardInterrupt."""
        if self.cached.common([*tokens, -1]) < len(tokens):
            self._read(tokens, only_canonical=False)

    def keep_on_disk(self) -> None:
        """Save the evaluated prompt, if it is worth a file. Call this when nobody is waiting."""
        cached = self.cached
        if self.states is not None and cached.canonical >= KEEP_TOKENS:
            cached.cut(len(cached))  # drops what an interrupted evaluation left
            canonical = cached.reachable(cached.canonical)
            if canonical >= KEEP_TOKENS:
                with cached.earlier.at(canonical):
                    self.states.keep(self.context, self._run_key, cached.tokens, canonical)

    def _read(self, tokens: Sequence[int], only_canonical: bool) -> tuple[int, int]:
        """Bring the cache to exactly `tokens`. Returns (tokens that were there, tokens restored from disk).

        After an interruption `cached` has only what is known to be there.
        """
        cached = self.cached
        start, restored = cached.common(tokens), 0
        if self.states is not None and len(tokens) - start >= KEEP_TOKENS:
            restored = self._restore(tokens, start)
            start = restored or cached.common(tokens)
        canonical = cached.reachable(min(cached.canonical, start) // self.context.n_batch * self.context.n_batch)
        worth_a_file = self.states is not None and len(tokens) - start >= KEEP_TOKENS
        if only_canonical or (worth_a_file and start - canonical <= MOST_REREAD * (len(tokens) - start)):
            start = canonical
        cached.canonical = canonical
        cached.cut(start)
        start = len(cached)
        n_new = len(tokens) - start
        began = time.perf_counter()
        with (
            self.context.interruptible() as interrupt,
            deferred_ctrl_c(interrupt),  # stops within a batch, not after it
            _maybe_bar(n_new > self._prompt_tok_per_s, n_new) as advance,
        ):
            self._interrupt = interrupt
            while len(cached) < len(tokens):
                if self._stopped:
                    raise KeyboardInterrupt
                advance(cached.evaluate_prompt(tokens))
        if n_new >= _TIMED:
            self._prompt_tok_per_s = n_new / max(time.perf_counter() - began, 1e-9)
        return (0, restored) if restored else (start, 0)

    def _restore(self, tokens: Sequence[int], have: int) -> int:
        """The number of tokens restored from disk; 0 if the disk has no more of them than the cache, which has `have`."""
        assert self.states is not None
        n_batch, n_ctx = self.context.n_batch, self.context.n_ctx
        entry = self.states.find(self._run_key, tokens[:-1], n_batch, n_ctx, whole=self.context.model.recurrent)
        if entry is None or entry.usable <= have:
            return 0
        self.cached.forget()
        if not self.states.load(self.context, entry):
            return 0
        self.cached.restored(tokens[: entry.usable])
        return entry.usable

    def _sampled(self, chain: object, sampling: Sampling) -> Iterator[int]:
        """An endless stream of tokens, sampled after what is in the cache and evaluated when the next one is requested."""
        lookup, context = self.lookup, self.context
        # A batch rounds differently from single evaluations, and could make another token the most probable.
        if lookup is not None and sampling.temperature == 0 and not lookup.always:
            lookup = None
        if lookup is not None:
            lookup.read(self.cached.tokens)
        token = context.sample(chain)
        while True:
            yield token
            room = min(context.n_ctx - len(self.cached) - 1, context.most_outputs - 1, context.n_batch - 1)
            if lookup is not None:
                lookup.add(token)
            draft = lookup.draft(room) if lookup is not None and room > 0 else []
            began = time.perf_counter()
            if not draft:
                self.cached.evaluate([token])
                token = context.sample(chain)
                if lookup is not None:
                    lookup.took(time.perf_counter() - began)
                continue
            assert lookup is not None
            accepted, following = self._check(chain, token, draft)
            lookup.judged(len(draft), len(accepted), time.perf_counter() - began)
            for token in accepted:
                yield token
                lookup.add(token)
            token = following

    def _check(self, chain: object, token: int, draft: list[int]) -> tuple[list[int], int]:
        """Evaluate a token and a draft after it. Returns (the draft's tokens that the model chose too, the token it chose next).

        Every token is sampled from the logits before it, as it would be without a draft, so the distribution is the same.
        """
        context, batch = self.context, [token, *draft]
        context.evaluate(batch, len(self.cached), len(batch))
        for number in range(len(batch)):
            chosen = context.sample(chain, number)
            if number == len(draft) or chosen != draft[number] or context.model.is_end(chosen):
                self.cached.keep_of_draft(batch, number + 1)
                return batch[1 : number + 1], chosen
        raise AssertionError("the last one returns")


@contextmanager
def _maybe_bar(shown: bool, n_tokens: int) -> Iterator[Callable[[float], None]]:
    if not shown:
        yield lambda _amount: None
        return
    with bar("Reading the prompt", n_tokens, "tokens") as advance:
        yield advance
