"""The generation loop: in each step one batch with the next token of every running answer, and slices of the prompts that are read.

One loop for one user and for several (continuous batching, Orca 2022). The cache is cut, never shifted: `llama_memory_seq_add` would
rotate the cached keys again, and on a YaRN model multiply them by the attention factor again.

Requests begin in the order in which they come, as soon as the cache has room for what a prompt does not share with others, and for
its answer; one that lacks room lets nobody pass. If answers outgrow what they were promised, the youngest makes room, and is read
again later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from yarn_edge.attention.work import FEW, few_rooms
from yarn_edge.engine.answer import RunningAnswer
from yarn_edge.engine.chances import token_chance
from yarn_edge.engine.drafting import Drafting
from yarn_edge.engine.load import EngineLoad
from yarn_edge.engine.pace import Pace, shared_out
from yarn_edge.engine.prompt_lookup import PromptLookup
from yarn_edge.engine.sequences import SequencePool
from yarn_edge.engine.state_cache import StateCache
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.batch import BatchPart
from yarn_edge.runtime.context import Context
from yarn_edge.signals import deferred_ctrl_c

Planned = list[tuple[RunningAnswer, BatchPart]]


class Engine:
    """A context and the answers that it generates. Only `submit`, `cancel` and `load` may be called from other threads than `step`.

    states: where evaluated prompts are kept, or None. lookup: the source of drafts, or None.
    """

    def __init__(self, context: Context, states: StateCache | None = None, lookup: PromptLookup | None = None) -> None:
        self.context = context
        self.pool = SequencePool(context, states)
        self.n_ctx = context.n_ctx - (self.pool.unified is not None)  # of one answer; a cell is left for a second row
        self.drafting = Drafting(lookup)
        self.running: list[RunningAnswer] = []
        self.waiting: deque[RunningAnswer] = deque()
        self.pace = Pace()
        self._interrupt: tuple[Callable[[], None], RunningAnswer | None] = (lambda: None, None)
        self._evaluated = self._shared = self._restored = self._generated = self._total = self._cancelled = 0

    @property
    def busy(self) -> bool:
        """Whether there is an answer that is not complete."""
        return bool(self.running or self.waiting)

    @property
    def n_waiting(self) -> int:
        """Requests that have not begun, and that somebody wants."""
        return sum(not answer.cancelled for answer in list(self.waiting))

    def submit(self, answer: RunningAnswer) -> None:
        """Let it begin once its turn has come."""
        self._total += 1
        self.waiting.append(answer)

    def cancel(self, answer: RunningAnswer) -> None:
        """Nobody wants it any more. What is evaluated for it alone is stopped, which `step` raises as KeyboardInterrupt."""
        answer.cancelled = True
        interrupt, alone = self._interrupt
        if alone is answer:
            interrupt()

    def load(self) -> EngineLoad:
        """What it does now, and has done."""
        return EngineLoad(
            self.pool.parallel,
            len(self.running),
            self.n_waiting,
            self._evaluated,
            self._shared,
            self._restored,
            self._generated,
            self.pool.cells_used,
            self.context.n_ctx,
            self._total,
            self._cancelled,
        )

    def keep_on_disk(self) -> None:
        """Save the evaluated prompts that are worth a file. Call this when nobody is waiting."""
        self.pool.keep_on_disk()

    def step(self) -> bool:
        """Evaluate one batch, and choose the next tokens. False if there was nothing to do.

        Raises KeyboardInterrupt, and whatever an evaluation raises; running answers can then go on.
        """
        self.admit()
        planned = self._planned()
        if not planned:
            return False
        began = time.perf_counter()
        self._evaluate(planned)
        read = 0
        end = 0
        for answer, part in planned:
            end += len(part.tokens)
            assert answer.cached is not None
            if answer.reading:
                n_prompt = min(len(part.tokens), max(0, answer.n_prompt - part.start))
                self._evaluated, read = self._evaluated + n_prompt, read + len(part.tokens)
                answer.cached.evaluated(part, answer.request.tokens)
                if answer.to_read == 0:
                    answer.cached.key = answer.request.key
                    if answer.request.only_read:
                        answer.reason = "stop"
                        answer.end()
                    else:
                        self._choose(answer, end - 1)
            elif part.outputs > 1:
                self._judge(answer, part, began)
            else:
                answer.cached.tokens.append(part.tokens[0])
                self._choose(answer, end - 1)
                self.drafting.took(answer, time.perf_counter() - began)
        self.pace.read(read, time.perf_counter() - began)
        self._release_done()
        return True

    def _choose(self, answer: RunningAnswer, output: int) -> None:
        """Choose the token after an output of the last evaluation. If its samplers cannot be made, only this answer ends."""
        output = output if self.pool.unified is not None else -1
        try:
            chain = answer.chain()
        except YarnEdgeError as error:
            answer.end(error)
            return
        self._take(answer, self.context.sample(chain, output), output)

    def _take(self, answer: RunningAnswer, token: int, output: int) -> None:
        n_top, before = answer.request.top_logprobs, answer.generated
        answer.take(token, None if n_top is None else token_chance(self.context.logits_of(output), token, n_top))
        self._generated += answer.generated - before

    def _judge(self, answer: RunningAnswer, part: BatchPart, began: float) -> None:
        """Take a draft's tokens as far as the model chooses them, too, and the one that it chooses next.

        Every token is sampled from the logits before it, as it would be without a draft, so the distribution is the same.
        """
        draft, chosen, model = part.tokens[1:], [], self.context.model
        for number in range(len(part.tokens)):
            chosen.append(self.context.sample(answer.chain(), number))
            if number == len(draft) or chosen[number] != draft[number] or model.is_end(chosen[number]):
                break
        assert answer.cached is not None
        answer.cached.tokens += part.tokens[: len(chosen)]
        self.context.keep(len(answer.cached), part.sequence)
        self.drafting.judged(answer, len(draft), len(chosen) - 1, time.perf_counter() - began)
        for number, token in enumerate(chosen):
            if not answer.done:
                self._take(answer, token, number)

    def admit(self) -> None:
        """Let waiting answers begin that there is room for, and forget those that nobody wants any more."""
        for answer in [one for one in (*self.running, *self.waiting) if one.cancelled]:
            self.release(answer)
        for answer in list(self.waiting):
            ready = self.pool.claim(answer)
            if ready is False:
                return
            if ready:
                self.waiting.remove(answer)
                self.running.append(answer)
                if not answer.generated:
                    self._shared, self._restored = self._shared + answer.reused, self._restored + answer.restored

    def release(self, answer: RunningAnswer) -> None:
        """An answer is over: by itself, or because nobody wants it."""
        if answer in self.running:
            self.running.remove(answer)
        elif answer in self.waiting:
            self.waiting.remove(answer)
        self._cancelled += not answer.done
        answer.end()
        if answer.cached is not None:
            self.pool.release(answer.cached)
            answer.cached = None

    def fail(self, error: BaseException) -> None:
        """End all answers with this error."""
        for answer in (*self.running, *self.waiting):
            answer.end(error)
            self.release(answer)

    def _release_done(self) -> None:
        for answer in [one for one in self.running if one.done]:
            self.release(answer)

    def _planned(self) -> Planned:
        """The parts of the next batch, after making room for them."""
        while True:
            planned = self._wished()
            unified = self.pool.unified
            if unified is None or self.pool.make_room(sum(len(part.tokens) for _, part in planned) + 1):
                return planned
            self._suspend(self.running[-1])

    def _suspend(self, answer: RunningAnswer) -> None:
        """Take the cells of an answer, which goes on when there is room again: it is the next one to begin."""
        assert answer.cached is not None
        self.running.remove(answer)
        self.pool.release(answer.cached)
        answer.cached = None
        self.waiting.appendleft(answer)

    def _wished(self) -> Planned:
        readers = [one for one in self.running if one.reading]
        generating = [one for one in self.running if not one.reading and not one.paused()]
        planned = [self._next(one, len(generating) == 1 and not readers) for one in generating]
        most = self.context.n_batch
        if self.pool.unified is not None:
            room = self.context.n_ubatch - len(planned) - 1
            soon = len(readers) > 1 and min(one.to_read for one in readers) <= self.pace.tokens(alone=False)
            most = min(room, self.pace.tokens(alone=not (generating or soon)), self.context.n_batch)
        few = FEW * few_rooms(self.context.settings.n_seq) - len(generating)
        for one, n_tokens in zip(readers, shared_out([one.to_read for one in readers], most), strict=True):
            cached = one.cached
            assert cached is not None
            start, again = len(cached), len(cached) >= one.n_prompt  # what it had said is read as it was: few at once
            if again:
                n_tokens = min(n_tokens, few)
                few -= n_tokens
            tokens = one.tokens if again else one.tokens[: one.n_prompt]
            part = cached.slice_of(tokens, n_tokens)
            if part:
                last = start + len(part) == len(one.tokens) and not one.request.only_read
                planned.append((one, BatchPart(cached.sequence, part, start, int(last), again)))
        return planned

    def _next(self, answer: RunningAnswer, drafts: bool) -> tuple[RunningAnswer, BatchPart]:
        """The last token of an answer, and a draft of what follows it."""
        cached = answer.cached
        assert cached is not None
        tokens, context = [answer.tokens[-1]], self.context
        if drafts:
            room = min(context.n_ctx - len(cached) - 1, context.most_outputs - 1, context.n_batch - 1)
            tokens += self.drafting.draft(answer, room)
        return answer, BatchPart(cached.sequence, tokens, len(cached), len(tokens), True)

    def _evaluate(self, planned: Planned) -> None:
        parts = [part for _, part in planned]
        spare = self.pool.spare
        if self.pool.repeats and any(one.request.repeatable or not part.generated for one, part in planned):
            parts = at_least_two_rows(parts, spare)
        alone = planned[0][0] if len(planned) == 1 else None
        try:
            if alone is None or not alone.reading:
                self.context.evaluate_parts(parts)
            else:
                with (
                    self.context.interruptible() as interrupt,
                    deferred_ctrl_c(interrupt),  # stops within a batch, not after it
                ):
                    self._interrupt = interrupt, alone
                    if alone.cancelled:
                        interrupt()
                    self.context.evaluate_parts(parts)
        finally:
            self._interrupt = (lambda: None), None
            if parts[-1].sequence == spare and self.pool.unified is not None:
                self.context.keep(0, spare)


def at_least_two_rows(parts: Sequence[BatchPart], spare: int) -> list[BatchPart]:
    """The parts with two rows or more, and with no output or two and more (`yarn_edge.engine.repeatable`).

    A second row is an earlier token of a prompt's last slice, or else one of the sequence `spare`.
    """
    parts = list(parts)
    outputs = sum(part.outputs for part in parts)
    if outputs == 1:
        for i, part in enumerate(parts):
            if part.outputs and len(part.tokens) > 1:
                parts[i] = part._replace(outputs=2)
                return parts
    if outputs == 1 or sum(len(part.tokens) for part in parts) == 1:
        parts.append(BatchPart(spare, [0], 0, int(outputs > 0)))
    return parts
