"""`yarn-edge sweep`: perplexity or divergence over the attention factor, the factor or the method, without writing a file.

attention-factor  the paper's A.2: which temperature of attention predicts best
factor            what static YaRN costs texts that would have done without it
method            plain RoPE, PI, NTK-aware, NTK-by-parts, YaRN, and the dynamic ones (B.3), at each position
Every value is run by runtime arguments and overrides of metadata in memory, on the same tokens, so the differences are paired.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_scaling_flags, count, scaling_overrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.loadable import MAX_CONTEXT
from yarn_edge.llama_rules.rescale import base_scaling, with_factor
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.report import Chart, Line, Report, Table
from yarn_edge.runtime.context_settings import FlashAttention

from ..scoring.averages import edges_of, mean_of, perplexity_by_position, perplexity_of
from ..scoring.evaluate import Scores, open_context, score
from ..scoring.likelihood import Float64
from ..scoring.variants import Variant, parse_variant, scaled
from ..scoring.windows import Window
from .best_value import Best, best_value
from .perplexity import STOPPED, TextSettings, add_running_flags, add_text_flags, plan_windows, text_settings
from .side_by_side import CandidateOutcome, ModelComparison, side_by_side
from .sweep_plan import Value, attention_values, factor_values, method_values, runs_of

OVER = ("attention-factor", "factor", "method")


@dataclass
class Swept:
    """What was measured of one value: negative log-likelihoods by window, and divergences where they were asked for."""

    value: Value
    nll: list[Float64]
    kl: list[Float64] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Sweep:
    """A sweep as far as it came. base: around what; reference: label of what divergences are from."""

    over: str
    base: RopeScaling
    windows: list[Window]
    ctx: int
    values: list[Swept] = field(default_factory=list)
    reference: str = ""
    ended: BaseException | None = None


def values_of(over: str, base: RopeScaling, texts: Sequence[str] | None, ctx: int) -> list[Value]:
    """The values of --values, or the defaults."""
    if over == "method":
        factor = base.factor if base.factor > 1 else ctx / base.original_context
        if factor <= 1:
            raise YarnEdgeError(
                f"--over method: the context of {ctx} tokens is not beyond the original {base.original_context}: give a longer "
                "--ctx, or --yarn-factor"
            )
        return method_values(base, texts, factor)
    try:
        numbers = None if texts is None else sorted({float(t) for t in texts})
    except ValueError:
        raise YarnEdgeError(f"--values: {','.join(texts or ())!r} are not numbers") from None
    if numbers is not None and not all(0 < n < 1e6 for n in numbers):
        raise YarnEdgeError("--values: they must be above 0")
    if over == "factor" and numbers is not None and numbers[0] < 1:
        raise YarnEdgeError(f"--values: a factor of {numbers[0]:g} is below 1, which is plain RoPE")
    return attention_values(base, numbers) if over == "attention-factor" else factor_values(base, numbers, ctx)


def sweep(
    variant: Variant,
    over: str,
    settings: TextSettings,
    *,
    values: Sequence[str] | None = None,
    overrides: dict[str, Any] | None = None,
    metric: str = "perplexity",
    step: int | None = None,
    threads: int | None = None,
    attention: FlashAttention = "auto",
) -> Sweep:
    """Measure every value on the same windows. Raises what ends it before one value was measured."""
    file = read_gguf(variant.path)
    base = base_scaling(file, overrides or {})
    with variant.load() as model:
        windows, ctx = plan_windows(model, settings)
    found = Sweep(over, base, windows, ctx)
    planned = values_of(over, base, values, ctx)
    runs = [
        (value, runs_of(value, variant, windows, base.original_context, step or max(512, ctx // 8)))
        for value in planned
    ]
    moving = [value.label for value, _ in runs if value.dynamic]
    if metric == "divergence" and moving:
        raise YarnEdgeError(f"--metric divergence: {moving[0]} has other angles at each length: take perplexity")
    try:
        if metric == "divergence":
            _divergences(found, runs, variant, threads, attention)
        else:
            for number, (value, parts) in enumerate(runs, 1):
                found.values.append(
                    _perplexities(value, parts, windows, f"{value.label} ({number} of {len(runs)})", threads, attention)
                )
    except STOPPED as reason:
        if not found.values:
            raise
        found.ended = reason
    return found


def _perplexities(
    value: Value,
    runs: Sequence[Any],
    windows: Sequence[Window],
    label: str,
    threads: int | None,
    attention: FlashAttention,
) -> Swept:
    """One value over all windows, put together from its runs."""
    whole = Scores.empty(windows)
    places = {(w.document, w.start): i for i, w in enumerate(windows)}
    swept = Swept(value, whole.nll)
    for run in runs:
        scores = Scores.empty(run.windows)
        longest = max(len(w.tokens) for w in run.windows)
        with run.variant.load() as model, open_context(model, run.variant, longest, threads, attention) as context:
            score(context, scores, label=label, threads=threads)
        for window, nll in zip(run.windows, scores.nll, strict=True):
            at = places[window.document, window.start]
            offset = window.first - windows[at].first
            whole.nll[at][offset : offset + len(nll)] = nll
        swept.tokens, swept.seconds = swept.tokens + scores.tokens, swept.seconds + scores.seconds
    return swept


def _divergences(
    found: Sweep,
    runs: Sequence[tuple[Value, Sequence[Any]]],
    variant: Variant,
    threads: int | None,
    attention: FlashAttention,
) -> None:
    """Each value side by side with the reference: plain RoPE, for attention factors the base itself."""
    plain = found.over != "attention-factor"
    reference = scaled(variant, with_factor(found.base, 1.0) if plain else found.base)
    found.reference = "plain RoPE" if plain else f"attention factor {found.base.attention_factor:g}"
    for value, parts in runs:
        (run,) = parts
        comparison = ModelComparison(found.windows, reference, [CandidateOutcome(run.variant)])
        side_by_side(comparison, max(len(w.tokens) for w in found.windows), threads, attention)
        (outcome,) = comparison.outcomes
        tokens = sum(len(w.tokens) - 1 for w in found.windows)
        found.values.append(
            Swept(value, outcome.of_windows("nll"), outcome.of_windows("kl"), tokens, outcome.forward_s)
        )


def as_json(found: Sweep, settings: TextSettings, metric: str, width: int | None, label: str) -> dict[str, Any]:
    """Every value's figures, and which one is best and how sure that is."""
    measured = [s.kl if metric == "divergence" else s.nll for s in found.values]
    best = best_value([s.value.number for s in found.values], measured)
    positions = np.concatenate([np.arange(w.first, len(w.tokens)) for w in found.windows])
    edges = edges_of(max(len(w.tokens) for w in found.windows), width)
    rows = []
    for swept, behind in zip(found.values, best.behind, strict=True):
        whole = np.concatenate(swept.nll)
        mean = mean_of(whole)
        row: dict[str, Any] = {
            "value": swept.value.label if swept.value.number is None else swept.value.number,
            "ppl": mean.perplexity,
            "stderr": mean.perplexity_stderr,
            "n_tokens": mean.n,
            "behind_best": behind.mean,
            "behind_best_stderr": behind.stderr,
            "tok_per_s": swept.tokens / swept.seconds if swept.seconds else None,
            "buckets": [b.as_json() for b in perplexity_by_position(whole, edges, positions)],
        }
        if swept.kl:
            kl = mean_of(np.concatenate(swept.kl))
            row |= {"kld_mean": kl.mean, "kld_stderr": kl.stderr}
        rows.append(row)
    return {
        "model": label,
        "over": found.over,
        "metric": metric,
        "reference": found.reference or None,
        "ctx": found.ctx,
        "original_context": found.base.original_context,
        "factor": found.base.factor,
        "protocol": settings.protocol,
        "values": rows,
        "recommended": _recommended(best, rows),
        "complete": found.ended is None,
    }


def _recommended(best: Best, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "value": rows[best.index]["value"],
        "not_distinguishable": [rows[i]["value"] for i in best.alike],
        "next_best": None if best.next is None else rows[best.next]["value"],
        "standard_errors_ahead": best.ahead,
        "fitted": best.fitted,
        "fitted_low": best.low,
        "fitted_high": best.high,
    }


def report_of(data: dict[str, Any]) -> Report:
    """Tables and pictures of `as_json`."""
    over, unit = data["over"], "divergence (nats)" if data["metric"] == "divergence" else "perplexity"
    key, error = ("kld_mean", "kld_stderr") if data["metric"] == "divergence" else ("ppl", "stderr")
    rows = tuple(
        (r["value"], r[key], r[error], r["behind_best"], r["behind_best_stderr"], r["n_tokens"]) for r in data["values"]
    )
    behind = "behind best (nats)"
    told = (
        "behind best: mean paired difference, its standard error over blocks of 256 tokens. "
        f"Original context {data['original_context']}."
    )
    tables = [Table(f"{unit} over {over}", (over, unit, "±", behind, "±", "tokens"), rows, told)]
    places = tuple(
        (f"{b['start']}-{b['end']}", *(r["buckets"][i]["ppl"] for r in data["values"]))
        for i, b in enumerate(data["values"][0]["buckets"])
    )
    tables.append(
        Table("Perplexity by position", ("positions", *(_named(r["value"]) for r in data["values"])), places, digits=4)
    )
    middles = tuple((b["start"] + b["end"]) / 2 for b in data["values"][0]["buckets"])
    pictures = []
    if over != "method":
        line = Line(
            unit,
            tuple(float(r["value"]) for r in data["values"]),
            tuple(r[key] for r in data["values"]),
            tuple(r[error] for r in data["values"]),
        )
        at = ((float(data["recommended"]["value"]), "best"),)
        pictures.append(Chart(f"{unit} over {over}", over, unit, (line,), log_x=over == "factor", marks=at))
    original = float(data["original_context"])
    lines = tuple(Line(_named(r["value"]), middles, tuple(b["ppl"] for b in r["buckets"])) for r in data["values"])
    marks = ((original, f"original context {data['original_context']}"),) if original <= data["ctx"] else ()
    pictures.append(Chart("Perplexity by position", "position (tokens)", "perplexity", lines, log_y=True, marks=marks))
    return Report(f"Sweep over {over}", _said(data), tuple(tables), tuple(pictures))


def _named(value: float | str) -> str:
    """A value as people write it."""
    return value if isinstance(value, str) else f"{value:g}"


def _said(data: dict[str, Any]) -> tuple[str, ...]:
    best, said = data["recommended"], []
    name = _named(best["value"]) if data["over"] == "method" else f"{data['over']} {_named(best['value'])}"
    said.append(f"best over these {data['values'][0]['n_tokens']} tokens: {name}")
    if best["not_distinguishable"]:
        others = ", ".join(map(_named, best["not_distinguishable"]))
        said.append(f"not to be told from it on this much text (within 2 standard errors): {others}")
    if best["next_best"] is not None and best["standard_errors_ahead"] is not None:
        said.append(
            f"ahead of the next, {_named(best['next_best'])}, by {best['standard_errors_ahead']:.1f} standard errors"
        )
    if best["fitted"] is not None:
        said.append(
            f"a parabola through the best and its neighbours has its lowest point at {best['fitted']:.4g}, 95 % of the resamplings "
            f"from {best['fitted_low']:.4g} to {best['fitted_high']:.4g}"
        )
    if data["over"] == "factor":
        said += _price(data)
    if not data["complete"]:
        said.append("not complete: the sweep was ended before all values were measured")
    return tuple(said)


def _price(data: dict[str, Any]) -> list[str]:
    """What each factor costs within the original context, next to plain RoPE."""
    plain = next((r for r in data["values"] if r["value"] == 1), None)
    if plain is None:
        return []
    inside = [i for i, b in enumerate(plain["buckets"]) if b["end"] <= data["original_context"]]
    if not inside:
        return []

    def mean(row: dict[str, Any]) -> float:
        parts = [row["buckets"][i] for i in inside]
        total = sum(math.log(b["ppl"]) * b["n_tokens"] for b in parts)
        return float(total / sum(b["n_tokens"] for b in parts))

    costs = ", ".join(
        f"factor {r['value']:g} {perplexity_of(mean(r) - mean(plain)) - 1:+.1%}"
        for r in data["values"]
        if r is not plain
    )
    return [f"perplexity within the original context next to plain RoPE: {costs}"] if costs else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge sweep`."""
    parser.add_argument("model", metavar="MODEL.gguf", help="a GGUF whose scaling is in its keys (not baked)")
    parser.add_argument("--over", choices=OVER, required=True, help="what to vary")
    parser.add_argument(
        "--values", metavar="LIST", help="numbers, or methods: plain,pi,ntk,ntk-by-parts,yarn,dynamic-ntk,dynamic-yarn"
    )
    parser.add_argument(
        "--metric",
        choices=("perplexity", "divergence"),
        default="perplexity",
        help="divergence: from plain RoPE; over attention-factor from the file's own (%(default)s)",
    )
    add_text_flags(parser)
    parser.add_argument("--bucket", type=count(1, MAX_CONTEXT), metavar="N", help="tokens of a bucket of positions")
    parser.add_argument(
        "--dynamic-step",
        type=count(1, MAX_CONTEXT),
        metavar="N",
        help="dynamic methods: a pass for every N tokens beyond the original context (default: ctx / 8)",
    )
    add_running_flags(parser)
    add_scaling_flags(parser, "what to sweep around, on top of the file's own")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge sweep`."""
    check_outputs(args)
    if args.freeze_at is not None:
        raise YarnEdgeError("--freeze-at is for checkpoints: a GGUF's scaling is static already")
    variant, settings = parse_variant(args.model, kv_type=args.kv_type, backend=args.backend), text_settings(args)
    if variant.arguments is not None:
        raise YarnEdgeError(f"{args.model}: give the scaling to sweep around by --yarn-… flags")
    if settings.protocol not in ("curve", "llama.cpp"):
        raise YarnEdgeError(f"--protocol {settings.protocol}: sweep takes curve or llama.cpp")
    found = sweep(
        variant,
        args.over,
        settings,
        values=args.values.split(",") if args.values else None,
        overrides=scaling_overrides(args),
        metric=args.metric,
        step=args.dynamic_step,
        threads=args.threads,
        attention=args.flash_attention,
    )
    data = as_json(found, settings, args.metric, args.bucket, args.model)
    deliver(args, data, report_of(data), [variant.path])
    if found.ended is not None:
        raise found.ended
    return 0
