"""Passkey on several workers: runs of neighboring prompts as units, so that each still reads only what differs from the one before.

A unit begins with the batches that one process would have in its cache by then, so that the answers come from the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from yarn_edge.jobs.crew import Crew
from yarn_edge.jobs.run import run_units
from yarn_edge.jobs.unit import Unit, UnitResult, kept_open
from yarn_edge.runtime.context_settings import ContextSettings

from ..scoring.sent import SentVariant, context_of_sent, settings_identity, unit_key
from ..scoring.variants import Variant
from .retrieval import Reader, TokensAt, evaluated_before, tokens_to_read
from .retrieval_prompts import Prompt


class RetrievalOn:
    """A run over prompts. `answers` holds what came back so far, None for the others; tok_per_s: of all workers together."""

    def __init__(self, crew: Crew, variant: Variant, settings: ContextSettings, prompts: Sequence[Prompt]) -> None:
        self.answers: list[str | None] = [None] * len(prompts)
        self._crew, self._sent, self._settings, self._prompts = crew, SentVariant.of(variant), settings, prompts
        self._tokens, self._seconds = 0, 0.0

    @property
    def tok_per_s(self) -> float | None:
        """Tokens of prompts read in a second by all workers; None before the first."""
        return self._tokens / self._seconds * self._crew.n_workers if self._seconds else None

    def go(self) -> None:
        """Ask for every number, the longest prompts first."""
        pieces = pieces_of(self._prompts, self._crew.n_workers)
        before = evaluated_before([p.tokens for p in self._prompts], self._settings.n_batch)
        units = [self._unit(piece, before[piece[0]]) for piece in pieces]

        def take(index: int, result: UnitResult) -> None:
            for at, answer in zip(pieces[index], result.facts["answers"], strict=True):
                self.answers[at] = answer
            self._tokens += result.facts["tokens"]
            self._seconds += result.facts["seconds"]

        run_units(units, self._crew, "Asking", take)

    def _unit(self, piece: Sequence[int], evaluated: Sequence[TokensAt]) -> Unit:
        tokens = [tuple(self._prompts[i].tokens) for i in piece]
        before = [(at, tuple(part)) for at, part in evaluated]
        key = unit_key("answer_prompts", [self._sent.identity(), settings_identity(self._settings), tokens, before])
        label = f"{self._prompts[piece[0]].length} tokens"
        return Unit(answer_prompts, (self._sent, self._settings, tokens, before), key, label, tokens_to_read(tokens))


def pieces_of(prompts: Sequence[Prompt], n_workers: int) -> list[range]:
    """The indices of the prompts of each unit: those of a length, in at most `n_workers` pieces; the longest first."""
    pieces = []
    for _, group in groupby(range(len(prompts)), key=lambda i: prompts[i].length):
        first, *rest = group
        n = 1 + len(rest)
        size = -(-n // n_workers)
        pieces += [range(first + at, first + min(at + size, n)) for at in range(0, n, size)]
    return sorted(pieces, key=lambda piece: -prompts[piece[0]].length)


def answer_prompts(
    sent: SentVariant, settings: ContextSettings, prompts: Sequence[Sequence[int]], before: Sequence[TokensAt]
) -> UnitResult:
    """On a worker: the answers to prompts, in one cache that begins with the batches `before`."""
    context = kept_open((sent, settings), lambda: context_of_sent(sent, settings))
    context.clear()
    reader = Reader(context)
    if not context.model.recurrent:  # such a model reads every prompt from its beginning
        reader.repeat(before)
    answers = [reader.answer(tokens) for tokens in prompts]
    return UnitResult(facts={"answers": answers, "tokens": reader.n_evaluated, "seconds": reader.seconds})
