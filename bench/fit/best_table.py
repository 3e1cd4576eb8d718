"""The results of `fit --text` for people and as data: the file, those that it was measured next to, and the frontier."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from yarn_edge.memory.choice import gib
from yarn_edge.report.report import Chart, Line, Report, Table
from yarn_edge.runtime.ggml_types import GGMLType
from yarn_edge.runtime.kv_cache import kv_types
from yarn_edge.runtime.load_log import MIB

from .best_file import BestFile, FittingFile


def best_report(result: BestFile) -> Report:
    """Tables, sentences and the picture."""
    memory = gib(result.wanted.memory)
    title = f"The best of {result.wanted.model.name} for {memory} with {result.n_ctx} tokens"
    tables = (_measured(result), _types(result.chosen), _frontier(result))
    return Report(title, tuple(_sentences(result)), tables, (_picture(result),))


def commands(result: BestFile) -> list[list[str]]:
    """The lines to paste: what makes the best file, if it was not written, and what runs it."""
    wanted, best = result.wanted, result.best
    output = str(wanted.output or f"{wanted.model.resolve().name}-best.gguf")
    run = ["yarn-edge", "chat", output, "--ctx", str(result.n_ctx), "--kv-type", best.kv_type]
    if wanted.output is not None:
        return [run]
    words = ["yarn-edge", "fit", str(wanted.model), "--memory", str(wanted.memory), "--ctx", str(result.n_ctx)]
    return [[*words, "--text", ",".join(wanted.texts), "-o", output], run]


def best_json(result: BestFile) -> dict[str, Any]:
    """The JSON object of `fit --text`."""
    return {
        "model": str(result.wanted.model),
        "memory_bytes": result.wanted.memory,
        "n_ctx": result.n_ctx,
        "measured_ctx": result.measured_ctx,
        "texts": list(result.wanted.texts),
        "cache_kld": {"k": dict(result.losses.k), "v": dict(result.losses.v)},
        "files": [_file_json(file, file is result.best) for file in _files(result)],
        "frontier": [
            {"total_bytes": p.memory_bytes, "kv_type": p.kv_type, "expected_kld": p.nats, "types": _counts(p.types)}
            for p in result.frontier
        ],
        "output": None if result.wanted.output is None else str(result.wanted.output),
        "commands": commands(result),
    }


def _file_json(file: FittingFile, is_best: bool) -> dict[str, Any]:
    assert file.kl is not None
    types = None if file.expected is None else {name: kind.name for name, kind in file.expected.types.items()}
    return {
        "quant": file.quant or "chosen",
        "best": is_best,
        "kv_type": file.kv_type,
        "file_bytes": file.file_bytes,
        "total_bytes": file.plan.taken_bytes,
        "kld_mean": file.kl.mean,
        "kld_stderr": file.kl.stderr,
        "expected_kld": None if file.expected is None else file.expected.nats,
        "tensor_types": types,
    }


def _files(result: BestFile) -> list[FittingFile]:
    return [result.chosen, *sorted(result.standard, key=lambda file: file.nats)]


def _name(file: FittingFile) -> str:
    return file.quant or f"chosen types, {file.bits_per_weight:.2f} bits per weight"


def _measured(result: BestFile) -> Table:
    rows = []
    for file in _files(result):
        assert file.kl is not None
        k, v = kv_types(file.kv_type)
        sizes = round(file.file_bytes / MIB, 1), k, v, round(file.plan.taken_bytes / MIB, 1)
        ratio = file.nats / result.chosen.nats
        rows.append((_name(file), *sizes, file.kl.mean, file.kl.stderr, round(ratio, 2)))
    columns = ("file", "MiB", "K", "V", "memory MiB", "KL (nats)", "standard error", "times the chosen")
    note = (
        f"KL to the 16-bit model with an f16 cache, on the ends of the texts, which did not calibrate, {result.measured_ctx} tokens at "
        "a time; standard files with the importance matrix of the same reading, each with the best of its caches that fits; those that a "
        "better file with as good a cache beats are left out"
    )
    return Table("Measured", columns, tuple(rows), note, digits=4)


def _types(chosen: FittingFile) -> Table:
    assert chosen.expected is not None
    rows = tuple((name, n) for name, n in _counts(chosen.expected.types).items())
    return Table("The chosen types", ("type", "tensors"), rows)


def _counts(types: Mapping[str, GGMLType]) -> dict[str, int]:
    return dict(Counter(kind.name for kind in types.values()).most_common())


def _frontier(result: BestFile) -> Table:
    rows = []
    for planned in result.frontier:
        k, v = kv_types(planned.kv_type)
        sizes = round(planned.memory_bytes / MIB), k, v
        rows.append((*sizes, planned.weights_nats, planned.cache_nats, planned.nats))
    columns = ("memory MiB", "K", "V", "weights", "cache", "KL expected")
    note = "expected: of the weights by their sensitivities, of the cache as measured; rounding of activations comes on top"
    return Table(f"The frontier with {result.n_ctx} tokens", columns, tuple(rows), note, digits=3)


def _sentences(result: BestFile) -> list[str]:
    best, wanted = result.best, result.wanted
    what = f"{_name(best)}, cache {best.kv_type}: {best.nats:.4f} nats in {gib(best.plan.taken_bytes)}"
    said = [f"Best for {gib(wanted.memory)} with {result.n_ctx} tokens: {what}."]
    others = [file for file in result.standard if file is not best]
    if others:
        second = min(others, key=lambda file: file.nats)
        said.append(
            f"The best standard file that fits is {second.quant} with {second.kv_type}: {second.nats:.4f} nats, "
            f"of which this is {best.nats / second.nats:.2f}."
            if second.nats
            else f"{second.quant} with {second.kv_type} is as good."
        )
    elif not result.standard:
        said.append("No standard file fits.")
    if best is not result.chosen:
        said.append("A standard file is better than the types that were chosen.")
    return [*said, *(f"    {shlex.join(words)}" for words in commands(result))]


def _picture(result: BestFile) -> Chart:
    def gibs(n_bytes: float) -> float:
        return n_bytes / 2**30

    frontier = [p for p in result.frontier if p.nats > 0]
    lines = [Line("expected", tuple(gibs(p.memory_bytes) for p in frontier), tuple(p.nats for p in frontier))]
    for file in _files(result):
        assert file.kl is not None
        error = () if math.isnan(file.kl.stderr) else (file.kl.stderr,)
        name = file.quant or "chosen types"
        lines.append(Line(f"{name}, {file.kv_type}", (gibs(file.plan.taken_bytes),), (file.nats,), error))
    marks = ((gibs(result.wanted.memory), f"budget {gib(result.wanted.memory)}"),)
    title = f"Loss of {result.wanted.model.name} by memory, with {result.n_ctx} tokens"
    return Chart(title, "memory (GiB)", "KL to 16 bits (nats)", tuple(lines), log_y=True, marks=marks)
