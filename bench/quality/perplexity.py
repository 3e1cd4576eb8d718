"""`yarn-edge perplexity`: how well a model predicts a text, by length and by position, from one causal pass.

A causal model scores every prefix at once, so one run gives the whole curve over context lengths. Protocols: `scoring.windows`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import lengths
from yarn_edge.graph.opening import open_context
from yarn_edge.jobs.crew import add_job_flags, crew_of
from yarn_edge.progress import note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.writer import check_output

from ..scoring.evaluate import Scores, batch_settings, score
from ..scoring.variants import Variant
from .on_workers import check_for_one_process, score_text_on
from .perplexity_outcome import PerplexityOutcome, ScoredText
from .score_file import ScoreFile, run_identity
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


def score_text(
    variant: Variant,
    settings: TextSettings,
    *,
    threads: int | None = None,
    attention: Attention = "auto",
    save: Path | None = None,
    resume: bool = False,
) -> ScoredText:
    """Score the text, keeping the scores in the file `save`. Raises what ends the run before anything was scored."""
    with variant.load() as model:
        windows, ctx = plan_windows(model, settings)
        scores = Scores.empty(windows)
        longest = max(len(w.tokens) for w in windows)
        batch = batch_settings(model.gguf, model.n_vocab, variant, longest, threads, attention)
        kept = (
            None if save is None else ScoreFile(save, run_identity(model, variant, settings.protocol, windows, batch))
        )
        if kept is not None:
            if resume and not kept.load(scores):
                note(f"{save}: does not exist yet: the run starts from the beginning")
            kept.begin(scores)
        ended = None if scores.done == len(windows) else _score_rest(model, batch, scores, kept, threads)
        if kept is not None and ended is None:
            try:
                kept.finish(scores)
            except YarnEdgeError as error:
                ended = error
        return ScoredText(scores, ctx, model.n_ctx_train, batch.attention, ended)


def _score_rest(
    model: Model, batch: ContextSettings, scores: Scores, kept: ScoreFile | None, threads: int | None
) -> BaseException | None:
    """Score the windows that are not done. Returns what ended it early, if something is scored then; raises it otherwise."""
    with open_context(model, batch) as context:
        if kept is not None:
            kept.restore(context, scores)
        try:
            between = (lambda s: kept.now_and_then(context, s)) if kept is not None else (lambda _s: None)
            score(context, scores, threads=threads, between=between)
        except STOPPED as reason:
            if kept is not None:
                _keep(kept, context, scores)
            if not scores.n_scored:
                raise
            return reason
    return None


def _keep(kept: ScoreFile, context: Context, scores: Scores) -> None:
    """Save on the way out. If that fails, the scores are still reported."""
    try:
        kept.save(context, scores)
        note(f"{kept.path}: {scores.n_scored} tokens are scored; --resume continues from there")
    except YarnEdgeError as error:
        note(f"the scores could not be saved: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge perplexity`."""
    parser.add_argument(
        "model",
        metavar="MODEL.gguf",
        help="a GGUF, or a GGUF with another cache or scaling: MODEL.gguf@kv=q8_0,yarn-factor=2",
    )
    add_text_flags(parser)
    parser.add_argument(
        "--lengths",
        type=lengths,
        metavar="LIST",
        help="context lengths to report: 2k,4k,8k, or from:to:step as in 2k:16k:1k (default: powers of two from 512)",
    )
    add_bucket_flag(parser)
    add_running_flags(parser)
    parser.add_argument("--save", metavar="FILE", help="save the scores to FILE during the run")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run from the scores in the file of --save"
    )
    add_job_flags(parser, "the windows of the text")
    add_output_flags(parser)


def check_save(save: Path, args: argparse.Namespace, variant: Variant) -> Path:
    """Refuse, before any work, a --save that (itself or by its cache) would overwrite what is read or written elsewhere."""
    text = None if args.text is None else Path(args.text)
    in_folder = text is not None and text.is_dir()
    sources = [*(variant.gguf.shards or (variant.path,)), *([text] if text is not None and not in_folder else [])]
    if in_folder and text is not None and save.resolve().parent == text.resolve():
        raise YarnEdgeError(f"{save}: would become one of the documents in {text}: choose another folder")
    for other in (args.plot, args.report):
        if other is not None and Path(other).resolve() == save.resolve():
            raise YarnEdgeError(f"{save}: --save and another output name the same file")
    check_output(save.with_name(save.name + ".cache"), args.force or args.resume, sources)
    return check_output(save, args.force or args.resume, sources)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge perplexity`."""
    check_outputs(args)
    crew = crew_of(args)
    check_for_one_process({"--resume": crew is not None and args.resume})
    variant, settings = given_variant(args, args.model), text_settings(args)
    save = None
    if args.resume and args.save is None:
        raise YarnEdgeError("--resume continues from the file of --save: pass --save FILE as well")
    if args.save is not None:
        save = check_save(Path(args.save), args, variant)
    if crew is not None:
        scored = score_text_on(crew, variant, settings, attention=args.attention, save=save)
    else:
        scored = score_text(
            variant, settings, threads=args.threads, attention=args.attention, save=save, resume=args.resume
        )
    outcome = PerplexityOutcome.of(variant, settings, scored, args.lengths, args.bucket)
    deliver(args, outcome.as_json(), outcome.report(), [variant.path])
    if scored.ended is not None:
        raise scored.ended
    return 0
