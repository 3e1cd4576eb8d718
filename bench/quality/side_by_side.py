"""A base and its candidates over the same windows: side by side in one process, or, where memory does not hold them together,
the base first (its distributions kept on the disk) and the candidates one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar, note
from yarn_edge.runtime.attention import FlashAttention
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.kv_cache import known_kv_bytes
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.machine import available_bytes
from yarn_edge.runtime.model import Model

from ..scoring.evaluate import BatchPlan, ScoredBatch, batch_plan_of, batches, check_finite, open_context, stoppable
from ..scoring.likelihood import Divergences, Float64, Rows
from ..scoring.variants import Variant
from ..scoring.windows import Window
from .stored_distributions import Distributions

COMPUTE_BYTES = 160 << 20  # of a context besides cache and logits, about


@dataclass
class CandidateOutcome:
    """Of one candidate, window by window: what `Divergences` has. forward_s: seconds of evaluation."""

    variant: Variant
    parts: list[list[Divergences]] = field(default_factory=list)
    forward_s: float = 0.0

    def of_windows(self, name: str) -> list[Float64]:
        """One field, an array for each window that has values."""
        return [np.concatenate([getattr(d, name) for d in window]) for window in self.parts if window]


@dataclass
class ModelComparison:
    """Everything measured. base_forward_s, seconds: of evaluation, of the whole; loss: of keeping the base on the disk."""

    windows: Sequence[Window]
    base: Variant
    outcomes: list[CandidateOutcome]
    base_forward_s: float = 0.0
    seconds: float = 0.0
    kept_bytes: int = 0
    kept_rows: int = 0
    loss: dict[str, tuple[float, float]] = field(default_factory=dict)
    ended: BaseException | None = None


def plan_for_all(
    models: Sequence[Model], variants: Sequence[Variant], n_ctx: int, attention: FlashAttention
) -> BatchPlan:
    """One plan for all, so that nothing but what is compared differs: the smallest batch, flash attention if one needs it."""
    plans = [
        batch_plan_of(m.gguf, m.n_vocab, n_ctx, v.kv_type, v.backend, attention)
        for m, v in zip(models, variants, strict=True)
    ]
    kinds = {plan.flash_attention for plan in plans}
    if len(kinds) > 1 and attention == "auto":
        plans = [
            batch_plan_of(m.gguf, m.n_vocab, n_ctx, v.kv_type, v.backend, "on")
            for m, v in zip(models, variants, strict=True)
        ]
        kinds = {"on"}
    return BatchPlan(min(plan.n_batch for plan in plans), kinds.pop())


def fits_together(variants: Sequence[Variant], n_ctx: int, n_vocab: int) -> bool:
    """Whether the files, caches and logits of all variants fit into the memory that is free."""
    free = available_bytes()
    weights = {v.weights: sum(t.n_bytes for t in v.gguf.tensors.values()) for v in variants}
    caches = sum(known_kv_bytes(v.gguf, n_ctx, v.kv_type) or 0 for v in variants)
    plans = [batch_plan_of(v.gguf, n_vocab, n_ctx, v.kv_type, v.backend) for v in variants]
    logits = sum(2 * 4 * plan.n_batch * n_vocab + COMPUTE_BYTES for plan in plans)
    return sum(weights.values()) + caches + logits <= free


@contextmanager
def models_of(variants: Sequence[Variant]) -> Iterator[list[Model]]:
    """A loaded model for each variant; those with the same weights share one."""
    with ExitStack() as stack:
        loaded: dict[tuple[object, ...], Model] = {}
        for variant in variants:
            if variant.weights not in loaded:
                loaded[variant.weights] = stack.enter_context(variant.load())
        yield [loaded[variant.weights] for variant in variants]


def side_by_side(comparison: ModelComparison, n_ctx: int, threads: int | None, attention: FlashAttention) -> None:
    """All contexts step through the windows together; the base's logits are read where they lie."""
    variants = [comparison.base, *(o.variant for o in comparison.outcomes)]
    spent = [0.0] * len(variants)
    total = sum(len(w.tokens) - 1 for w in comparison.windows)
    with ExitStack() as stack:
        rows = stack.enter_context(Rows(threads or physical_threads()))
        models = stack.enter_context(models_of(variants))
        plan = plan_for_all(models, variants, n_ctx, attention)
        contexts = [
            stack.enter_context(open_context(m, v, n_ctx, threads, plan=plan))
            for m, v in zip(models, variants, strict=True)
        ]
        stack.enter_context(stoppable(*contexts))
        advance = stack.enter_context(bar(f"Comparing {len(contexts)} runs", total, "tokens"))
        try:
            for window in comparison.windows:
                _clear(contexts, comparison.outcomes)
                for base, *others in batches(contexts, window, advance, spent=spent):
                    log_z, top = rows.log_normalizers(base.logits), base.logits.argmax(axis=1)
                    found = [rows.divergences(base.logits, log_z, top, b.logits, b.targets) for b in others]
                    for outcome, divergences in zip(comparison.outcomes, found, strict=True):
                        _check(divergences, window, base.first, outcome.variant, comparison.base)
                    for outcome, divergences in zip(comparison.outcomes, found, strict=True):
                        outcome.parts[-1].append(divergences)
        finally:
            comparison.base_forward_s = spent[0]
            for outcome, seconds in zip(comparison.outcomes, spent[1:], strict=True):
                outcome.forward_s = seconds


def _clear(contexts: Sequence[Context], outcomes: Sequence[CandidateOutcome]) -> None:
    for context in contexts:
        context.clear()
    for outcome in outcomes:
        outcome.parts.append([])


def _check(found: Divergences, window: Window, first: int, variant: Variant, base: Variant) -> None:
    check_finite(found.base_nll, window, first, base.path)
    check_finite(found.nll, window, first, variant.path)
    if not np.isfinite(found.kl).all():
        raise YarnEdgeError(
            f"{variant.label}: rules out a token that {base.label} does not: the divergence is infinite"
        )


def one_after_the_other(
    comparison: ModelComparison, n_ctx: int, threads: int | None, attention: FlashAttention, scratch: Path | None
) -> None:
    """The base alone, its distributions kept on the disk; then each candidate alone."""
    variants = [comparison.base, *(o.variant for o in comparison.outcomes)]
    with Distributions(scratch) as kept, Rows(threads or physical_threads()) as rows:

        def keep(batch: ScoredBatch, window: Window) -> None:
            check_finite(kept.add(batch, rows), window, batch.first, comparison.base.path)

        plan = _plan_alone(variants, n_ctx, attention)
        comparison.base_forward_s = _alone(comparison.base, comparison, n_ctx, threads, plan, keep, lambda: None)
        comparison.kept_bytes, comparison.kept_rows = kept.n_bytes, kept.n_rows
        note(f"the base's distributions of {kept.n_rows} tokens take {kept.n_bytes / 1e6:.0f} MB on the disk")
        for outcome in comparison.outcomes:
            kept.rewind()
            stored = _Stored(kept, rows, outcome, comparison.base)
            outcome.forward_s = _alone(outcome.variant, comparison, n_ctx, threads, plan, stored.take_in, stored.begin)
            comparison.loss[outcome.variant.label] = stored.loss()


class _Stored:
    """A candidate against the stored base."""

    def __init__(self, kept: Distributions, rows: Rows, outcome: CandidateOutcome, base: Variant) -> None:
        self._kept, self._rows, self._outcome, self._base = kept, rows, outcome, base
        self._true: list[Float64] = []
        self._n_rows = 0

    def begin(self) -> None:
        self._outcome.parts.append([])

    def take_in(self, batch: ScoredBatch, window: Window) -> None:
        self._true.append(self._kept.exact(batch, self._n_rows, self._rows))
        self._n_rows += len(batch.targets)
        found = self._kept.compare(batch, self._rows)
        _check(found, window, batch.first, self._outcome.variant, self._base)
        self._outcome.parts[-1].append(found)

    def loss(self) -> tuple[float, float]:
        """Mean divergence by what was stored and by the whole distributions, over the tokens that have both."""
        whole = np.concatenate(self._true)
        stored = np.concatenate(self._outcome.of_windows("kl"))[: len(whole)]
        return float(stored.mean()), float(whole.mean())


def _plan_alone(variants: Sequence[Variant], n_ctx: int, attention: FlashAttention) -> BatchPlan:
    with ExitStack() as stack:
        heads = [stack.enter_context(Model(v.path, vocab_only=True, gguf=v.gguf)) for v in variants]
        return plan_for_all(heads, variants, n_ctx, attention)


def _alone(
    variant: Variant,
    comparison: ModelComparison,
    n_ctx: int,
    threads: int | None,
    plan: BatchPlan,
    take_in: Callable[[ScoredBatch, Window], None],
    begin: Callable[[], None],
) -> float:
    """One variant over all windows; returns its seconds of evaluation."""
    spent = [0.0]
    total = sum(len(w.tokens) - 1 for w in comparison.windows)
    with (
        variant.load() as model,
        open_context(model, variant, n_ctx, threads, plan=plan) as context,
        stoppable(context),
        bar(variant.label, total, "tokens") as advance,
    ):
        for window in comparison.windows:
            context.clear()
            begin()
            for (batch,) in batches([context], window, advance, spent=spent):
                take_in(batch, window)
    return spent[0]
