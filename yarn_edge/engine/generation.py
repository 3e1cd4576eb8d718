"""Tokens after tokens: what of a prompt is in the KV cache, evaluating the rest, sampling an answer. No messages, no templates.

The cache is cut, never shifted: `llama_memory_seq_add` would rotate the cached keys once more, on a YaRN model with its attention
factor.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yarn_edge.engine.cached_tokens import CachedTokens
from yarn_edge.engine.prompt_lookup import PromptLookup
from yarn_edge.engine.sampling import Sampling
from yarn_edge.engine.state_cache import StateCache, run_key
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.llama_api import deferred_ctrl_c

# stop: the model ended its turn; length: max_tokens; context: the cache is full; interrupted: Ctrl-C, a closed stream.
FinishReason = Literal["stop", "length", "context", "interrupted"]

MOST_REREAD = 0.25  # of the tokens to read: so many may be read again so that the state can be kept on the disk
KEEP_TOKENS = 1024  # of a prompt that is worth a file
# Where a draft is checked, logits differ from those of a single evaluation by the rounding of the batch: with weights in 16 bits
# the best two by up to 0.04 in what was measured. A greedy choice that close is made by a single evaluation; one that is close
# even so, behind keys and values that a batch has rounded, after evaluating these one by one, too, unless they are too many.
CLOSE_CALL, DOUBTFUL, MOST_REDONE = 0.05, 0.05, 512
_TIMED = 128  # tokens of a prompt that tell the speed of the next one
_FIRST_GUESS_TOK_PER_S = 100.0


@dataclass(frozen=True)
class AnswerStats:
    """What one answer cost. Prompt tokens are evaluated, reused from the cache, or restored from the disk; times in seconds.

    draft_tokens: proposed by looking up the text, draft_accepted: of these what the model said.
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


class Generation:
    """A context and what is in it. `stats` describes the last answer, None if it did not come to one.

    states: where evaluated prompts are kept and looked for, None for nowhere. lookup: drafts, None for none.
    """

    def __init__(self, context: Context, states: StateCache | None = None, lookup: PromptLookup | None = None) -> None:
        self.context, self.states, self.lookup = context, states, lookup
        self.stats: AnswerStats | None = None
        self.cached = CachedTokens(context)
        types = {tensor.type_name for tensor in context.model.gguf.tensors.values()}
        # Whether batches change logits by less than a close call: not with weights, keys or values in 8 bits, nor in bfloat16.
        plain = types <= {"F32", "F16"} and context.kv_type in ("f32", "f16")
        self._steady = plain and context.model.device is None  # nor was it measured on a GPU
        self._redo_s = 0.0
        self._run_key = "" if states is None else run_key(context)
        self._prompt_tok_per_s = _FIRST_GUESS_TOK_PER_S
        self._busy = self._stopped = False
        self._interrupt: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """From another thread: end what is being evaluated and generated, with KeyboardInterrupt there."""
        self._stopped = True
        self._interrupt()

    def generate(
        self, tokens: Sequence[int], sampling: Sampling, max_tokens: int | None = None, *, canonical: bool = False
    ) -> Generator[str, None, None]:
        """Continue `tokens`, a whole prompt, with what the cache already holds of it: pieces of whole characters.

        canonical: of that only what is to the bit as a fresh evaluation makes it.
        Sets `stats` at the end, however it ends. Closing the iterator or Ctrl-C (raised again as KeyboardInterrupt) stops it.
        Raises YarnEdgeError on an empty prompt or one that does not fit.
        """
        if self._busy:
            raise RuntimeError("this context is answering; close that stream first")
        if max_tokens is not None and max_tokens < 1:
            raise YarnEdgeError(f"--max-tokens is {max_tokens}, must be above 0")
        if not tokens:
            raise YarnEdgeError("the prompt is empty")
        n_ctx, model = self.context.n_ctx, self.context.model
        if len(tokens) > n_ctx:
            raise YarnEdgeError(f"the prompt has {len(tokens)} tokens, the context holds {n_ctx}")
        self._busy, self._stopped = True, False
        began = time.perf_counter()
        reused, restored = self.cached.common(tokens), 0
        before = (self.lookup.drafted, self.lookup.accepted) if self.lookup else (0, 0)
        generated, first_at, last_at = 0, 0.0, 0.0
        reason: FinishReason = "interrupted"
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            reused, restored = self._read(tokens, canonical)
            with sampling.chain(model, tokens) as chain:
                for token in self._sampled(chain, sampling):
                    if self._stopped:
                        raise KeyboardInterrupt
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
                    if len(tokens) + generated > n_ctx:
                        reason = "context"
                        break
            # A character that the limit cut is left out; one that the model itself left open is shown as U+FFFD.
            if reason == "stop" and (piece := decoder.decode(b"", final=True)):
                yield piece
        finally:
            self._busy = False
            steps = generated if reason == "stop" else generated - 1  # tokens after the first one that was sampled
            drafted, accepted = (self.lookup.drafted, self.lookup.accepted) if self.lookup else (0, 0)
            self.stats = AnswerStats(
                prompt_tokens_evaluated=len(tokens) - reused - restored,
                prompt_tokens_reused=reused,
                prompt_tokens_restored=restored,
                generated_tokens=generated,
                ttft_s=first_at - began if first_at else None,
                tok_per_s=steps / (last_at - first_at) if steps > 0 and last_at > first_at else None,
                finish_reason=reason,
                draft_tokens=drafted - before[0],
                draft_accepted=accepted - before[1],
                context_used=min(len(self.cached), len(tokens) + generated),
                n_ctx=n_ctx,
            )

    def preload(self, tokens: Sequence[int]) -> None:
        """Bring the beginning of a prompt into the cache, if it is not there. Raises YarnEdgeError, KeyboardInterrupt."""
        if self.cached.common([*tokens, -1]) < len(tokens):
            self._read(tokens, only_canonical=False)

    def keep_on_disk(self) -> None:
        """Keep what was read, if it is worth a file: for when nobody waits."""
        cached = self.cached
        if self.states is not None and cached.canonical >= KEEP_TOKENS:
            self.context.keep(len(cached))  # what an interrupted evaluation left behind
            self.states.keep(self.context, self._run_key, cached.tokens, cached.canonical)

    def _read(self, tokens: Sequence[int], only_canonical: bool) -> tuple[int, int]:
        """Bring the cache to exactly `tokens`. Returns how many of them were there, and how many came from the disk.

        After an interruption `cached` holds what is surely there.
        """
        cached = self.cached
        start, restored = cached.common(tokens), 0
        if self.states is not None and len(tokens) - start >= KEEP_TOKENS:
            restored = self._restore(tokens, start)
            start = restored or cached.common(tokens)
        canonical = min(cached.canonical, start) // self.context.n_batch * self.context.n_batch
        worth_a_file = self.states is not None and len(tokens) - start >= KEEP_TOKENS
        if only_canonical or (worth_a_file and start - canonical <= MOST_REREAD * (len(tokens) - start)):
            start = canonical
        cached.canonical = canonical
        cached.cut(start)
        n_new = len(tokens) - start
        began = time.perf_counter()
        with (
            self.context.interruptible() as interrupt,
            deferred_ctrl_c(interrupt),  # stops inside a batch, not after it
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
        """Tokens that are in the cache now because the disk had more of them than there were; 0 if it had not."""
        assert self.states is not None
        found = self.states.find(self._run_key, tokens[:-1], self.context.n_batch, self.context.n_ctx)
        if found is None or found.usable <= have:
            return 0
        self.cached.forget()
        if not self.states.load(self.context, found):
            return 0
        self.cached.restored(tokens[: found.usable])
        return found.usable

    def _following(self, chain: object, greedy: bool) -> int:
        """The token after the last evaluation, a single one; a greedy one as it would be had there been no drafts."""
        first = self.cached.drafted_at
        if first is None or not (greedy and self._steady) or len(self.cached) - first > MOST_REDONE:
            return self.context.sample(chain)
        if _margin(self.context.logits_in_place()[0]) < DOUBTFUL:
            self._redo()
        return self.context.sample(chain)

    def _redo(self) -> None:
        """Evaluate what drafts left in the cache as it would be without them."""
        began = time.perf_counter()
        for part in self.cached.undrafted():
            if self._stopped:
                raise KeyboardInterrupt
            self.cached.evaluate(part)
        self._redo_s += time.perf_counter() - began

    def _sampled(self, chain: object, sampling: Sampling) -> Iterator[int]:
        """Tokens without end: sampled after what is in the cache, evaluated when the next one is asked for."""
        lookup, context, greedy = self.lookup, self.context, sampling.temperature == 0
        unsure = not self._steady or sampling.penalizes  # which of two is the most probable
        if lookup is not None and greedy and unsure and not lookup.always:
            lookup = None  # it is to be what it is without drafts
        if lookup is not None:
            lookup.read(self.cached.tokens)
        token = self._following(chain, greedy)
        while True:
            yield token
            room = min(context.n_ctx - len(self.cached) - 1, context.most_outputs - 1, context.n_batch - 1)
            if lookup is not None:
                lookup.add(token)
            draft = lookup.draft(room) if lookup is not None and room > 0 else []
            began, self._redo_s = time.perf_counter(), 0.0
            if not draft:
                self.cached.evaluate([token])
                token = self._following(chain, greedy)
                if lookup is not None:
                    lookup.took(time.perf_counter() - began - self._redo_s)
                    if self._redo_s:
                        lookup.redone(self._redo_s)
                continue
            assert lookup is not None
            accepted, following = self._check(chain, token, draft, greedy)
            lookup.judged(len(draft), len(accepted), time.perf_counter() - began)
            for token in accepted:
                yield token
                lookup.add(token)
            token = following

    def _check(self, chain: object, token: int, draft: list[int], greedy: bool) -> tuple[list[int], int]:
        """Evaluate a token and a draft behind it. Returns what of the draft the model said itself, and what it said then.

        Every token is sampled from the logits before it, as without a draft: the distribution is the same.
        """
        context, batch = self.context, [token, *draft]
        context.evaluate(batch, len(self.cached), len(batch))
        for number in range(len(batch)):
            close = greedy and _margin(context.logits_in_place()[number]) < CLOSE_CALL
            said = -1 if close else context.sample(chain, number)
            if number == len(draft) or said != draft[number] or context.model.is_end(said):
                self.cached.keep_of_draft(batch, number + (not close))
                if close:
                    self.cached.evaluate([batch[number]])
                    said = self._following(chain, greedy)
                return batch[1 : number + 1], said
        raise AssertionError("the last one returns")


def _margin(logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """How far the best is before the second."""
    second, best = np.partition(logits, -2)[-2:]
    return float(best - second)


@contextmanager
def _maybe_bar(shown: bool, n_tokens: int) -> Iterator[Callable[[float], None]]:
    if not shown:
        yield lambda _amount: None
        return
    with bar("Reading the prompt", n_tokens, "tokens") as advance:
        yield advance
