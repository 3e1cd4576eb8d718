"""`yarn-edge compare`: how far quantizations, cache types and scalings are from a base, by position.

The base and the candidates step through the text together, so no logits are written anywhere. It reports KL(base || candidate) in
nats, how often the top token is the same, how the probability of the text's own tokens changes, and the ratio of perplexities.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.jobs.crew import Crew, add_job_flags, crew_of
from yarn_edge.progress import note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.runtime.context_settings import Attention
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

from ..scoring.variants import Variant
from .compare_outcome import ComparisonOutcome
from .on_workers import check_for_one_process, compare_on, planning_model
from .side_by_side import CandidateOutcome, ModelComparison, fit_in_memory, one_after_the_other, side_by_side
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

_PROBE = 4000  # characters whose tokens show that two models have the same vocabulary


def compare(
    base: Variant,
    others: Sequence[Variant],
    settings: TextSettings,
    *,
    threads: int | None = None,
    attention: Attention = "auto",
    keep: str = "auto",
    scratch: Path | None = None,
    crew: Crew | None = None,
) -> tuple[ModelComparison, int]:
    """(the comparison, its context in tokens). keep: where the base's distributions are kept: "memory", "disk" or "auto".

    In memory all models run side by side; on disk (in the folder `scratch`) they run one after the other. crew: workers, on each
    of which they run side by side. Raises YarnEdgeError for
    models with different vocabularies, and whatever ends the run before anything was measured.
    """
    twice = {v.label for v in others if sum(v.label == w.label for w in others) > 1}
    if twice:
        raise YarnEdgeError(f"{min(twice)}: appears twice among the candidates")
    with base.load() if crew is None else planning_model(base) as model:
        windows, ctx = plan_windows(model, settings)
        probe, n_vocab = model.tokenize(sample_text()[:_PROBE], add_special=False, parse_special=False), model.n_vocab
        words = vocabulary(model)
    comparison = ModelComparison(windows, base, [CandidateOutcome(variant) for variant in others])
    longest = max(len(w.tokens) for w in windows)
    together = crew is not None or keep == "memory"
    together = together or (keep == "auto" and fit_in_memory([base, *others], longest, attention))
    if keep == "auto" and not together:
        note("base and candidates do not fit into memory together: the base's distributions are kept on disk")
    for other in others:
        with Model(other.path, vocab_only=True, gguf=other.gguf) as model:
            same = model.tokenize(sample_text()[:_PROBE], add_special=False, parse_special=False) == probe
            if model.n_vocab != n_vocab or not same or vocabulary(model) != words:
                raise YarnEdgeError(
                    f"{other.label}: has a different vocabulary from {base.label}: they cannot be compared"
                )
    start = time.perf_counter()
    try:
        if crew is not None:
            compare_on(crew, comparison, longest, attention)
        elif together:
            side_by_side(comparison, longest, threads, attention)
        else:
            one_after_the_other(comparison, longest, threads, attention, scratch)
    except STOPPED as reason:
        if not any(any(window for window in outcome.parts) for outcome in comparison.outcomes):
            raise
        comparison.ended = reason
    comparison.seconds = time.perf_counter() - start
    return comparison, ctx


def vocabulary(model: Model) -> str:
    """SHA-256 of the token list in the file."""
    tokens = model.gguf.metadata.get("tokenizer.ggml.tokens")
    return hashlib.sha256(
        repr(tokens if isinstance(tokens, list) else None).encode("utf-8", "surrogatepass")
    ).hexdigest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge compare`."""
    parser.add_argument("base", metavar="BASE.gguf", help="the model to compare with, in 16 bits or more")
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a GGUF, or a GGUF with another cache, backend or scaling: MODEL.gguf@kv=q4_0, MODEL.gguf@backend=cuda, "
        "MODEL.gguf@yarn-factor=2,yarn-attention-factor=1.2, MODEL.gguf@lora=FILE=SCALE",
    )
    add_text_flags(parser)
    add_bucket_flag(parser)
    add_running_flags(parser, "every MODEL")
    parser.add_argument(
        "--keep-base",
        choices=("auto", "memory", "disk"),
        default="auto",
        help="memory: run all models side by side; disk: run one after the other and store the base's distributions, compressed; "
        "auto: memory if all models fit (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="folder for the distributions that --keep-base disk stores (default: the temporary folder)",
    )
    add_job_flags(parser, "windows (or candidates, if there are fewer windows than workers)")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge compare`."""
    check_outputs(args)
    crew = crew_of(args)
    check_for_one_process({"--keep-base disk": crew is not None and args.keep_base == "disk"})
    base = given_variant(args, args.base, adapted=False)
    others = [given_variant(args, model) for model in args.models]
    scratch = None if args.scratch is None else Path(args.scratch)
    if scratch is not None and not scratch.is_dir():
        raise YarnEdgeError(f"{scratch}: no such folder")
    settings = text_settings(args)
    comparison, ctx = compare(
        base,
        others,
        settings,
        threads=args.threads,
        attention=args.attention,
        keep=args.keep_base,
        scratch=scratch,
        crew=crew,
    )
    outcome = ComparisonOutcome.of(comparison, ctx, settings, args.bucket)
    deliver(args, outcome.as_json(), outcome.report(), sorted({v.path for v in (base, *others)}))
    if comparison.ended is not None:
        raise comparison.ended
    return 0
