"""What live positions cost: `python -m yarn_edge.bench.peers.live FILE.gguf`, a file in the live form.

Three contexts of one loaded model take turns: plain llama.cpp (without the edit), the edit in Numba, the edit in Python. Each turn
generates N tokens behind a context of a given depth, or reads N tokens. Ratios are of pairs of neighboring turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.callback import GraphCallback
from yarn_edge.graph.live_rope import LiveRopes
from yarn_edge.report.report import Table
from yarn_edge.report.tables import table_text
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from ..speed.command import depth, listed
from .race import Race, Results
from .sides import GENERATING, N_GENERATED, N_READ, READING, compared, row, turns

PLAIN, NUMBA, PYTHON = "without the edit", "Numba", "Python"


@contextmanager
def _contexts(model: Model, n_ctx: int, threads: int) -> Iterator[dict[str, Context]]:
    """The sides by name. Raises YarnEdgeError for a file in another form."""
    arguments = model.positions.explicit_arguments
    if arguments.live is None:
        raise YarnEdgeError(f"{model.path}: needs no edit: take a file in the live form (yarn-edge inspect shows it)")
    settings = ContextSettings(n_ctx=n_ctx, n_batch=N_READ, threads=threads)
    with ExitStack() as stack:
        sides = {PLAIN: stack.enter_context(Context(model, replace(settings, arguments=replace(arguments, live=None))))}
        for name, compiled in ((NUMBA, True), (PYTHON, False)):
            edit = LiveRopes(model, arguments.live, compiled=compiled)
            if compiled and edit.compiled is None:
                edit.close()
                continue
            sides[name] = stack.enter_context(Context(model, settings, hook=GraphCallback([edit])))
        yield sides


def _run(args: argparse.Namespace, results: Results) -> None:
    """Fill `results` with a row for each depth, test and side."""
    results["rows"] = []
    with Model(args.model) as model, _contexts(model, max(args.depth) + N_READ, args.threads) as sides:
        tokens = np.random.default_rng(0).integers(0, model.n_vocab, max(args.depth) + N_READ).tolist()
        for depth in args.depth:
            for context in sides.values():
                context.clear()
                context.evaluate(tokens[:depth] or tokens[:1], 0, "none")
            for reading in (False, True):
                results["rows"] += _rows(sides, tokens, depth, reading, args.repeat)


def _rows(
    sides: dict[str, Context], tokens: list[int], depth: int, reading: bool, repeat: int
) -> list[dict[str, object]]:
    test, n = (READING, N_READ) if reading else (GENERATING, N_GENERATED)
    seconds = turns(sides, tokens, depth, (test, n), repeat)
    return [row(f"{test} {n}", depth, name, n, own, compared(seconds[PLAIN], own)) for name, own in seconds.items()]


def _tables(results: Results) -> str:
    """A line for each depth, test and side."""
    columns = {"test": "test", "depth": "depth", "side": "side", "tok_per_s": "tok/s", "ratio": "speed of plain"}
    columns |= {"low": "from", "high": "to (95 %)"}
    rows = tuple(tuple(row[key] for key in columns) for row in results["rows"])
    return table_text(Table("", tuple(columns.values()), rows, digits=4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the race."""
    parser.add_argument("model", metavar="FILE.gguf", help="a file in the live form")
    parser.add_argument(
        "--depth", type=listed(depth), default=[0, 2048], metavar="N,N", help="cached tokens (default: 0,2048)"
    )


RACE = Race("live", "What live positions cost a token.", add_arguments, _run, _tables, repeat=30)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
