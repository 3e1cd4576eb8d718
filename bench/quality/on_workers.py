"""The measuring commands on several workers: what they measure as units, and the results put into the order of one process.

A window's numbers do not depend on the windows before it, so each is a unit; batches and attention are decided here, once for all
workers. Sums are made here, from the same arrays in the same order as in one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.jobs.crew import Crew
from yarn_edge.jobs.run import run_units
from yarn_edge.jobs.unit import Unit, UnitResult, kept_open
from yarn_edge.likelihood import Divergences, Rows
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model

from ..scoring.evaluate import Scores, batch_settings
from ..scoring.sent import SentVariant, score_unit, settings_identity, unit_key
from ..scoring.variants import Variant
from ..scoring.windows import Window
from .perplexity_outcome import ScoredText
from .score_file import ScoreFile, run_identity
from .side_by_side import CandidateOutcome, ModelComparison, measure_window, models_of, settings_alone
from .sweep_outcome import SweptValue
from .sweep_plan import SweepRun, Value
from .text_settings import STOPPED, TextSettings, plan_windows

_FIELDS = ("kl", "nll", "base_nll", "same_top")  # of Divergences


def planning_model(variant: Variant) -> Model:
    """The header and the vocabulary, to cut windows with; the weights are loaded on the workers."""
    return Model(variant.path, no_alloc=True, overrides=variant.overrides, gguf=variant.gguf)


def score_text_on(
    crew: Crew, variant: Variant, settings: TextSettings, *, attention: Attention = "auto", save: Path | None = None
) -> ScoredText:
    """`perplexity.score_text` with windows as units. The file `save` is written at the end."""
    sent = SentVariant.of(variant)
    with planning_model(variant) as model:
        windows, ctx = plan_windows(model, settings)
        longest, trained = max(len(w.tokens) for w in windows), model.n_ctx_train
        batch = batch_settings(model.gguf, model.n_vocab, variant, longest, crew.threads, attention)
        run = run_identity(model, variant, settings.protocol, windows, batch)
    scores, ended = Scores.empty(windows), None
    file = None if save is None else ScoreFile(save, run)
    if file is not None:
        file.begin(scores)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))  # the long ones first: all end together
    units = [score_unit(sent, batch, windows[i], f"window {i + 1}") for i in order]
    start = time.perf_counter()

    def take(index: int, result: UnitResult) -> None:
        scores.nll[order[index]][:] = result.arrays["nll"]
        scores.tokens += 0 if result.earlier else result.facts["tokens"]

    try:
        run_units(units, crew, "Perplexity", take)
    except STOPPED as reason:
        if not scores.n_scored:
            raise
        ended = reason
    scores.seconds = time.perf_counter() - start if scores.tokens else 0.0
    whole = [bool(np.isfinite(part).all()) for part in scores.nll]
    scores.done = whole.index(False) if False in whole else len(windows)
    if file is not None:
        file.finish(scores)
    return ScoredText(scores, ctx, trained, batch.attention, ended)


def compare_on(
    crew: Crew, comparison: ModelComparison, n_ctx: int, attention: Attention, *, apart: bool = False
) -> None:
    """`side_by_side` with windows as units. apart: each candidate of a window is a unit, for which the base runs again; so are
    they if there are fewer windows than workers.
    """
    windows, outcomes = comparison.windows, comparison.outcomes
    variants = [comparison.base, *(o.variant for o in outcomes)]
    base, *others = settings_alone(variants, n_ctx, crew.threads, attention)
    comparison.attention = base.attention
    sent = [SentVariant.of(variant) for variant in variants]
    apart = apart or len(windows) < crew.n_workers
    groups = [[i] for i in range(len(outcomes))] if apart else [list(range(len(outcomes)))]
    units, places = [], []
    for group in groups:
        models = (sent[0], *(sent[1 + i] for i in group))
        settings = (base, *(others[i] for i in group))
        for number, window in enumerate(windows):
            identity = [[s.identity(), settings_identity(c)] for s, c in zip(models, settings, strict=True)]
            key, label = unit_key("compare_window", identity, [window]), f"window {number + 1}"
            units.append(Unit(compare_window, (models, settings, window), key, label, len(window.tokens) - 1))
            places.append((number, group))
    for outcome in outcomes:
        outcome.parts = [[] for _ in windows]

    def take(index: int, result: UnitResult) -> None:
        number, group = places[index]
        comparison.base_forward_s += result.facts["seconds"][0]
        for at, i in enumerate(group):
            outcomes[i].parts[number] = [Divergences(*(result.arrays[f"{at} {name}"] for name in _FIELDS))]
            outcomes[i].forward_s += result.facts["seconds"][1 + at]

    run_units(units, crew, f"Comparing {len(variants)} runs", take)


def compare_window(sent: Sequence[SentVariant], settings: Sequence[ContextSettings], window: Window) -> UnitResult:
    """On a worker: the divergences of candidates from a base over one window, as arrays `NUMBER FIELD`."""
    variants, contexts = kept_open((sent, settings), lambda: _opened_together(sent, settings))
    base, *others = variants
    comparison = ModelComparison([window], base, [CandidateOutcome(variant) for variant in others])
    spent = [0.0] * len(contexts)
    with Rows(settings[0].threads or physical_threads()) as rows:
        measure_window(comparison, contexts, window, rows, lambda _n: None, spent)
    arrays = {
        f"{at} {name}": outcome.of_windows(name)[0]
        for at, outcome in enumerate(comparison.outcomes)
        for name in _FIELDS
    }
    return UnitResult(arrays, {"seconds": spent})


@contextmanager
def _opened_together(
    sent: Sequence[SentVariant], settings: Sequence[ContextSettings]
) -> Iterator[tuple[list[Variant], list[Context]]]:
    variants = [each.variant() for each in sent]
    with ExitStack() as stack:
        models = stack.enter_context(models_of(variants))
        pairs = zip(models, settings, strict=True)
        yield variants, [stack.enter_context(open_context(model, its)) for model, its in pairs]


def perplexities_on(
    crew: Crew,
    runs: Sequence[tuple[Value, Sequence[SweepRun]]],
    windows: Sequence[Window],
    n_vocab: int,
    attention: Attention,
    done: list[SweptValue],
) -> None:
    """The values of a sweep with their windows as units. done: gets the values whose windows all came back, in their order."""
    places = {(w.document, w.start): i for i, w in enumerate(windows)}
    swept = [SweptValue(value, Scores.empty(windows).nll) for value, _ in runs]
    units, targets = [], []
    for number, (value, parts) in enumerate(runs):
        for run in parts:
            longest = max(len(w.tokens) for w in run.windows)
            batch = batch_settings(run.variant.gguf, n_vocab, run.variant, longest, crew.threads, attention)
            sent = SentVariant.of(run.variant)
            for window in run.windows:
                units.append(score_unit(sent, batch, window, value.label))
                targets.append((number, window))

    def take(index: int, result: UnitResult) -> None:
        number, window = targets[index]
        at, nll = places[window.document, window.start], result.arrays["nll"]
        offset = window.first - windows[at].first
        swept[number].nll[at][offset : offset + len(nll)] = nll
        swept[number].tokens += result.facts["tokens"]
        swept[number].seconds += result.facts["seconds"]

    try:
        run_units(units, crew, f"Sweeping {len(runs)} values", take)
    finally:
        done += [each for each in swept if all(np.isfinite(part).all() for part in each.nll)]


def check_for_one_process(given: dict[str, bool]) -> None:
    """Raise YarnEdgeError for flags of a run in one process. given: whether each was."""
    for flag, was_given in given.items():
        if was_given:
            raise YarnEdgeError(f"{flag} is for a run in one process: with --on, --results DIR keeps what is finished")
