"""What `fit` found, for people: the table of quantizations and caches, the parts of the choice, the devices, the picture."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from yarn_edge.context_sizes import MIB
from yarn_edge.memory_plan import gib

from .report import Chart, Line, Report, Table

if TYPE_CHECKING:
    from .fit_search import Fit


def as_report(found: Fit) -> Report:
    """Tables, the sentences that explain the choice, and the picture."""
    tables = [_longest(found)]
    if found.choice is not None:
        tables.append(_parts(found))
    if found.devices:
        tables.append(_devices(found))
    return Report(f"What fits: {found.model.name}", tuple(_sentences(found)), tuple(tables), (_picture(found),))


def _longest(found: Fit) -> Table:
    rows = tuple(
        (
            row.candidate.quant, round(row.candidate.file.weight_bytes / MIB), row.kv_type,
            None if row.refused else row.longest_ctx, round(row.plan.total_bytes / MIB) if row.plan else None, row.tok_per_s,
        )
        for row in found.rows
    )  # fmt: skip
    refused = {row.kv_type: row.refused for row in found.rows if row.refused}
    notes = [f"no {kv_type} cache: {reason}" for kv_type, reason in refused.items()]
    notes.append(
        f"up to {found.most_ctx} tokens were looked at; tok/s: estimated from the memory's bandwidth, with the context full"
    )
    columns = ("quantization", "weights MiB", "cache", "longest context", "memory MiB", "tok/s at most")
    title = f"{found.model.name}: what fits into {gib(found.budget_bytes)} ({found.budget_told})"
    return Table(title, columns, rows, "; ".join(notes), digits=3)


def _parts(found: Fit) -> Table:
    assert found.choice is not None
    plan = found.choice.plan
    parts = (
        ("weights", plan.weights_bytes, "the mapped file"),
        ("repacked weights", plan.repacked_bytes, "rearranged for the CPU's kernels, beside the file"),
        (f"cache, {plan.kv_type}", plan.kv_bytes, f"{plan.n_ctx} tokens"),
        ("compute buffers", plan.compute_bytes, "as far as they are written"),
        ("output buffer", plan.output_bytes, "logits of one token"),
        ("process", plan.process_bytes, "Python, llama.cpp, vocabulary, bookkeeping of the cache"),
        ("in all", plan.total_bytes, f"of {gib(found.budget_bytes)}"),
    )
    rows = tuple((name, round(n_bytes / MIB, 1), what) for name, n_bytes, what in parts)
    return Table(f"{found.shown} with {plan.n_ctx} tokens, on the CPU", ("part", "MiB", "what"), rows)


def _devices(found: Fit) -> Table:
    rows = tuple(
        (
            d.device.name, round(d.free_bytes / MIB), None if d.needed_bytes is None else round(d.needed_bytes / MIB),
            "all of it fits" if d.fits else d.told or "does not fit",
        )
        for d in found.devices
    )  # fmt: skip
    note = "all layers and the cache go on one device or on the CPU: a model is not split between them"
    return Table("Devices", ("device", "free MiB", "needed MiB", ""), rows, note)


def _sentences(found: Fit) -> list[str]:
    if found.choice is None:
        return [f"Nothing to recommend: {found.why}"]
    told = [f"Recommended: {found.why}."]
    if found.tok_per_s is not None:
        told.append(
            f"Expected: at most {found.tok_per_s:.1f} tok/s with the context full, an estimate: what the memory's bandwidth allows."
        )
    return [*told, *(f"    {shlex.join(words)}" for words in found.command)]


def _picture(found: Fit) -> Chart:
    lines = [
        Line(f"{kv_type} cache", tuple(float(n) for n, _b in points), tuple(b / 2**30 for _n, b in points))
        for kv_type, points in found.curves.items()
    ]
    ends = [float(n) for points in found.curves.values() for n, _b in (points[0], points[-1])]
    budget = found.budget_bytes / 2**30
    if ends:
        lines.append(Line(f"budget, {gib(found.budget_bytes)}", (min(ends), max(ends)), (budget, budget)))
    marks = ((float(found.choice.n_ctx), f"recommended {found.choice.n_ctx}"),) if found.choice is not None else ()
    title = f"Memory of {found.model.name} ({found.shown}) by context"
    return Chart(title, "context (tokens)", "GiB", tuple(lines), log_x=True, log_y=True, marks=marks)
