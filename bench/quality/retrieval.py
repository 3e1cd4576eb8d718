"""Asking a model for hidden numbers: one context, greedy answers, and only the part of a prompt that the cache lacks evaluated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import Advance, bar
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.recurrent import EarlierStates
from yarn_edge.signals import deferred_ctrl_c

from .retrieval_prompts import ANSWER_TOKENS, Prompt

TokensAt = tuple[int, Sequence[int]]  # a batch: the position of its first token, its tokens
_NUMBER = re.compile("[0-9]+")


@dataclass
class RetrievalCell:
    """The answers at one length and depth. n_tokens: of the longest prompt; answers: as generated."""

    length: int
    depth: float
    n_tokens: int = 0
    hits: int = 0
    answers: list[str] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)

    @property
    def trials(self) -> int:
        """Prompts that were answered."""
        return len(self.answers)

    def add(self, prompt: Prompt, answer: str) -> None:
        """Count an answer."""
        self.n_tokens = max(self.n_tokens, len(prompt.tokens))
        self.answers.append(answer)
        self.expected.append(prompt.secret.number)
        self.hits += is_hit(answer, prompt.secret.number)


def is_hit(answer: str, expected: int) -> bool:
    """True if the first digits in the answer are the number (the rule of the authors' eval/passkey.py)."""
    number = _NUMBER.search(answer)
    return number is not None and number[0].lstrip("0") == str(expected)


class Reader:
    """Answers prompts one after another in one context, evaluating only what differs from what the cache holds."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.n_evaluated, self.seconds = 0, 0.0  # tokens of prompts, and the time they took
        self._cached: Sequence[int] = ()
        self._earlier = EarlierStates(context)

    def answer(self, tokens: Sequence[int], advance: Callable[[float], None] | None = None) -> str:
        """The model's greedy answer, at most ANSWER_TOKENS long. `advance` gets the number of prompt tokens evaluated.

        Raises YarnEdgeError with the position if the logits are not finite.
        """
        with self.context.interruptible() as interrupt, deferred_ctrl_c(interrupt):
            return self._answer(tokens, advance)

    def repeat(self, evaluated: Sequence[TokensAt]) -> None:
        """Bring the cache to the bits that these batches left in it, each cutting what came before at its position."""
        for at, tokens in evaluated:
            self._earlier.cut(at)
            self.context.evaluate(tokens, at, 0)
            self._cached = (*self._cached[:at], *tokens)

    def _answer(self, tokens: Sequence[int], advance: Callable[[float], None] | None) -> str:
        same = self._earlier.cut(shared(self._cached, tokens))
        self._cached = tokens[:same]  # what the cache holds if the evaluation is stopped
        began = time.perf_counter()
        self.context.evaluate(tokens[same:], same, "last", advance)
        self.seconds += time.perf_counter() - began
        self.n_evaluated += len(tokens) - same
        self._cached = tokens
        model, answer = self.context.model, b""
        for at in range(len(tokens), len(tokens) + ANSWER_TOKENS):
            token = self._most_probable(at - 1)
            if model.is_end(token):
                break
            answer += model.token_bytes(token, special=False)
            if at + 1 < len(tokens) + ANSWER_TOKENS:
                self.context.evaluate([token], at)
        return answer.decode("utf-8", errors="replace")

    def _most_probable(self, position: int) -> int:
        logits = self.context.logits()[-1]
        best = int(logits.argmax())  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise YarnEdgeError(
                f"{self.context.model.path}: the logits at position {position} are {logits[best]}: the model cannot run that "
                "far with these weights, this scaling and this cache type"
            )
        return best


def shared(cached: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens both begin with, not counting the last of `tokens`: it is always evaluated, for its logits."""
    for i, (mine, theirs) in enumerate(zip(cached, tokens[:-1], strict=False)):
        if mine != theirs:
            return i
    return min(len(cached), len(tokens) - 1)


def tokens_to_read(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens of the prompts are evaluated, one prompt after the other, in a cache that is empty at first."""
    before: list[Sequence[int]] = [(), *prompts]
    return sum(len(tokens) - shared(old, tokens) for old, tokens in zip(before, prompts, strict=False))


def cells_of(prompts: Sequence[Prompt], answers: Sequence[str | None]) -> list[RetrievalCell]:
    """The cells that have an answer, by length and depth. answers: of the first prompts, None for one that has none."""
    cells: dict[tuple[int, float], RetrievalCell] = {}
    for prompt, answer in zip(prompts, answers, strict=False):
        if answer is not None:
            key = (prompt.length, prompt.depth)
            cells.setdefault(key, RetrievalCell(*key)).add(prompt, answer)
    return [cells[key] for key in sorted(cells)]


def evaluated_before(prompts: Sequence[Sequence[int]], n_batch: int) -> list[list[TokensAt]]:
    """For each prompt, the batches of earlier prompts that the cache still begins with when its turn comes, in their order.

    How a token's keys and values are rounded depends on the batch that it was in.
    """
    found: list[list[TokensAt]] = []
    held: list[TokensAt] = []
    old: Sequence[int] = ()
    for tokens in prompts:
        same = shared(old, tokens)
        held = [(at, part) for at, part in held if at < same]
        found.append(held)
        held = [*held, *((at, tokens[at : at + n_batch]) for at in range(same, len(tokens), n_batch))]
        old = tokens
    return found


class Retrieval:
    """A run over prompts, in their order. `answers` holds what was measured so far, also after an interruption."""

    def __init__(self, context: Context, prompts: Sequence[Prompt]) -> None:
        self.reader, self.prompts = Reader(context), prompts
        self.answers: list[str] = []

    @property
    def tok_per_s(self) -> float | None:
        """Speed of reading prompts, not counting what came from the cache; None before the first."""
        return self.reader.n_evaluated / self.reader.seconds if self.reader.n_evaluated else None

    def go(self) -> None:
        """Answer every prompt."""
        total, hits = tokens_to_read([p.tokens for p in self.prompts]), 0
        with bar("Asking", total, "tokens") as advance:
            for done, prompt in enumerate(self.prompts):
                what = f"{prompt.length} tokens, depth {prompt.depth:.0%}, {hits}/{done}"
                advance(0, what)
                answer = self.reader.answer(prompt.tokens, _showing(advance, what))
                self.answers.append(answer)
                hits += is_hit(answer, prompt.secret.number)


def _showing(advance: Advance, what: str) -> Callable[[float], None]:
    return lambda amount: advance(amount, what)
