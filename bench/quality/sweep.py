"""`yarn-edge sweep`: perplexity or divergence over the attention factor, the factor or the method, without writing a file.

attention-factor  which temperature of attention predicts best (the paper's A.2)
factor            what static YaRN costs texts that do not need it
method            plain RoPE, PI, NTK-aware, NTK-by-parts, YaRN, and the dynamic methods (B.3), at each position
Every value is run by runtime arguments and in-memory overrides of the metadata, on the same tokens, so the differences are paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import NO_OVERRIDES, ScalingOverrides, add_scaling_flags, length_from, scaling_overrides
from yarn_edge.jobs.crew import Crew, add_job_flags, crew_of
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.number_rules import MAX_CONTEXT
from yarn_edge.llama_rules.rescale import base_scaling, with_factor
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.runtime.context_settings import Attention

from ..scoring.evaluate import Scores, score, variant_context
from ..scoring.variants import Variant, scaled
from ..scoring.windows import Window
from .on_workers import compare_on, perplexities_on, planning_model
from .side_by_side import CandidateOutcome, ModelComparison, side_by_side
from .sweep_outcome import Sweep, SweepOutcome, SweptValue
from .sweep_plan import OVER, SweepRun, Value, runs_of, values_of
from .text_settings import (
    STOPPED,
    TextSettings,
    add_bucket_flag,
    add_running_flags,
    add_text_flags,
    given_variant,
    plan_windows,
    text_settings,
)


@dataclass(frozen=True)
class SweepSettings:
    """What to vary and how to judge it.

    over: one of OVER; values: as words, None for the defaults; overrides: RopeScaling fields of the scaling swept around; metric:
    perplexity or divergence; step: tokens between two lengths of a dynamic method, None for the default.
    """

    over: str
    values: Sequence[str] | None = None
    overrides: ScalingOverrides = NO_OVERRIDES
    metric: str = "perplexity"
    step: int | None = None


def sweep(
    variant: Variant,
    settings: SweepSettings,
    text: TextSettings,
    *,
    threads: int | None = None,
    attention: Attention = "auto",
    crew: Crew | None = None,
) -> Sweep:
    """Measure every value on the same windows. crew: workers. Raises whatever ends it before one value was measured."""
    base = base_scaling(FilePositions(variant.gguf), settings.overrides)
    with variant.load() if crew is None else planning_model(variant) as model:
        windows, ctx, n_vocab = *plan_windows(model, text), model.n_vocab
    done = Sweep(settings.over, settings.metric, base, windows, ctx)
    planned = values_of(settings.over, base, settings.values, ctx)
    step = settings.step or max(512, ctx // 8)
    runs = [(value, runs_of(value, variant, windows, base.original_context, step)) for value in planned]
    moving = [value.label for value, _ in runs if value.dynamic]
    if settings.metric == "divergence" and moving:
        raise YarnEdgeError(f"--metric divergence: {moving[0]} has different angles at each length: use perplexity")
    try:
        if settings.metric == "divergence":
            _divergences(done, runs, variant, threads, attention, crew)
        elif crew is not None:
            perplexities_on(crew, runs, windows, n_vocab, attention, done.values)
        else:
            for number, (value, parts) in enumerate(runs, 1):
                label = f"{value.label} ({number} of {len(runs)})"
                done.values.append(_perplexities(value, parts, windows, label, threads, attention))
    except STOPPED as reason:
        if not done.values:
            raise
        done.ended = reason
    return done


def _perplexities(
    value: Value,
    runs: Sequence[SweepRun],
    windows: Sequence[Window],
    label: str,
    threads: int | None,
    attention: Attention,
) -> SweptValue:
    """One value over all windows, put together from its runs."""
    whole = Scores.empty(windows)
    places = {(w.document, w.start): i for i, w in enumerate(windows)}
    swept = SweptValue(value, whole.nll)
    for run in runs:
        scores = Scores.empty(run.windows)
        longest = max(len(w.tokens) for w in run.windows)
        with run.variant.load() as model, variant_context(model, run.variant, longest, threads, attention) as context:
            score(context, scores, label=label, threads=threads)
        for window, nll in zip(run.windows, scores.nll, strict=True):
            at = places[window.document, window.start]
            offset = window.first - windows[at].first
            whole.nll[at][offset : offset + len(nll)] = nll
        swept.tokens, swept.seconds = swept.tokens + scores.tokens, swept.seconds + scores.seconds
    return swept


def _divergences(
    done: Sweep,
    runs: Sequence[tuple[Value, Sequence[SweepRun]]],
    variant: Variant,
    threads: int | None,
    attention: Attention,
    crew: Crew | None,
) -> None:
    """Each value side by side with the reference: plain RoPE, or for attention factors the base itself."""
    plain = done.over != "attention-factor"
    reference = scaled(variant, with_factor(done.base, 1.0) if plain else done.base)
    done.reference = "plain RoPE" if plain else f"attention factor {done.base.attention_factor:g}"
    values, variants = [value for value, _ in runs], [run.variant for _, (run,) in runs]
    longest, tokens = max(len(w.tokens) for w in done.windows), sum(len(w.tokens) - 1 for w in done.windows)

    def take_in(value: Value, outcome: CandidateOutcome) -> None:
        nll, kl = outcome.of_windows("nll"), outcome.of_windows("kl")
        if len(kl) == len(done.windows):
            done.values.append(SweptValue(value, nll, kl, tokens, outcome.forward_s))

    if crew is not None:
        comparison = ModelComparison(done.windows, reference, [CandidateOutcome(v) for v in variants])
        try:
            compare_on(crew, comparison, longest, attention, apart=True)
        finally:
            for value, outcome in zip(values, comparison.outcomes, strict=True):
                take_in(value, outcome)
        return
    for value, candidate in zip(values, variants, strict=True):
        comparison = ModelComparison(done.windows, reference, [CandidateOutcome(candidate)])
        side_by_side(comparison, longest, threads, attention)
        take_in(value, comparison.outcomes[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge sweep`."""
    parser.add_argument(
        "model", metavar="MODEL.gguf", help="a GGUF that carries its scaling in keys (not baked into a tensor)"
    )
    parser.add_argument("--over", choices=OVER, required=True, help="what to vary")
    parser.add_argument(
        "--values",
        metavar="LIST",
        help="values to measure: numbers, or for --over method any of "
        "plain,pi,ntk,ntk-by-parts,yarn,dynamic-ntk,dynamic-yarn (default: a grid around the paper's attention factor, "
        "powers of two up to the factor of the file, or all static methods)",
    )
    parser.add_argument(
        "--metric",
        choices=("perplexity", "divergence"),
        default="perplexity",
        help="divergence: KL divergence from plain RoPE, or for --over attention-factor from the attention factor of the file "
        "(default: %(default)s)",
    )
    add_text_flags(parser)
    add_bucket_flag(parser)
    parser.add_argument(
        "--dynamic-step",
        type=length_from(1, MAX_CONTEXT),
        metavar="N",
        help="for dynamic methods: one pass for every N tokens beyond the original context "
        "(default: an eighth of --ctx, at least 512)",
    )
    add_running_flags(parser)
    add_scaling_flags(parser, "the scaling to sweep around, where it differs from that of the file")
    add_job_flags(parser, "values and windows")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge sweep`."""
    check_outputs(args)
    crew = crew_of(args)
    overrides = scaling_overrides(args)
    if overrides.for_checkpoints:
        raise YarnEdgeError(f"{overrides.for_checkpoints[0]} is for checkpoints: a GGUF's scaling is static already")
    variant, text = given_variant(args, args.model), text_settings(args)
    if variant.arguments is not None:
        raise YarnEdgeError(f"{args.model}: give the scaling to sweep around by --yarn-… flags")
    if text.protocol not in ("curve", "llama.cpp"):
        raise YarnEdgeError(f"--protocol {text.protocol}: sweep supports curve and llama.cpp")
    values = args.values.split(",") if args.values else None
    settings = SweepSettings(args.over, values, overrides, args.metric, args.dynamic_step)
    done = sweep(variant, settings, text, threads=args.threads, attention=args.attention, crew=crew)
    outcome = SweepOutcome.of(done, args.model, text.protocol, args.bucket)
    deliver(args, outcome.as_json(), outcome.report(), [variant.path])
    if done.ended is not None:
        raise done.ended
    return 0
