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
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from ..speed.command import depth, listed
from .race import Race, Results
from .sides import N_READ, generating_and_reading, rows_text

PLAIN, NUMBA, PYTHON = "without the edit", "Numba", "Python"


@contextmanager
def _contexts(model: Model, n_ctx: int, threads: int) -> Iterator[dict[str, Context]]:
    """The sides by name, plain llama.cpp first. Raises YarnEdgeError for a file in another form."""
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
            results["rows"] += generating_and_reading(sides, tokens, depth, args.repeat)


def _tables(results: Results) -> str:
    """A line for each depth, test and side."""
    return rows_text(results["rows"], "side", "speed of plain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the race."""
    parser.add_argument("model", metavar="FILE.gguf", help="a file in the live form")
    parser.add_argument(
        "--depth", type=listed(depth), default=[0, 2048], metavar="N,N", help="cached tokens (default: 0,2048)"
    )


RACE = Race("live", "What live positions cost a token.", add_arguments, _run, _tables, repeat=30)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
