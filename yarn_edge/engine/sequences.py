"""The sequences of a context: which answer uses which, what is shared, restored from disk and kept, and who must wait for room.

A prompt's beginning comes from wherever most of it is: from a conversation that is over and still in the cache, from one that is
running (their cells are shared), or from disk. If somebody is reading the same beginning now, the answer waits until it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from yarn_edge.engine.answer import RunningAnswer
from yarn_edge.engine.cached_tokens import CachedTokens, same_beginning
from yarn_edge.engine.repeatable import why_not_repeatable
from yarn_edge.engine.state_cache import StateCache, run_key
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.unified import UnifiedContext

MOST_REREAD = 0.25  # share of the tokens to read that may be read again so that the state can be kept on disk
KEEP_TOKENS = 1024  # minimum length of a prompt that is worth a file
KEEP_MORE = 256  # tokens that a prompt must have beyond what is on disk
ANSWER_CELLS = 1024  # for which there must be room before an answer begins, if it may be longer
_WORTH_WAITING = 8  # tokens that somebody else is reading


class SequencePool:
    """The sequences of one context. parallel: answers that may run at once. states: where evaluated prompts are kept, or None."""

    def __init__(self, context: Context, states: StateCache | None = None) -> None:
        self.context, self.states = context, states
        self.unified = context if isinstance(context, UnifiedContext) else None
        self.spare = context.settings.n_seq - 1  # a sequence of a unified cache that no answer uses
        self.parallel = max(1, self.spare // 2)
        self.sequences = [CachedTokens(context, i) for i in range(max(1, self.spare))]
        self.repeats = self.unified is not None and why_not_repeatable(context) is None
        self._key = "" if states is None else run_key(context)
        self._clock = 0
        self._owners: dict[int, RunningAnswer] = {}  # by sequence

    @property
    def owned(self) -> list[CachedTokens]:
        """Those that answers use."""
        return [one for one in self.sequences if one.busy]

    @property
    def cells_used(self) -> int:
        """Cells of the cache that hold a token."""
        return self.unified.cells.used if self.unified is not None else sum(map(len, self.sequences))

    def claim(self, answer: RunningAnswer) -> bool | None:
        """Give the answer a sequence that holds as much of its tokens as can be had. False: there is no room for it yet; None: what
        it needs is being read.
        """
        free = [one for one in self.sequences if not one.busy]
        if not free or len(self.owned) >= self.parallel:
            return False
        request, tokens = answer.request, answer.tokens
        strict = self.repeats and request.repeatable
        shares = {one.sequence: self._share(one, tokens, strict) for one in self.sequences}
        source = max(self.sequences, key=lambda one: (shares[one.sequence], not one.busy))
        start = shares[source.sequence]
        if self.unified is not None:
            if self._being_read(tokens, start):
                return None
            if not self._room(answer, source, start):
                return False
        own = max((shares[one.sequence] for one in self.sequences if one.key == request.key and request.key), default=0)
        target, restored = self._filled(free, source, start, tokens)
        start = self._cut(target, tokens, min(restored or start, len(target)), strict or request.canonical)
        if not answer.generated:
            answer.reused, answer.restored = (0, restored) if restored else (start, 0)
            answer.own = min(own, answer.reused)
        answer.cached = target
        target.busy, target.key = True, ""
        self._owners[target.sequence] = answer
        return True

    def _share(self, one: CachedTokens, tokens: Sequence[int], strict: bool) -> int:
        common = one.common(tokens)
        return min(common, one.canonical) if strict else common

    def _being_read(self, tokens: Sequence[int], start: int) -> bool:
        for one in self.owned:
            owner = self._owners[one.sequence]
            if owner.to_read > 1 and len(one) < owner.n_prompt:
                later = same_beginning(owner.tokens, tokens, min(owner.n_prompt, len(tokens) - 1))
                if later - start >= _WORTH_WAITING and len(one) < later:
                    return True
        return False

    def goal(self, answer: RunningAnswer) -> int:
        """Cells that an answer is promised: for its prompt, and for its answer up to a length that most do not reach."""
        if answer.request.only_read:
            return len(answer.tokens)
        most = max(ANSWER_CELLS, self.context.n_ctx // (2 * self.parallel))
        room = min(answer.request.max_tokens or most, most)
        return min(max(answer.n_prompt + room, len(answer.tokens) + 1), self.context.n_ctx)

    def _room(self, answer: RunningAnswer, source: CachedTokens, start: int) -> bool:
        assert self.unified is not None
        owned = self.owned
        if not owned:
            return True
        held = self.unified.cells.held_by([(o.sequence, len(o)) for o in owned] + [(source.sequence, start)])
        promised = sum(max(0, self.goal(self._owners[o.sequence]) - len(o)) for o in owned)
        return held + promised + self.goal(answer) - start < self.unified.cells.size

    def _filled(
        self, free: list[CachedTokens], source: CachedTokens, start: int, tokens: Sequence[int]
    ) -> tuple[CachedTokens, int]:
        """(a free sequence that holds the first `start` tokens, or more that were restored from disk; how many were restored)."""
        others = [one for one in free if one is not source]
        oldest = min(others, key=lambda one: (len(one) > 0, one.used_at), default=source)
        if self.states is not None and len(tokens) - start >= KEEP_TOKENS:
            restored = self._restore(oldest, tokens, start)
            if restored:
                return oldest, restored
            if not len(source):  # a damaged state
                return source, 0
        if not source.busy and (oldest is source or start == len(source)):
            return source, 0
        self._drop(oldest)
        if start and self.unified is not None:
            self.unified.share(source.sequence, oldest.sequence, start)
            oldest.tokens, oldest.canonical = source.tokens[:start], min(source.canonical, start)
            oldest.kept = min(source.kept, start)
        return oldest, 0

    def _cut(self, one: CachedTokens, tokens: Sequence[int], start: int, only_canonical: bool) -> int:
        start = min(start, one.common(tokens))
        canonical = one.reachable(min(one.canonical, start) // one.unit * one.unit)
        worth_a_file = self.states is not None and len(tokens) - start >= KEEP_TOKENS
        if only_canonical or (worth_a_file and start - canonical <= MOST_REREAD * (len(tokens) - start)):
            start = canonical
        one.canonical = canonical
        one.cut(start)
        return len(one)

    def _restore(self, one: CachedTokens, tokens: Sequence[int], have: int) -> int:
        """The number of tokens restored from disk; 0 if the disk has no more of them than `have`."""
        assert self.states is not None
        context, most = self.context, self.context.n_ctx
        if self.unified is not None:
            most -= self.unified.cells.held_by((o.sequence, len(o)) for o in self.owned)
        entry = self.states.find(self._key, tokens[:-1], one.unit, most, whole=context.model.recurrent)
        if entry is None or entry.usable <= have:
            return 0
        if self.unified is not None:
            self._drop(one)
            self.make_room(len(entry.tokens))
        one.forget()
        if not self.states.load(context, entry, one.sequence):
            return 0
        one.restored(tokens[: entry.usable])
        one.kept = entry.usable
        return entry.usable

    def release(self, one: CachedTokens) -> None:
        """The answer that used it is over; what it holds may be used again."""
        if one.busy:
            self._clock += 1
            one.busy, one.used_at = False, self._clock
            del self._owners[one.sequence]
            one.cut(len(one))

    def make_room(self, n_cells: int) -> bool:
        """Drop what was not used for longest until there are so many free cells. False if running answers hold too many."""
        assert self.unified is not None
        while self.unified.cells.free < n_cells:
            idle = [one for one in self.sequences if len(one) and not one.busy]
            if not idle:
                return False
            self._drop(min(idle, key=lambda one: one.used_at))
        return True

    def _drop(self, one: CachedTokens) -> None:
        if self.unified is not None and len(one):
            self._keep(one)
            one.cut(0)
            one.key, one.kept = "", 0

    def keep_on_disk(self) -> None:
        """Save the evaluated prompts that are worth a file. Call this when nobody is waiting."""
        for one in self.sequences:
            if not one.busy:
                self._keep(one)

    def _keep(self, one: CachedTokens) -> None:
        if self.states is None or one.canonical < KEEP_TOKENS:
            return
        one.cut(len(one))  # drops what an interrupted evaluation left
        canonical = one.reachable(one.canonical)
        if canonical < KEEP_TOKENS:
            return
        if self.unified is None:
            with one.earlier.at(canonical):
                self.states.keep(self.context, self._key, one.tokens, canonical)
            return
        if canonical - one.kept < KEEP_MORE:
            return
        on_disk = self.states.find(self._key, one.tokens[:canonical], one.unit, self.context.n_ctx)
        one.kept = 0 if on_disk is None else on_disk.usable
        if canonical - one.kept >= KEEP_MORE:
            with self._alone(self.unified, one, canonical):
                self.states.keep(self.context, self._key, one.tokens[:canonical], canonical, self.spare)
            one.kept = canonical

    @contextmanager
    def _alone(self, context: UnifiedContext, one: CachedTokens, n_tokens: int) -> Iterator[None]:
        """Inside the block, the spare sequence holds the first n_tokens of this one."""
        context.share(one.sequence, self.spare, n_tokens)
        try:
            yield
        finally:
            context.clear(self.spare)
