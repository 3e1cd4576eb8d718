"""What the scores of a text say: perplexity overall, by context length and by position; as JSON, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from yarn_edge.averages import Bucket, Mean, edges_of, lengths_up_to, mean_of, perplexity_by_position
from yarn_edge.progress import note
from yarn_edge.report.report import Chart, Line, Picture, Report, Table

from ..scoring.evaluate import Scores
from ..scoring.variants import Variant
from .text_settings import TextSettings


@dataclass(frozen=True)
class ScoredText:
    """What was scored. ctx: tokens per window; trained: context that the model declares; attention: which one computed it; ended: what
    ended the run early."""

    scores: Scores
    ctx: int
    trained: int
    attention: str
    ended: BaseException | None = None


class CurvePoint(NamedTuple):
    """The mean nll of the tokens before a length, and the number of documents that count there."""

    length: int
    mean: Mean
    n_documents: int


@dataclass(frozen=True)
class PerplexityFigures:
    """Mean nll over all tokens, by length, and by position. by_window: perplexity with each window counted equally."""

    total: Mean
    curve: list[CurvePoint]
    buckets: list[Bucket]
    by_window: float


def summarize(
    scores: Scores, protocol: str, ctx: int, points: Sequence[int] | None, width: int | None
) -> PerplexityFigures:
    """The figures of scores, as far as the run came. points: lengths of the curve; width: tokens per bucket; None for defaults.

    Every token before a length counts at that length. truncated: only documents at least that long count, each of them equally
    (the authors' mean). by_window averages as the authors' code does: each window equally, however many tokens it scored.
    """
    index, document, nll = scores.flat()
    longest = max(len(w.tokens) for w in scores.windows)
    reached = int(index.max()) + 1
    curve = []
    for length in points or lengths_up_to(min(ctx, longest)):
        if protocol in ("llama.cpp", "sliding") or length > reached:
            continue
        before = index < length
        mean, n_documents = mean_of(nll[before]), len(np.unique(document[before]))
        if protocol == "truncated":
            whole = [d for d in np.unique(document) if index[document == d].max() + 1 >= length]
            mean_of_each = mean_of(np.array([nll[before & (document == d)].mean() for d in whole]))
            mean, n_documents = replace(mean_of_each, n=int((before & np.isin(document, whole)).sum())), len(whole)
        if mean.n:
            curve.append(CurvePoint(length, mean, n_documents))
    missing = [length for length in points or () if length > reached]
    if missing:
        note(f"no text reaches {missing[0]} tokens: the curve ends before that length")
    windows = np.array([float(np.nanmean(part)) for part in scores.nll if np.isfinite(part).any()])
    buckets = perplexity_by_position(nll, edges_of(longest, width), index)
    return PerplexityFigures(mean_of(nll), curve, buckets, mean_of(windows).perplexity)


@dataclass(frozen=True)
class PerplexityOutcome:
    """One run of `yarn-edge perplexity`, complete or not."""

    variant: Variant
    settings: TextSettings
    scored: ScoredText
    figures: PerplexityFigures

    @classmethod
    def of(
        cls,
        variant: Variant,
        settings: TextSettings,
        scored: ScoredText,
        points: Sequence[int] | None = None,
        width: int | None = None,
    ) -> PerplexityOutcome:
        """The outcome of scores; points and width as in `summarize`."""
        figures = summarize(scored.scores, settings.protocol, scored.ctx, points, width)
        return cls(variant, settings, scored, figures)

    @property
    def complete(self) -> bool:
        """Whether the whole text was scored."""
        return self.scored.ended is None

    @property
    def tok_per_s(self) -> float | None:
        """Tokens evaluated per second in this process; None if all scores came from a file."""
        scores = self.scored.scores
        return scores.tokens / scores.seconds if scores.seconds else None

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        scores, figures, protocol = self.scored.scores, self.figures, self.settings.protocol
        return {
            "model": str(self.variant.path),
            "variant": self.variant.label,
            "kv_type": self.variant.kv_type,
            "protocol": protocol,
            "ctx": self.scored.ctx,
            "attention": self.scored.attention,
            "stride": self.settings.stride if protocol == "sliding" else None,
            "n_tokens": figures.total.n,
            "n_windows": len(scores.windows),
            "n_documents": len({w.document for w in scores.windows}),
            "ppl": figures.total.perplexity,
            "stderr": figures.total.perplexity_stderr,
            "ppl_by_window": figures.by_window,
            "curve": [
                {"ctx": length, "ppl": m.perplexity, "stderr": m.perplexity_stderr, "n_tokens": m.n, "n_documents": n}
                for length, m, n in figures.curve
            ],
            "buckets": [b.as_json() for b in figures.buckets],
            "seconds": scores.seconds,
            "tok_per_s": self.tok_per_s,
            "complete": self.complete,
        }

    def report(self) -> Report:
        """Tables and pictures."""
        return Report(
            f"Perplexity of {self._name}", tuple(self._summary()), tuple(self._tables()), tuple(self._pictures())
        )

    @property
    def _name(self) -> str:
        return self.variant.label if "@" in self.variant.label else self.variant.path.name

    def _summary(self) -> list[str]:
        total, protocol = self.figures.total, self.settings.protocol
        speed = "" if not self.tok_per_s else f", {self.tok_per_s:.0f} tok/s"
        said = [
            f"perplexity {total.perplexity:.4f} ± {total.perplexity_stderr:.4f} over {total.n} tokens "
            f"(protocol {protocol}, context {self.scored.ctx}, {self.variant.kv_type} cache, {self.scored.attention} attention{speed})"
        ]
        if protocol == "sliding":
            said.append(f"with each window counted equally, as in the paper's code: {self.figures.by_window:.4f}")
        if not self.complete:
            said.append("incomplete: the run ended before the text did")
        return said

    def _tables(self) -> list[Table]:
        tables = []
        if self.figures.curve:
            rows = tuple((length, m.perplexity, m.perplexity_stderr, m.n, n) for length, m, n in self.figures.curve)
            explained = "Perplexity of all tokens of each document up to the context length."
            if self.settings.protocol == "truncated":
                explained = "Documents cut to the context length, each counted equally; shorter documents are left out."
            columns = ("context", "perplexity", "±", "tokens", "documents")
            tables.append(Table("Perplexity by context length", columns, rows, explained))
        by_bucket = tuple((b.start, b.end, b.perplexity, b.stderr, b.n_tokens) for b in self.figures.buckets)
        tables.append(Table("Perplexity by position", ("from", "to", "perplexity", "±", "tokens"), by_bucket))
        return tables

    def _pictures(self) -> list[Picture]:
        trained, buckets, curve = self.scored.trained, self.figures.buckets, self.figures.curve
        marks = ((float(trained), f"declared context {trained}"),) if trained <= self.scored.ctx else ()
        middles = tuple((b.start + b.end) / 2 for b in buckets)
        line = Line(self._name, middles, tuple(b.perplexity for b in buckets), tuple(b.stderr for b in buckets))
        title, y = "Perplexity by position", "perplexity"
        pictures: list[Picture] = [Chart(title, "position (tokens)", y, (line,), log_y=True, marks=marks)]
        if len(curve) > 1:
            lengths = tuple(float(point.length) for point in curve)
            values = tuple(point.mean.perplexity for point in curve)
            line = Line(self._name, lengths, values, tuple(point.mean.perplexity_stderr for point in curve))
            title = "Perplexity by context length"
            pictures.append(Chart(title, "context (tokens)", y, (line,), log_x=True, log_y=True, marks=marks))
        return pictures
