"""What a comparison says: divergence, top-1 agreement and perplexity of each candidate, by position; as JSON, tables, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.averages import Mean, edges_of, mean_of, paired, perplexity_of
from yarn_edge.report.report import Cell, Chart, Line, Picture, Report, Table

from ..scoring.variants import split_variant
from .side_by_side import CandidateOutcome, ModelComparison
from .text_settings import TextSettings


@dataclass(frozen=True)
class DivergenceBucket:
    """Tokens predicted at positions [start, end): divergence in nats, the share of equal top tokens (0 to 1), perplexity."""

    start: int
    end: int
    n_tokens: int
    kld_mean: float
    kld_stderr: float
    top1: float
    ppl: float
    ppl_ratio: float


@dataclass(frozen=True)
class CandidateFigures:
    """One candidate, with the names of --json. Divergences are in nats, top1 and delta_p from 0 to 1, forward_s in seconds."""

    model: str
    n_tokens: int
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_p90: float
    kld_p99: float
    kld_p99_9: float
    kld_max: float
    top1: float
    top1_stderr: float
    delta_p_mean: float
    delta_p_stderr: float
    delta_p_rms: float
    ppl: float
    ppl_stderr: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    forward_s: float
    buckets: list[DivergenceBucket]


def figures_of(comparison: ModelComparison, candidate: CandidateOutcome, width: int | None) -> CandidateFigures:
    """The figures of a candidate over what was measured. width: tokens per bucket, None for the default."""
    kl, nll, base_nll = (np.concatenate(candidate.of_windows(name)) for name in ("kl", "nll", "base_nll"))
    same = np.concatenate(candidate.of_windows("same_top"))
    delta = np.exp(-nll) - np.exp(-base_nll)
    mean, moved, ppl = mean_of(kl), mean_of(delta), mean_of(nll)
    ratio = paired(candidate.of_windows("nll"), candidate.of_windows("base_nll"))
    top1 = float(same.mean())
    p90, p99, p99_9 = (float(np.quantile(kl, q)) for q in (0.9, 0.99, 0.999))
    positions, buckets = _positions(comparison, candidate), []
    for start, end in pairwise(edges_of(max(len(w.tokens) for w in comparison.windows), width)):
        inside = (positions >= start) & (positions < end)
        if inside.any():
            part = mean_of(kl[inside])
            there, apart = mean_of(nll[inside]), perplexity_of(float((nll - base_nll)[inside].mean()))
            equal = float(same[inside].mean())
            buckets.append(DivergenceBucket(start, end, part.n, part.mean, part.stderr, equal, there.perplexity, apart))
    return CandidateFigures(
        model=candidate.variant.label,
        n_tokens=mean.n,
        kld_mean=mean.mean,
        kld_stderr=mean.stderr,
        kld_median=float(np.median(kl)),
        kld_p90=p90,
        kld_p99=p99,
        kld_p99_9=p99_9,
        kld_max=float(kl.max()),
        top1=top1,
        top1_stderr=math.sqrt(top1 * (1 - top1) / max(1, len(same) - 1)),
        delta_p_mean=moved.mean,
        delta_p_stderr=moved.stderr,
        delta_p_rms=float(np.sqrt((delta**2).mean())),
        ppl=ppl.perplexity,
        ppl_stderr=ppl.perplexity_stderr,
        ppl_ratio=ratio.perplexity,
        ppl_ratio_stderr=ratio.perplexity_stderr,
        forward_s=candidate.forward_s,
        buckets=buckets,
    )


def _positions(comparison: ModelComparison, candidate: CandidateOutcome) -> npt.NDArray[np.int64]:
    """Positions of the predicted tokens that were measured."""
    found = [
        np.arange(window.first, window.first + sum(len(d.kl) for d in parts))
        for window, parts in zip(comparison.windows, candidate.parts, strict=False)
    ]
    return np.concatenate(found)


@dataclass(frozen=True)
class BaseOnDisk:
    """The base's distributions as they were stored. loss: by candidate, (mean KL from what was stored, true mean KL), in nats."""

    n_bytes: int
    n_tokens: int
    loss: dict[str, tuple[float, float]]

    def as_json(self) -> dict[str, Any]:
        """With the names of --json."""
        loss = {name: {"kld_stored": stored, "kld_true": true} for name, (stored, true) in self.loss.items()}
        return {"bytes": self.n_bytes, "tokens": self.n_tokens, "loss": loss}

    def sentence(self) -> str:
        """Size, and what storing changed."""
        size = f"the base's distributions took {self.n_bytes / self.n_tokens / 1e3:.1f} kB per token on disk"
        changes = [stored / true - 1 for stored, true in self.loss.values() if true > 0]
        if changes:
            size += f"; on the tokens that were kept whole, storing changed the divergence by at most {max(changes, key=abs):+.2%}"
        return size


@dataclass(frozen=True)
class ComparisonOutcome:
    """One run of `yarn-edge compare`, complete or not. base_mean: mean nll of the base; times in seconds."""

    base: str
    base_mean: Mean
    protocol: str
    ctx: int
    attention: str
    models: list[CandidateFigures]
    seconds: float
    forward_s: float
    base_forward_s: float
    base_on_disk: BaseOnDisk | None
    complete: bool

    @classmethod
    def of(
        cls, comparison: ModelComparison, ctx: int, settings: TextSettings, width: int | None = None
    ) -> ComparisonOutcome:
        """The outcome of a comparison in which at least one candidate was measured; width as in `figures_of`."""
        measured = [candidate for candidate in comparison.outcomes if candidate.of_windows("kl")]
        stored = None
        if comparison.kept_bytes:
            stored = BaseOnDisk(comparison.kept_bytes, comparison.kept_rows, dict(comparison.loss))
        return cls(
            base=comparison.base.label,
            base_mean=mean_of(np.concatenate(measured[0].of_windows("base_nll"))),
            protocol=settings.protocol,
            ctx=ctx,
            attention=comparison.attention,
            models=[figures_of(comparison, candidate, width) for candidate in measured],
            seconds=comparison.seconds,
            forward_s=comparison.base_forward_s + sum(o.forward_s for o in comparison.outcomes),
            base_forward_s=comparison.base_forward_s,
            base_on_disk=stored,
            complete=comparison.ended is None,
        )

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        return {
            "base": self.base,
            "base_ppl": self.base_mean.perplexity,
            "base_ppl_stderr": self.base_mean.perplexity_stderr,
            "protocol": self.protocol,
            "ctx": self.ctx,
            "attention": self.attention,
            "models": [asdict(figures) for figures in self.models],
            "seconds": self.seconds,
            "forward_s": self.forward_s,
            "base_forward_s": self.base_forward_s,
            "base_on_disk": None if self.base_on_disk is None else self.base_on_disk.as_json(),
            "complete": self.complete,
        }

    def report(self) -> Report:
        """Tables and pictures."""
        names = [short_label(figures.model, self.base) for figures in self.models]
        base = short_label(self.base, "")
        tables = (_divergence_table(self, base, names), _position_table(self.models, names))
        return Report(f"Comparison with {base}", tuple(self._summary()), tables, tuple(_pictures(self.models, names)))

    def _summary(self) -> list[str]:
        sentences = [
            f"{self.models[0].n_tokens} tokens, protocol {self.protocol}, context {self.ctx}, {self.attention} attention; "
            f"{self.seconds:.0f} s, "
            f"{self.seconds / self.forward_s:.2f} times the forward passes"
        ]
        if self.base_on_disk is not None:
            sentences.append(self.base_on_disk.sentence())
        if not self.complete:
            sentences.append("incomplete: the run ended before the text did")
        return sentences


# column -> (field of CandidateFigures, what it is multiplied by)
_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("KL mean", "kld_mean", 1),
    ("±", "kld_stderr", 1),
    ("median", "kld_median", 1),
    ("p99", "kld_p99", 1),
    ("max", "kld_max", 1),
    ("top-1 %", "top1", 100),
    ("Δp rms %", "delta_p_rms", 100),
    ("perplexity", "ppl", 1),
    ("ratio", "ppl_ratio", 1),
    ("±", "ppl_ratio_stderr", 1),
)


def _divergence_table(outcome: ComparisonOutcome, base: str, names: Sequence[str]) -> Table:
    shown = list(_COLUMNS)
    if len({m.n_tokens for m in outcome.models}) > 1:  # the run ended early, one candidate after the other
        shown.append(("tokens", "n_tokens", 1))
    columns = ("candidate", *(column for column, _field, _unit in shown))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(unit * getattr(m, field) for _column, field, unit in shown))
        for name, m in zip(names, outcome.models, strict=True)
    )
    explained = f"KL(base || candidate) in nats; the base's perplexity is {outcome.base_mean.perplexity:.4f}. ± are standard errors."
    return Table(f"Divergence from {base}", columns, rows, explained, digits=3)


def _position_table(models: Sequence[CandidateFigures], names: Sequence[str]) -> Table:
    """One row per bucket. Of a candidate that was measured less far, the later buckets are missing."""
    means = [{b.start: b.kld_mean for b in m.buckets} for m in models]
    rows = tuple((f"{b.start}-{b.end}", *(mean.get(b.start) for mean in means)) for b in models[0].buckets)
    return Table("KL mean by position", ("positions", *names), rows, digits=3)


def _pictures(models: Sequence[CandidateFigures], names: Sequence[str]) -> list[Picture]:
    divergence, agreement = [], []
    for name, m in zip(names, models, strict=True):
        middles = tuple((b.start + b.end) / 2 for b in m.buckets)
        errors = tuple(b.kld_stderr for b in m.buckets)
        divergence.append(Line(name, middles, tuple(b.kld_mean for b in m.buckets), errors))
        agreement.append(Line(name, middles, tuple(b.top1 for b in m.buckets)))
    x = "position (tokens)"
    return [
        Chart("KL divergence (nats) by position", x, "KL divergence (nats)", tuple(divergence), log_y=True),
        Chart("top-1 agreement by position", x, "top-1 agreement", tuple(agreement)),
    ]


def short_label(label: str, base: str) -> str:
    """A variant's label without its folder, and without the file name if that is the base's."""
    path, how = split_variant(label)
    if how and path == split_variant(base)[0]:
        return "@" + ",".join(how)
    return "@".join([Path(path).name, *([",".join(how)] if how else [])])
