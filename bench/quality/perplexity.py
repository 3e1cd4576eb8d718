"""`yarn-edge perplexity`: how well a model predicts a text, by length and by position, from one causal pass.

A causal model scores every prefix at once, so one run gives the whole curve over context lengths. Protocols: `scoring.windows`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import BACKENDS, add_threads_flag, count, lengths
from yarn_edge.gguf.identity import model_identity
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.declared import explicit_arguments
from yarn_edge.llama_rules.loadable import MAX_CONTEXT
from yarn_edge.progress import note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.report import Chart, Line, Report, Table
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings, FlashAttention
from yarn_edge.runtime.kv_cache import KV_TYPES
from yarn_edge.runtime.model import Model
from yarn_edge.writer import check_output

from ..scoring.averages import Bucket, Mean, edges_of, lengths_up_to, mean_of, perplexity_by_position
from ..scoring.documents import documents_of, tokenized
from ..scoring.evaluate import Scores, batch_settings, score
from ..scoring.variants import Variant, parse_variant
from ..scoring.windows import PROTOCOLS, STRIDE, Cut, Window, tokens_needed, windows_of
from .score_file import ScoreFile

STOPPED = (KeyboardInterrupt, Terminated, YarnEdgeError, MemoryError)


@dataclass(frozen=True)
class TextSettings:
    """What to measure on. ctx: None for the model's own context; the other names are the flags'."""

    text: str | None = None
    protocol: str = "curve"
    ctx: int | None = None
    stride: int = STRIDE
    chunks: int | None = None
    documents: int | None = None
    max_tokens: int | None = None
    field: str = "text"
    seed: int = 0


def plan_windows(model: Model, settings: TextSettings) -> tuple[list[Window], int]:
    """(windows, ctx): the documents tokenized and cut. Notes what a user might not expect. Raises YarnEdgeError."""
    ctx = settings.ctx or model.n_ctx_train
    cut = Cut(ctx, settings.stride, settings.chunks, model.bos if model.add_bos else None)
    if settings.protocol == "sliding" and settings.stride >= ctx:
        raise YarnEdgeError(f"--stride {settings.stride} must be below the context, {ctx} tokens")
    documents = documents_of(settings.text, field=settings.field, wanted=settings.documents, seed=settings.seed)
    tokens = tokenized(model, documents, tokens_needed(settings.protocol, cut), settings.max_tokens)
    windows = windows_of(settings.protocol, tokens, cut)
    longest = max(len(w.tokens) for w in windows)
    if longest < ctx:
        note(f"the longest text has {longest} tokens, less than the context of {ctx}: nothing is measured beyond them")
    if longest > model.n_ctx_train:
        note(
            f"{model.path.name} declares a context of {model.n_ctx_train} tokens: beyond them is what it was not made for"
        )
    return windows, ctx


def identity(
    model: Model, variant: Variant, settings: TextSettings, windows: Sequence[Window], batch: ContextSettings
) -> dict[str, Any]:
    """What makes two runs the same, for `--resume`."""
    arguments = variant.arguments or explicit_arguments(model.gguf)
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray([window.document, window.first, *window.tokens], dtype=np.int64).tobytes())
    return {
        "the model": model_identity(model.gguf),
        "the scaling": json.dumps([asdict(arguments), dict(variant.overrides)]),
        "the cache type": variant.kv_type,
        "the backend": variant.backend,
        "the protocol": settings.protocol,
        "the text or how it is cut": digest.hexdigest(),
        "the batch or flash attention": [batch.n_batch, batch.flash_attention],
        "the version of llama-cpp-python": version("llama-cpp-python"),
    }


@dataclass(frozen=True)
class ScoredText:
    """What was scored. ctx: tokens of a window; trained: context that the model declares; ended: what ended the run early."""

    scores: Scores
    ctx: int
    trained: int
    ended: BaseException | None = None


def measure(
    variant: Variant,
    settings: TextSettings,
    *,
    threads: int | None = None,
    attention: FlashAttention = "auto",
    save: Path | None = None,
    resume: bool = False,
) -> ScoredText:
    """Score the text. Raises what ends the run before anything was scored."""
    with variant.load() as model:
        windows, ctx = plan_windows(model, settings)
        scores = Scores.empty(windows)
        longest = max(len(w.tokens) for w in windows)
        batch = batch_settings(model.gguf, model.n_vocab, variant, longest, threads, attention)
        kept = None if save is None else ScoreFile(save, identity(model, variant, settings, windows, batch))
        if kept is not None:
            if resume and not kept.load(scores):
                note(f"{save}: is not there yet: the run begins")
            kept.begin(scores)
        if scores.done == len(windows):
            return ScoredText(scores, ctx, model.n_ctx_train)
        with Context(model, batch) as context:
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
                return ScoredText(scores, ctx, model.n_ctx_train, reason)
        try:
            if kept is not None:
                kept.finish(scores)
        except YarnEdgeError as error:
            return ScoredText(scores, ctx, model.n_ctx_train, error)
        return ScoredText(scores, ctx, model.n_ctx_train)


def _keep(kept: ScoreFile, context: Context, scores: Scores) -> None:
    """Save on the way out; what was scored is told even where that fails."""
    try:
        kept.save(context, scores)
        note(f"{kept.path}: {scores.n_scored} tokens are scored; --resume goes on from there")
    except YarnEdgeError as error:
        note(f"the scores are not kept: {error}")


@dataclass(frozen=True)
class PerplexityOutcome:
    """What the scores say. curve: (length, mean nll of the tokens before it); documents: those that count at a length."""

    total: Mean
    curve: list[tuple[int, Mean, int]]
    buckets: list[Bucket]
    by_window: float


def summarize(
    scores: Scores, protocol: str, ctx: int, points: Sequence[int] | None, width: int | None
) -> PerplexityOutcome:
    """The curve over lengths and the buckets by position.

    curve: every token before a length counts. truncated: only documents that are at least as long, each of them equally (the
    authors' mean). by_window: perplexity as the authors' code averages it, each window equally, whatever it scored.
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
            curve.append((length, mean, n_documents))
    missing = [length for length in points or () if length > reached]
    if missing:
        note(f"nothing reaches {missing[0]} tokens: the curve ends before")
    windows = np.array([float(np.nanmean(part)) for part in scores.nll if np.isfinite(part).any()])
    return PerplexityOutcome(
        mean_of(nll), curve, perplexity_by_position(nll, edges_of(longest, width), index), mean_of(windows).perplexity
    )


def as_json(
    variant: Variant, settings: TextSettings, measured: ScoredText, outcome: PerplexityOutcome
) -> dict[str, Any]:
    """The contract's object."""
    scores = measured.scores
    return {
        "model": str(variant.path),
        "variant": variant.label,
        "kv_type": variant.kv_type,
        "protocol": settings.protocol,
        "ctx": measured.ctx,
        "stride": settings.stride if settings.protocol == "sliding" else None,
        "n_tokens": outcome.total.n,
        "n_windows": len(scores.windows),
        "n_documents": len({w.document for w in scores.windows}),
        "ppl": outcome.total.perplexity,
        "stderr": outcome.total.perplexity_stderr,
        "ppl_by_window": outcome.by_window,
        "curve": [
            {"ctx": length, "ppl": m.perplexity, "stderr": m.perplexity_stderr, "n_tokens": m.n, "n_documents": n}
            for length, m, n in outcome.curve
        ],
        "buckets": [b.as_json() for b in outcome.buckets],
        "seconds": scores.seconds,
        "tok_per_s": scores.tokens / scores.seconds if scores.seconds else None,
        "complete": measured.ended is None,
    }


def report_of(
    variant: Variant, settings: TextSettings, measured: ScoredText, data: dict[str, Any], outcome: PerplexityOutcome
) -> Report:
    """Tables and pictures of one run."""
    ctx, trained = measured.ctx, measured.trained
    name = variant.label if "@" in variant.label else variant.path.name
    tables, pictures = [], []
    if outcome.curve:
        rows = tuple((length, m.perplexity, m.perplexity_stderr, m.n, n) for length, m, n in outcome.curve)
        note_on = "Perplexity of all tokens within the first so many of each document."
        if settings.protocol == "truncated":
            note_on = "Documents cut to a length, each counted equally; only those that are as long."
        tables.append(
            Table("Perplexity by context length", ("context", "perplexity", "±", "tokens", "documents"), rows, note_on)
        )
    by_bucket = tuple((b.start, b.end, b.perplexity, b.stderr, b.n_tokens) for b in outcome.buckets)
    tables.append(Table("Perplexity by position", ("from", "to", "perplexity", "±", "tokens"), by_bucket))
    middle = tuple((b.start + b.end) / 2 for b in outcome.buckets)
    line = Line(name, middle, tuple(b.perplexity for b in outcome.buckets), tuple(b.stderr for b in outcome.buckets))
    marks = ((float(trained), f"declared context {trained}"),) if trained <= ctx else ()
    pictures.append(
        Chart("Perplexity by position", "position (tokens)", "perplexity", (line,), log_y=True, marks=marks)
    )
    if len(outcome.curve) > 1:
        whole = Line(
            name,
            tuple(float(n) for n, _, _ in outcome.curve),
            tuple(m.perplexity for _, m, _ in outcome.curve),
            tuple(m.perplexity_stderr for _, m, _ in outcome.curve),
        )
        pictures.append(
            Chart("Perplexity by context length", "context (tokens)", "perplexity", (whole,), True, True, marks)
        )
    speed = "" if not data["tok_per_s"] else f", {data['tok_per_s']:.0f} tok/s"
    said = [
        f"perplexity {outcome.total.perplexity:.4f} ± {outcome.total.perplexity_stderr:.4f} over {outcome.total.n} tokens "
        f"(protocol {settings.protocol}, context {ctx}, {variant.kv_type} cache{speed})"
    ]
    if settings.protocol == "sliding":
        said.append(f"each window counted equally, as the paper's code does: {outcome.by_window:.4f}")
    if not data["complete"]:
        said.append("not complete: the run was ended before the text was")
    return Report(f"Perplexity of {name}", tuple(said), tuple(tables), tuple(pictures))


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """--text and how to read it: the same for every command that measures on text."""
    parser.add_argument(
        "--text",
        metavar="PATH",
        help="a text file, a folder of them, or JSON Lines (.jsonl); UTF-8 (default: the 15,000 tokens that come along)",
    )
    parser.add_argument("--field", default="text", metavar="KEY", help="where the text is in JSON Lines (%(default)s)")
    parser.add_argument(
        "--documents", type=count(1, 10**9), metavar="N", help="a sample of N documents where there are more"
    )
    parser.add_argument("--seed", type=count(0, 2**63 - 1), default=0, metavar="N", help="of that sample (%(default)s)")
    parser.add_argument(
        "--ctx", type=count(2, MAX_CONTEXT), metavar="N", help="tokens of a window (default: the model's)"
    )
    parser.add_argument(
        "--chunks",
        type=count(1, 10**9),
        metavar="N",
        help="windows at most: llama.cpp in all, curve (default 1) and sliding of each document",
    )
    parser.add_argument(
        "--max-tokens", type=count(2, 10**12), metavar="N", help="tokens of all documents together, at most"
    )
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="curve",
        help="curve: every token once; llama.cpp: comparable with llama-perplexity; sliding, truncated: the paper's (%(default)s)",
    )
    parser.add_argument(
        "--stride", type=count(1, MAX_CONTEXT), default=STRIDE, metavar="S", help="of sliding windows (%(default)s)"
    )


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """--kv-type, --backend, --flash-attention, --threads: the same for every measuring command."""
    parser.add_argument("--kv-type", choices=tuple(KV_TYPES), default="f16", help="type of the KV cache (%(default)s)")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="cpu", help="where to run (%(default)s)")
    parser.add_argument(
        "--flash-attention",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto: off on a CPU with a 16- or 32-bit cache, where plain attention is faster at length, unless the context is "
        "too long for it (%(default)s)",
    )
    add_threads_flag(parser)


def text_settings(args: argparse.Namespace) -> TextSettings:
    """The flags of `add_text_flags`."""
    return TextSettings(
        args.text,
        args.protocol,
        args.ctx,
        args.stride,
        args.chunks,
        args.documents,
        args.max_tokens,
        args.field,
        args.seed,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge perplexity`."""
    parser.add_argument(
        "model", metavar="MODEL.gguf", help="also MODEL.gguf@kv=q8_0,yarn-factor=2: another cache or scaling"
    )
    add_text_flags(parser)
    parser.add_argument("--lengths", type=lengths, metavar="LIST", help="points of the curve: 2k,4k,8k or 2k:16k:1k")
    parser.add_argument("--bucket", type=count(1, MAX_CONTEXT), metavar="N", help="tokens of a bucket of positions")
    add_running_flags(parser)
    parser.add_argument("--save", metavar="FILE", help="keep the scores in FILE as they come")
    parser.add_argument("--resume", action="store_true", help="go on from what --save has kept")
    add_output_flags(parser)


def check_save(save: Path, args: argparse.Namespace, variant: Variant) -> Path:
    """Refuse a --save that would overwrite what is read or written elsewhere, itself or by its cache, before any work."""
    text = None if args.text is None else Path(args.text)
    in_folder = text is not None and text.is_dir()
    sources = [
        *(read_gguf(variant.path).shards or (variant.path,)),
        *([text] if text is not None and not in_folder else []),
    ]
    if in_folder and text is not None and save.resolve().parent == text.resolve():
        raise YarnEdgeError(f"{save}: would become one of the documents in {text}: take another folder")
    for other in (args.plot, args.report):
        if other is not None and Path(other).resolve() == save.resolve():
            raise YarnEdgeError(f"{save}: --save and another output name the same file")
    check_output(save.with_name(save.name + ".cache"), args.force or args.resume, sources)
    found: Path = check_output(save, args.force or args.resume, sources)
    return found


def run(args: argparse.Namespace) -> int:
    """`yarn-edge perplexity`."""
    check_outputs(args)
    variant, settings = parse_variant(args.model, kv_type=args.kv_type, backend=args.backend), text_settings(args)
    save = None
    if args.resume and args.save is None:
        raise YarnEdgeError("--resume goes on from the file of --save: give it, too")
    if args.save is not None:
        save = check_save(Path(args.save), args, variant)
    measured = measure(
        variant, settings, threads=args.threads, attention=args.flash_attention, save=save, resume=args.resume
    )
    outcome = summarize(measured.scores, settings.protocol, measured.ctx, args.lengths, args.bucket)
    data = as_json(variant, settings, measured, outcome)
    deliver(args, data, report_of(variant, settings, measured, data, outcome), [variant.path])
    if measured.ended is not None:
        raise measured.ended
    return 0
