"""What a retrieval test says: accuracy by length and depth; as JSON, table and heat map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from yarn_edge.report.report import HeatMap, Report, Table
from yarn_edge.report.ticks import token_count

from .retrieval import RetrievalCell

TITLES = {"passkey": "Passkey retrieval", "needle": "Needle in a haystack"}


def wilson_error(hits: int, n: int) -> float:
    """Standard error of the rate hits / n: half of Wilson's one-sigma interval, so that 0 of n does not count as certain."""
    rate = hits / n
    return math.sqrt(rate * (1 - rate) / n + 1 / (4 * n * n)) / (1 + 1 / n)


@dataclass(frozen=True)
class LengthFigures:
    """All depths of one length together. n_tokens: of the longest prompt."""

    length: int
    n_tokens: int
    hits: int
    trials: int

    @property
    def accuracy(self) -> float:
        """Share of the prompts that were answered with the number, 0 to 1."""
        return self.hits / self.trials

    @property
    def stderr(self) -> float:
        """Of the accuracy."""
        return wilson_error(self.hits, self.trials)

    def as_json(self) -> dict[str, Any]:
        """With the names of --json."""
        return {"length": self.length, "n": self.trials, "accuracy": self.accuracy, "stderr": self.stderr}


@dataclass(frozen=True)
class RetrievalOutcome:
    """One run of `yarn-edge passkey` with at least one answer.

    kind: a key of TITLES; declared: the context that the model declares; n_prompts: of the whole test.
    """

    model: str
    kind: str
    seed: int
    lengths: list[int]
    depths: list[float]
    declared: int
    n_prompts: int
    cells: list[RetrievalCell]
    tok_per_s: float | None

    @property
    def hits(self) -> int:
        """Numbers that were found."""
        return sum(c.hits for c in self.cells)

    @property
    def trials(self) -> int:
        """Prompts that were answered."""
        return sum(c.trials for c in self.cells)

    @property
    def by_length(self) -> list[LengthFigures]:
        """A row for each length that was measured, ascending."""
        rows = []
        for length in sorted({c.length for c in self.cells}):
            cells = [c for c in self.cells if c.length == length]
            longest, hits, trials = (
                max(c.n_tokens for c in cells),
                sum(c.hits for c in cells),
                sum(c.trials for c in cells),
            )
            rows.append(LengthFigures(length, longest, hits, trials))
        return rows

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        return {
            "model": self.model,
            "variant": self.kind,
            "seed": self.seed,
            "lengths": self.lengths,
            "cells": [_cell_as_json(c) for c in self.cells],
            "by_length": [row.as_json() for row in self.by_length],
            "accuracy": self.hits / self.trials,
            "tok_per_s": self.tok_per_s,
            "complete": self.trials == self.n_prompts,
        }

    def report(self) -> Report:
        """The table, and the heat map over lengths and depths."""
        summary = [f"{self.model} found {self.hits} of {self.trials} numbers ({self.hits / self.trials:.0%})."]
        if self.trials < self.n_prompts:
            summary.append(f"Incomplete: stopped after {self.trials} of {self.n_prompts} prompts.")
        title = TITLES[self.kind]
        columns = ("length", "prompt tokens", "prompts", "found", "accuracy", "std. error")
        rows = tuple(
            (token_count(r.length), r.n_tokens, r.trials, r.hits, r.accuracy, r.stderr) for r in self.by_length
        )
        beyond = (
            "" if max(self.lengths) <= self.declared else f"The model's context is {token_count(self.declared)} tokens."
        )
        table = Table(f"{title} by length", columns, rows, note=beyond, digits=3)
        return Report(title, tuple(summary), (table,), (self._heat_map(title),))

    def _heat_map(self, title: str) -> HeatMap:
        rates = {(c.length, c.depth): c.hits / c.trials for c in self.cells}
        return HeatMap(
            f"{title}: found by length and depth",
            "length in tokens",
            "depth",
            tuple(map(token_count, self.lengths)),
            tuple(f"{100 * d:.3g} %" for d in self.depths),
            tuple(tuple(rates.get((n, d), math.nan) for n in self.lengths) for d in self.depths),
        )


def _cell_as_json(cell: RetrievalCell) -> dict[str, Any]:
    return {
        "length": cell.length,
        "n_tokens": cell.n_tokens,
        "depth": cell.depth,
        "trials": cell.trials,
        "hits": cell.hits,
        "answers": cell.answers,
        "expected": cell.expected,
    }
