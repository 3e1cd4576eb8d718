"""`yarn-edge compare`: how far quantizations, cache types and scalings are from a base, by position.

The base and the candidates step through the text together, so no logits are written anywhere. What is told: KL(base || other)
in nats, how often the top token is the same, how the probability of the text's own tokens moves, and the perplexity ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count
from yarn_edge.llama_rules.loadable import MAX_CONTEXT
from yarn_edge.progress import note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.report import Cell, Chart, Line, Report, Table
from yarn_edge.runtime.context_settings import FlashAttention
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

from ..scoring.averages import edges_of, mean_of, paired, perplexity_of
from ..scoring.variants import Variant, parse_variant, split_variant
from .perplexity import STOPPED, TextSettings, add_running_flags, add_text_flags, plan_windows, text_settings
from .side_by_side import CandidateOutcome, ModelComparison, fit_in_memory, one_after_the_other, side_by_side

_PROBE = 4000  # characters whose tokens show that two models have the same vocabulary


def compare(
    base: Variant,
    others: Sequence[Variant],
    settings: TextSettings,
    *,
    threads: int | None = None,
    attention: FlashAttention = "auto",
    keep: str = "auto",
    scratch: Path | None = None,
) -> tuple[ModelComparison, int]:
    """(the comparison, its context). keep: where the base's distributions are: "memory" (side by side), "disk", or "auto".

    Raises YarnEdgeError for models with different vocabularies, and what ends the run before anything was measured.
    """
    twice = {v.label for v in others if sum(v.label == w.label for w in others) > 1}
    if twice:
        raise YarnEdgeError(f"{min(twice)}: stands twice among the candidates")
    with base.load() as model:
        windows, ctx = plan_windows(model, settings)
        probe, n_vocab = model.tokenize(sample_text()[:_PROBE], add_special=False, parse_special=False), model.n_vocab
        words = vocabulary(model)
    comparison = ModelComparison(windows, base, [CandidateOutcome(variant) for variant in others])
    longest = max(len(w.tokens) for w in windows)
    together = keep == "memory" or (keep == "auto" and fit_in_memory([base, *others], longest, attention))
    if keep == "auto" and not together:
        note("base and candidates do not fit into memory together: the base's distributions are kept on the disk")
    for other in others:
        with Model(other.path, vocab_only=True) as model:
            same = model.tokenize(sample_text()[:_PROBE], add_special=False, parse_special=False) == probe
            if model.n_vocab != n_vocab or not same or vocabulary(model) != words:
                raise YarnEdgeError(f"{other.label}: has another vocabulary than {base.label}: they cannot be compared")
    start = time.perf_counter()
    try:
        if together:
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
    """SHA-256 of the tokens in the file."""
    tokens = model.gguf.metadata.get("tokenizer.ggml.tokens")
    return hashlib.sha256(
        repr(tokens if isinstance(tokens, list) else None).encode("utf-8", "surrogatepass")
    ).hexdigest()


def _positions(comparison: ModelComparison, outcome: CandidateOutcome) -> npt.NDArray[np.int64]:
    """Positions of the predicted tokens, as far as they were measured."""
    found = [
        np.arange(window.first, window.first + sum(len(d.kl) for d in parts))
        for window, parts in zip(comparison.windows, outcome.parts, strict=False)
    ]
    return np.concatenate(found)


def figures(comparison: ModelComparison, outcome: CandidateOutcome, width: int | None) -> dict[str, Any]:
    """One candidate's object of the contract; probabilities and Δp are from 0 to 1, divergences in nats."""
    kl, nll, base_nll = (np.concatenate(outcome.of_windows(name)) for name in ("kl", "nll", "base_nll"))
    same = np.concatenate(outcome.of_windows("same_top"))
    positions = _positions(comparison, outcome)
    delta = np.exp(-nll) - np.exp(-base_nll)
    mean, moved = mean_of(kl), mean_of(delta)
    ratio = paired(outcome.of_windows("nll"), outcome.of_windows("base_nll"))
    ppl, top1 = mean_of(nll), float(same.mean())
    buckets = []
    for start, end in pairwise(edges_of(max(len(w.tokens) for w in comparison.windows), width)):
        inside = (positions >= start) & (positions < end)
        if inside.any():
            part = mean_of(kl[inside])
            buckets.append(
                {
                    "start": start,
                    "end": end,
                    "n_tokens": part.n,
                    "kld_mean": part.mean,
                    "kld_stderr": part.stderr,
                    "top1": float(same[inside].mean()),
                    "ppl": mean_of(nll[inside]).perplexity,
                    "ppl_ratio": perplexity_of(float((nll - base_nll)[inside].mean())),
                }
            )
    quantiles = {f"kld_p{name}": float(np.quantile(kl, q)) for name, q in (("90", 0.9), ("99", 0.99), ("99_9", 0.999))}
    return {
        "model": outcome.variant.label,
        "n_tokens": mean.n,
        "kld_mean": mean.mean,
        "kld_stderr": mean.stderr,
        "kld_median": float(np.median(kl)),
        **quantiles,
        "kld_max": float(kl.max()),
        "top1": top1,
        "top1_stderr": math.sqrt(top1 * (1 - top1) / max(1, len(same) - 1)),
        "delta_p_mean": moved.mean,
        "delta_p_stderr": moved.stderr,
        "delta_p_rms": float(np.sqrt((delta**2).mean())),
        "ppl": ppl.perplexity,
        "ppl_stderr": ppl.perplexity_stderr,
        "ppl_ratio": ratio.perplexity,
        "ppl_ratio_stderr": ratio.perplexity_stderr,
        "forward_s": outcome.forward_s,
        "buckets": buckets,
    }


def as_json(comparison: ModelComparison, ctx: int, settings: TextSettings, width: int | None) -> dict[str, Any]:
    """The contract's object."""
    done = [outcome for outcome in comparison.outcomes if outcome.of_windows("kl")]
    base = mean_of(np.concatenate(done[0].of_windows("base_nll")))
    forward = comparison.base_forward_s + sum(o.forward_s for o in comparison.outcomes)
    kept = None
    if comparison.kept_bytes:
        kept = {
            "bytes": comparison.kept_bytes,
            "tokens": comparison.kept_rows,
            "loss": {name: {"kld_stored": s, "kld_true": t} for name, (s, t) in comparison.loss.items()},
        }
    return {
        "base": comparison.base.label,
        "base_ppl": base.perplexity,
        "base_ppl_stderr": base.perplexity_stderr,
        "protocol": settings.protocol,
        "ctx": ctx,
        "models": [figures(comparison, o, width) for o in done],
        "seconds": comparison.seconds,
        "forward_s": forward,
        "base_forward_s": comparison.base_forward_s,
        "base_on_disk": kept,
        "complete": comparison.ended is None,
    }


def report_of(data: dict[str, Any]) -> Report:
    """Tables and pictures of `as_json`."""
    names = {m["model"]: _short(m["model"], data["base"]) for m in data["models"]}
    columns: tuple[str, ...] = (
        "candidate",
        "KL mean",
        "±",
        "median",
        "p99",
        "max",
        "top-1 %",
        "Δp rms %",
        "perplexity",
        "ratio",
        "±",
    )
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            names[m["model"]],
            m["kld_mean"],
            m["kld_stderr"],
            m["kld_median"],
            m["kld_p99"],
            m["kld_max"],
            100 * m["top1"],
            100 * m["delta_p_rms"],
            m["ppl"],
            m["ppl_ratio"],
            m["ppl_ratio_stderr"],
        )
        for m in data["models"]
    )
    told = f"KL(base || candidate) in nats; the base's perplexity is {data['base_ppl']:.4f}. ± are standard errors."
    if len({m["n_tokens"] for m in data["models"]}) > 1:  # ended early, one after the other
        columns = (*columns, "tokens")
        rows = tuple((*row, m["n_tokens"]) for row, m in zip(rows, data["models"], strict=True))
    tables = [Table(f"Divergence from {_short(data['base'], '')}", columns, rows, told, 3)]
    spans = [(b["start"], b["end"]) for b in data["models"][0]["buckets"]]
    by_place = tuple(
        (
            f"{start}-{end}",
            *(next((b["kld_mean"] for b in m["buckets"] if b["start"] == start), None) for m in data["models"]),
        )
        for start, end in spans
    )
    tables.append(Table("KL mean by position", ("positions", *names.values()), by_place, digits=3))
    pictures = []
    for key, label, log in (("kld_mean", "KL divergence (nats)", True), ("top1", "top-1 agreement", False)):
        lines = tuple(
            Line(
                names[m["model"]],
                tuple((b["start"] + b["end"]) / 2 for b in m["buckets"]),
                tuple(b[key] for b in m["buckets"]),
                tuple(b["kld_stderr"] for b in m["buckets"]) if key == "kld_mean" else (),
            )
            for m in data["models"]
        )
        pictures.append(Chart(f"{label} by position", "position (tokens)", label, lines, log_y=log))
    said = [
        f"{data['models'][0]['n_tokens']} tokens, protocol {data['protocol']}, context {data['ctx']}; {data['seconds']:.0f} s, "
        f"{data['seconds'] / data['forward_s']:.2f} of the forward passes"
    ]
    if data["base_on_disk"]:
        kept = data["base_on_disk"]
        losses = [x["kld_stored"] / x["kld_true"] - 1 for x in kept["loss"].values() if x["kld_true"] > 0]
        size = f"the base's distributions took {kept['bytes'] / kept['tokens'] / 1e3:.1f} kB a token on the disk"
        if losses:
            size += f"; on the tokens that were kept whole, that changed the divergence by {max(losses, key=abs):+.2%} at most"
        said.append(size)
    if not data["complete"]:
        said.append("not complete: the run was ended before the text was")
    return Report(f"Comparison with {_short(data['base'], '')}", tuple(said), tuple(tables), tuple(pictures))


def _short(label: str, base: str) -> str:
    """A variant's label without its folder, and without the file's name where that is the base's."""
    path, how = split_variant(label)
    if how and path == split_variant(base)[0]:
        return "@" + ",".join(how)
    return "@".join([Path(path).name, *([",".join(how)] if how else [])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge compare`."""
    parser.add_argument("base", metavar="BASE.gguf", help="what the others are compared with, in 16 bits or more")
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a file, or a file and how to run it: MODEL.gguf@kv=q4_0, @backend=cuda, @yarn-factor=2,yarn-attention-factor=1.2",
    )
    add_text_flags(parser)
    parser.add_argument("--bucket", type=count(1, MAX_CONTEXT), metavar="N", help="tokens of a bucket of positions")
    add_running_flags(parser)
    parser.add_argument(
        "--keep-base",
        choices=("auto", "memory", "disk"),
        default="auto",
        help="memory: all models side by side; disk: one after the other, the base's distributions compressed (%(default)s)",
    )
    parser.add_argument(
        "--scratch", metavar="DIR", help="where --keep-base disk keeps them (default: the temporary folder)"
    )
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge compare`."""
    check_outputs(args)
    base, *others = (parse_variant(m, kv_type=args.kv_type, backend=args.backend) for m in (args.base, *args.models))
    scratch = None if args.scratch is None else Path(args.scratch)
    if scratch is not None and not scratch.is_dir():
        raise YarnEdgeError(f"{scratch}: no such folder")
    settings = text_settings(args)
    comparison, ctx = compare(
        base,
        others,
        settings,
        threads=args.threads,
        attention=args.flash_attention,
        keep=args.keep_base,
        scratch=scratch,
    )
    data = as_json(comparison, ctx, settings, args.bucket)
    deliver(args, data, report_of(data), sorted({v.path for v in (base, *others)}))
    if comparison.ended is not None:
        raise comparison.ended
    return 0
