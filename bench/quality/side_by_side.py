"""A base and its candidates over the same windows: side by side in one process; or, if memory cannot hold them together, first the
base, with its distributions kept on disk, and then the candidates one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.likelihood import Divergences, Float64, Rows
from yarn_edge.memory.plan import Simulation
from yarn_edge.memory.together import fit_together
from yarn_edge.progress import bar, note
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model

from ..scoring.evaluate import ScoredBatch, batch_settings, batches, check_finite, stoppable
from ..scoring.variants import Variant
from ..scoring.windows import Window
from .stored_distributions import Distributions


@dataclass
class CandidateOutcome:
    """One candidate's `Divergences`, window by window. forward_s: seconds of evaluation."""

    variant: Variant
    parts: list[list[Divergences]] = field(default_factory=list)
    forward_s: float = 0.0

    def of_windows(self, name: str) -> list[Float64]:
        """One field of `Divergences`, as an array for each window that has values."""
        return [np.concatenate([getattr(d, name) for d in window]) for window in self.parts if window]


@dataclass
class ModelComparison:
    """Everything measured. attention: of all runs. base_forward_s: seconds of evaluating the base; seconds: of everything. kept_bytes,
    kept_rows: of the base on disk; loss: for each candidate, (mean divergence from what was stored, from the whole distributions).
    ended: what stopped it.
    """

    windows: Sequence[Window]
    base: Variant
    outcomes: list[CandidateOutcome]
    attention: str = ""
    base_forward_s: float = 0.0
    seconds: float = 0.0
    kept_bytes: int = 0
    kept_rows: int = 0
    loss: dict[str, tuple[float, float]] = field(default_factory=dict)
    ended: BaseException | None = None


def shared_settings(
    models: Sequence[Model], variants: Sequence[Variant], n_ctx: int, threads: int | None, attention: Attention
) -> list[ContextSettings]:
    """Each variant's settings, with one batch and one attention for all, so that only what is compared differs.

    That is the smallest batch, and flash attention if one variant needs it.
    """

    def settings_with(attention: Attention) -> list[ContextSettings]:
        pairs = zip(models, variants, strict=True)
        return [batch_settings(m.gguf, m.n_vocab, v, n_ctx, threads, attention) for m, v in pairs]

    each = settings_with(attention)
    if len({settings.attention for settings in each}) > 1:
        each = settings_with("flash")
    n_batch = min(settings.n_batch for settings in each)
    return [replace(settings, n_batch=n_batch, n_ubatch=n_batch) for settings in each]


def fit_in_memory(variants: Sequence[Variant], n_ctx: int, attention: Attention) -> bool:
    """Whether the models and contexts of all variants fit into free memory at once. Raises YarnEdgeError."""
    with ExitStack() as stack:
        simulations: dict[tuple[object, ...], Simulation] = {}
        for variant in variants:
            if variant.weights not in simulations:
                simulated = Simulation(variant.path, device=variant.device(), gguf=variant.gguf)
                simulations[variant.weights] = stack.enter_context(simulated)
        of_each = [simulations[variant.weights] for variant in variants]
        settings = shared_settings([s.model for s in of_each], variants, n_ctx, None, attention)
        return fit_together(list(zip(of_each, settings, strict=True)))


@contextmanager
def models_of(variants: Sequence[Variant]) -> Iterator[list[Model]]:
    """A loaded model for each variant; variants with the same weights share one."""
    with ExitStack() as stack:
        loaded: dict[tuple[object, ...], Model] = {}
        for variant in variants:
            if variant.weights not in loaded:
                loaded[variant.weights] = stack.enter_context(variant.load())
        yield [loaded[variant.weights] for variant in variants]


def side_by_side(comparison: ModelComparison, n_ctx: int, threads: int | None, attention: Attention) -> None:
    """Run all contexts through the windows in step; the base's logits are read in place."""
    variants = [comparison.base, *(o.variant for o in comparison.outcomes)]
    spent = [0.0] * len(variants)
    total = sum(len(w.tokens) - 1 for w in comparison.windows)
    with ExitStack() as stack:
        rows = stack.enter_context(Rows(threads or physical_threads()))
        models = stack.enter_context(models_of(variants))
        settings = shared_settings(models, variants, n_ctx, threads, attention)
        comparison.attention = settings[0].attention
        contexts = [stack.enter_context(open_context(m, s)) for m, s in zip(models, settings, strict=True)]
        stack.enter_context(stoppable(*contexts))
        advance = stack.enter_context(bar(f"Comparing {len(contexts)} runs", total, "tokens"))
        try:
            for window in comparison.windows:
                measure_window(comparison, contexts, window, rows, advance, spent)
        finally:
            comparison.base_forward_s = spent[0]
            for outcome, seconds in zip(comparison.outcomes, spent[1:], strict=True):
                outcome.forward_s = seconds


def measure_window(
    comparison: ModelComparison,
    contexts: Sequence[Context],
    window: Window,
    rows: Rows,
    advance: Callable[[int], None],
    spent: list[float],
) -> None:
    """One window through all contexts in step: the base's, and those of the comparison's outcomes."""
    _clear(contexts, comparison.outcomes)
    for base, *others in batches(contexts, window, advance, spent=spent):
        log_z, top = rows.log_normalizers(base.logits), base.logits.argmax(axis=1)
        divergences = [rows.divergences(base.logits, log_z, top, b.logits, b.targets) for b in others]
        pairs = list(zip(comparison.outcomes, divergences, strict=True))
        for outcome, part in pairs:
            _check(part, window, base.first, outcome.variant, comparison.base)
        for outcome, part in pairs:
            outcome.parts[-1].append(part)


def _clear(contexts: Sequence[Context], outcomes: Sequence[CandidateOutcome]) -> None:
    for context in contexts:
        context.clear()
    for outcome in outcomes:
        outcome.parts.append([])


def _check(part: Divergences, window: Window, first: int, variant: Variant, base: Variant) -> None:
    check_finite(part.base_nll, window, first, base.path)
    check_finite(part.nll, window, first, variant.path)
    if not np.isfinite(part.kl).all():
        raise YarnEdgeError(
            f"{variant.label}: gives a token probability 0 that {base.label} does not: the divergence is infinite"
        )


def one_after_the_other(
    comparison: ModelComparison, n_ctx: int, threads: int | None, attention: Attention, scratch: Path | None
) -> None:
    """Run the base alone and keep its distributions on disk, then run each candidate alone."""
    variants = [comparison.base, *(o.variant for o in comparison.outcomes)]
    with Distributions(scratch) as kept, Rows(threads or physical_threads()) as rows:

        def keep(batch: ScoredBatch, window: Window) -> None:
            check_finite(kept.add(batch, rows), window, batch.first, comparison.base.path)

        base, *others = settings_alone(variants, n_ctx, threads, attention)
        comparison.attention = base.attention
        comparison.base_forward_s = _alone(comparison.base, comparison, base, keep, lambda: None)
        comparison.kept_bytes, comparison.kept_rows = kept.n_bytes, kept.n_rows
        note(f"the base's distributions of {kept.n_rows} tokens take {kept.n_bytes / 1e6:.0f} MB on disk")
        for outcome, settings in zip(comparison.outcomes, others, strict=True):
            kept.rewind()
            stored = _Stored(kept, rows, outcome, comparison.base)
            outcome.forward_s = _alone(outcome.variant, comparison, settings, stored.take_in, stored.begin)
            comparison.loss[outcome.variant.label] = stored.loss()


class _Stored:
    """Compares a candidate with the stored base."""

    def __init__(self, kept: Distributions, rows: Rows, outcome: CandidateOutcome, base: Variant) -> None:
        self._kept, self._rows, self._outcome, self._base = kept, rows, outcome, base
        self._true: list[Float64] = []
        self._n_rows = 0

    def begin(self) -> None:
        self._outcome.parts.append([])

    def take_in(self, batch: ScoredBatch, window: Window) -> None:
        self._true.append(self._kept.exact(batch, self._n_rows, self._rows))
        self._n_rows += len(batch.targets)
        part = self._kept.compare(batch, self._rows)
        _check(part, window, batch.first, self._outcome.variant, self._base)
        self._outcome.parts[-1].append(part)

    def loss(self) -> tuple[float, float]:
        """Mean divergence from what was stored and from the whole distributions, over the tokens that have both."""
        whole = np.concatenate(self._true)
        stored = np.concatenate(self._outcome.of_windows("kl"))[: len(whole)]
        return float(stored.mean()), float(whole.mean())


def settings_alone(
    variants: Sequence[Variant], n_ctx: int, threads: int | None, attention: Attention
) -> list[ContextSettings]:
    """`shared_settings` from the headers alone."""
    with ExitStack() as stack:
        heads = [stack.enter_context(Model(v.path, vocab_only=True, gguf=v.gguf)) for v in variants]
        return shared_settings(heads, variants, n_ctx, threads, attention)


def _alone(
    variant: Variant,
    comparison: ModelComparison,
    settings: ContextSettings,
    take_in: Callable[[ScoredBatch, Window], None],
    begin: Callable[[], None],
) -> float:
    """Run one variant over all windows. Returns its seconds of evaluation."""
    spent = [0.0]
    total = sum(len(w.tokens) - 1 for w in comparison.windows)
    with (
        variant.load() as model,
        open_context(model, settings) as context,
        stoppable(context),
        bar(variant.label, total, "tokens") as advance,
    ):
        for window in comparison.windows:
            context.clear()
            begin()
            for (batch,) in batches([context], window, advance, spent=spent):
                take_in(batch, window)
    return spent[0]
