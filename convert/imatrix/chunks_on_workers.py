"""The importance matrix on several workers: chunks that are evaluated side by side are a unit.

The sums of the units are added up here, in float64 and in the order of the chunks, as in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from yarn_edge.flags import TRUST
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.graph.opening import open_context
from yarn_edge.jobs.crew import Crew
from yarn_edge.jobs.run import run_units
from yarn_edge.jobs.sent_file import SentFile
from yarn_edge.jobs.unit import Unit, UnitResult, kept_open
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.first_load import trusted
from yarn_edge.runtime.llama_api import llama
from yarn_edge.runtime.model import Model

from .activations import ActivationTap, importances
from .matrix import Importance


def measure_on(
    crew: Crew,
    file: GGUFFile,
    chunks: Sequence[Sequence[int]],
    settings: ContextSettings,
    with_output: bool,
    take: Callable[[Mapping[str, Importance], int], None],
) -> int:
    """Measure the chunks; returns how many tokens this run evaluated. take: gets the importances of the next chunks, in their order,
    and the number of these chunks.
    """
    sent, trust = SentFile.of(file), trusted()
    parts = [chunks[at : at + settings.n_seq] for at in range(0, len(chunks), settings.n_seq)]
    identity = [sent.identity, asdict(replace(settings, threads=None)), with_output, llama().__version__]
    units = []
    for number, part in enumerate(parts):
        key = hashlib.sha256(json.dumps(["measure_chunks", *identity, list(part)]).encode()).hexdigest()
        arguments = (sent, settings, with_output, trust, part)
        units.append(Unit(measure_chunks, arguments, key, f"part {number + 1}", sum(map(len, part))))
    waiting: dict[int, UnitResult] = {}
    added = tokens = 0

    def put(index: int, result: UnitResult) -> None:
        nonlocal added, tokens
        tokens += 0 if result.earlier else units[index].cost
        waiting[index] = result
        while added in waiting:
            take(_unpacked(waiting.pop(added)), len(parts[added]))
            added += 1

    run_units(units, crew, "Importance matrix", put)
    return tokens


def measure_chunks(
    sent: SentFile, settings: ContextSettings, with_output: bool, trust: bool, chunks: Sequence[Sequence[int]]
) -> UnitResult:
    """On a worker: the sums and counts of every weight over chunks side by side, as arrays `sums NUMBER`, `counts NUMBER`."""
    if trust:
        os.environ[TRUST] = "1"
    tap, context = kept_open((sent, settings, with_output), lambda: _tapped(sent, settings, with_output))
    measured = importances(tap.measure(context, chunks))
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for number, importance in enumerate(measured.values()):
        arrays |= {f"sums {number}": importance.sums, f"counts {number}": importance.counts}
    return UnitResult(arrays, {"weights": list(measured)})


@contextmanager
def _tapped(sent: SentFile, settings: ContextSettings, with_output: bool) -> Iterator[tuple[ActivationTap, Context]]:
    file = sent.read()
    tap = ActivationTap(with_output=with_output)
    with Model(file.path, gguf=file) as model, open_context(model, settings, tap=tap) as context:
        yield tap, context


def _unpacked(result: UnitResult) -> dict[str, Importance]:
    return {
        weight: Importance(result.arrays[f"sums {i}"], result.arrays[f"counts {i}"].astype(np.int64))
        for i, weight in enumerate(result.facts["weights"])
    }
