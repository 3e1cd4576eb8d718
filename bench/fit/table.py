"""The results of `fit` for people: the table of quantizations and caches, the parts of the choice, the picture."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from yarn_edge.memory.choice import gib
from yarn_edge.report.report import Chart, Line, Report, Table
from yarn_edge.runtime.load_log import MIB

if TYPE_CHECKING:
    from .search import Fit, PlaceFit


def fit_report(result: Fit) -> Report:
    """The tables, the sentences that explain the choice, and the picture."""
    tables = [_longest(result, place) for place in result.places]
    if result.chosen.choice is not None:
        tables.append(_parts(result.chosen))
    return Report(f"What fits: {result.model.name}", tuple(_sentences(result)), tuple(tables), (_picture(result),))


def _longest(result: Fit, place: PlaceFit) -> Table:
    rows = tuple(
        (
            row.candidate.quant,
            round(row.candidate.file.weight_bytes / MIB),
            row.kv_type,
            None if row.refused else row.longest_ctx,
            round(row.plan.taken_bytes / MIB) if row.plan else None,
            row.tok_per_s,
        )
        for row in place.rows
    )
    refused = {row.kv_type: row.refused for row in place.rows if row.refused}
    notes = [f"no {kv_type} cache: {reason}" for kv_type, reason in refused.items()]
    notes.append(f"contexts up to {result.most_ctx} tokens were considered")
    if any(row.tok_per_s is not None for row in place.rows):
        notes.append("tok/s: estimated from the memory bandwidth, with a full context")
    columns = ("quantization", "weights MiB", "cache", "longest context", "memory MiB", "tok/s at most")
    budget = "given" if result.given else "free now, less a reserve for other programs"
    title = f"{result.model.name}: what fits into {gib(place.budget_bytes)} on {_named(place)} ({budget})"
    return Table(title, columns, rows, "; ".join(notes), digits=3)


def _named(place: PlaceFit) -> str:
    return "the CPU" if place.device is None else f"{place.device.name} ({place.device.description})"


def _parts(place: PlaceFit) -> Table:
    assert place.choice is not None
    plan = place.choice.plan
    if plan.device_bytes is None:
        parts = [
            ("weights", plan.weights_bytes, "the mapped file"),
            ("repacked weights", plan.repacked_bytes, "a second copy, rearranged for the CPU's kernels"),
            (f"cache, {plan.kv_type}", plan.kv_bytes, f"{plan.n_ctx} tokens"),
            ("compute buffers", plan.compute_bytes, "the part that is written"),
            ("output buffer", plan.output_bytes, "logits"),
            ("process", plan.process_bytes, "Python, llama.cpp, vocabulary, bookkeeping of the cache"),
        ]
    else:
        others = plan.device_bytes - plan.kv_bytes
        parts = [
            (f"cache, {plan.kv_type}", plan.kv_bytes, f"{plan.n_ctx} tokens"),
            ("weights and buffers", others, "all layers; the embeddings stay on the CPU"),
        ]
    parts.append(("total", plan.taken_bytes, f"of {gib(place.budget_bytes)}"))
    rows = tuple((name, round(n_bytes / MIB, 1), what) for name, n_bytes, what in parts)
    return Table(f"{place.shown} with {plan.n_ctx} tokens, on {_named(place)}", ("part", "MiB", "what"), rows)


def _sentences(result: Fit) -> list[str]:
    place = result.chosen
    if place.choice is None:
        return [f"Nothing to recommend: {place.why}"]
    sentences = [f"not on {p.name}: {p.why}" for p in result.places if p is not place and p.device is not None]
    sentences.append(f"Recommended, on {_named(place)}: {place.why}.")
    if place.tok_per_s is not None:
        sentences.append(
            f"Expected: at most {place.tok_per_s:.1f} tok/s with a full context, estimated from the memory bandwidth."
        )
    return [*sentences, *(f"    {shlex.join(words)}" for words in result.command)]


def _picture(result: Fit) -> Chart:
    place = result.chosen
    lines = [
        Line(f"{kv_type} cache", tuple(float(n) for n, _b in points), tuple(b / 2**30 for _n, b in points))
        for kv_type, points in place.curves.items()
    ]
    ends = [float(n) for points in place.curves.values() for n, _b in (points[0], points[-1])]
    budget = place.budget_bytes / 2**30
    if ends:
        lines.append(Line(f"budget, {gib(place.budget_bytes)}", (min(ends), max(ends)), (budget, budget)))
    marks = ((float(place.choice.n_ctx), f"recommended {place.choice.n_ctx}"),) if place.choice is not None else ()
    title = f"Memory of {result.model.name} ({place.shown}) on {_named(place)} by context"
    return Chart(title, "context (tokens)", "GiB", tuple(lines), log_x=True, log_y=True, marks=marks)
