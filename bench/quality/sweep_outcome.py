"""What a sweep says: the figures of each value, which value is best and how sure that is; as JSON, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from yarn_edge.averages import Bucket, Mean, edges_of, mean_of, perplexity_by_position, perplexity_of
from yarn_edge.likelihood import Float64
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.report.report import Cell, Chart, Line, Picture, Report, Table

from ..scoring.windows import Window
from .best_value import Best, best_value
from .sweep_plan import Value


@dataclass
class SweptValue:
    """What was measured of one value, window by window: negative log-likelihoods and, if requested, divergences."""

    value: Value
    nll: list[Float64]
    kl: list[Float64] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Sweep:
    """A sweep as far as it got. base: the scaling swept around; reference: label of the run that divergences are from."""

    over: str
    metric: str
    base: RopeScaling
    windows: list[Window]
    ctx: int
    values: list[SweptValue] = field(default_factory=list)
    reference: str = ""
    ended: BaseException | None = None


@dataclass(frozen=True)
class ValueFigures:
    """One value. mean: nll; kl: divergence in nats; behind: mean paired difference to the best value, in nats."""

    value: float | str
    mean: Mean
    behind: Mean
    tok_per_s: float | None
    buckets: list[Bucket]
    kl: Mean | None

    @property
    def name(self) -> str:
        """The value as people write it."""
        return _named(self.value)

    @property
    def score(self) -> tuple[float, float]:
        """(what is compared, its standard error): the divergence if there is one, else the perplexity."""
        return (self.kl.mean, self.kl.stderr) if self.kl else (self.mean.perplexity, self.mean.perplexity_stderr)

    def as_json(self) -> dict[str, Any]:
        """With the names of --json."""
        divergence = {} if self.kl is None else {"kld_mean": self.kl.mean, "kld_stderr": self.kl.stderr}
        return {
            "value": self.value,
            "ppl": self.mean.perplexity,
            "stderr": self.mean.perplexity_stderr,
            "n_tokens": self.mean.n,
            "behind_best": self.behind.mean,
            "behind_best_stderr": self.behind.stderr,
            "tok_per_s": self.tok_per_s,
            "buckets": [b.as_json() for b in self.buckets],
            **divergence,
        }


@dataclass(frozen=True)
class Recommendation:
    """The best value, with the names of --json. fitted, fitted_low, fitted_high: as in `Best`."""

    value: float | str
    not_distinguishable: list[float | str]
    next_best: float | str | None
    standard_errors_ahead: float | None
    fitted: float | None
    fitted_low: float | None
    fitted_high: float | None

    @classmethod
    def of(cls, best: Best, values: Sequence[float | str]) -> Recommendation:
        """From the indices of `best`."""
        next_best = None if best.next is None else values[best.next]
        alike = [values[i] for i in best.alike]
        return cls(values[best.index], alike, next_best, best.ahead, best.fitted, best.low, best.high)


@dataclass(frozen=True)
class SweepOutcome:
    """One run of `yarn-edge sweep`, complete or not. reference: None if no divergence was measured."""

    model: str
    over: str
    metric: str
    reference: str | None
    ctx: int
    original_context: int
    factor: float
    protocol: str
    values: list[ValueFigures]
    recommended: Recommendation
    complete: bool

    @classmethod
    def of(cls, sweep: Sweep, model: str, protocol: str, width: int | None = None) -> SweepOutcome:
        """The outcome of a sweep with at least one value. model: label; width: tokens per bucket, None for the default."""
        best = best_value(
            [s.value.number for s in sweep.values],
            [s.kl if sweep.metric == "divergence" else s.nll for s in sweep.values],
        )
        positions = np.concatenate([np.arange(w.first, len(w.tokens)) for w in sweep.windows])
        edges = edges_of(max(len(w.tokens) for w in sweep.windows), width)
        values = []
        for swept, behind in zip(sweep.values, best.behind, strict=True):
            nll = np.concatenate(swept.nll)
            figures = ValueFigures(
                value=swept.value.label if swept.value.number is None else swept.value.number,
                mean=mean_of(nll),
                behind=behind,
                tok_per_s=swept.tokens / swept.seconds if swept.seconds else None,
                buckets=perplexity_by_position(nll, edges, positions),
                kl=mean_of(np.concatenate(swept.kl)) if swept.kl else None,
            )
            values.append(figures)
        return cls(
            model=model,
            over=sweep.over,
            metric=sweep.metric,
            reference=sweep.reference or None,
            ctx=sweep.ctx,
            original_context=sweep.base.original_context,
            factor=sweep.base.factor,
            protocol=protocol,
            values=values,
            recommended=Recommendation.of(best, [v.value for v in values]),
            complete=sweep.ended is None,
        )

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        return vars(self) | {
            "values": [value.as_json() for value in self.values],
            "recommended": asdict(self.recommended),
        }

    def report(self) -> Report:
        """Tables and pictures."""
        tables = (self._values_table(), self._position_table())
        return Report(f"Sweep over {self.over}", tuple(self._summary()), tables, tuple(self._pictures()))

    @property
    def _unit(self) -> str:
        return "divergence (nats)" if self.metric == "divergence" else "perplexity"

    def _values_table(self) -> Table:
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (v.value, v.score[0], v.score[1], v.behind.mean, v.behind.stderr, v.mean.n) for v in self.values
        )
        columns = (self.over, self._unit, "±", "behind best (nats)", "±", "tokens")
        explained = (
            "behind best: mean paired difference, with its standard error over blocks of 256 tokens. "
            f"Original context {self.original_context}."
        )
        return Table(f"{self._unit} over {self.over}", columns, rows, explained)

    def _position_table(self) -> Table:
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (f"{bucket.start}-{bucket.end}", *(v.buckets[i].perplexity for v in self.values))
            for i, bucket in enumerate(self.values[0].buckets)
        )
        return Table("Perplexity by position", ("positions", *(v.name for v in self.values)), rows, digits=4)

    def _pictures(self) -> list[Picture]:
        pictures: list[Picture] = []
        if self.over != "method":
            scores, errors = zip(*(v.score for v in self.values), strict=True)
            line = Line(self._unit, tuple(float(v.value) for v in self.values), scores, errors)
            best = ((float(self.recommended.value), "best"),)
            title = f"{self._unit} over {self.over}"
            pictures.append(Chart(title, self.over, self._unit, (line,), log_x=self.over == "factor", marks=best))
        middles = tuple((b.start + b.end) / 2 for b in self.values[0].buckets)
        lines = tuple(Line(v.name, middles, tuple(b.perplexity for b in v.buckets)) for v in self.values)
        original = self.original_context
        marks = ((float(original), f"original context {original}"),) if original <= self.ctx else ()
        x, y = "position (tokens)", "perplexity"
        pictures.append(Chart("Perplexity by position", x, y, lines, log_y=True, marks=marks))
        return pictures

    def _summary(self) -> list[str]:
        best = self.recommended
        name = _named(best.value) if self.over == "method" else f"{self.over} {_named(best.value)}"
        sentences = [f"best over these {self.values[0].mean.n} tokens: {name}"]
        if best.not_distinguishable:
            others = ", ".join(map(_named, best.not_distinguishable))
            sentences.append(f"not distinguishable from it on this much text (within 2 standard errors): {others}")
        if best.next_best is not None and best.standard_errors_ahead is not None:
            ahead = f"{best.standard_errors_ahead:.1f} standard errors"
            sentences.append(f"ahead of the next best, {_named(best.next_best)}, by {ahead}")
        if best.fitted is not None:
            sentences.append(
                f"a parabola through the best value and its neighbors has its minimum at {best.fitted:.4g}; 95 % of the "
                f"resamplings lie between {best.fitted_low:.4g} and {best.fitted_high:.4g}"
            )
        if self.over == "factor":
            sentences += self._price()
        if not self.complete:
            sentences.append("incomplete: the sweep ended before all values were measured")
        return sentences

    def _price(self) -> list[str]:
        """What each factor costs within the original context, relative to plain RoPE."""
        plain = next((v for v in self.values if v.value == 1), None)
        inside = [] if plain is None else [i for i, b in enumerate(plain.buckets) if b.end <= self.original_context]
        if plain is None or not inside:
            return []

        def mean(figures: ValueFigures) -> float:
            parts = [figures.buckets[i] for i in inside]
            return sum(math.log(b.perplexity) * b.n_tokens for b in parts) / sum(b.n_tokens for b in parts)

        costs = ", ".join(
            f"factor {v.value:g} {perplexity_of(mean(v) - mean(plain)) - 1:+.1%}" for v in self.values if v is not plain
        )
        return [f"perplexity within the original context, relative to plain RoPE: {costs}"] if costs else []


def _named(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
