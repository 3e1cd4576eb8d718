"""How fast files of one model run next to each other: `python -m yarn_edge.bench.peers.files FIRST.gguf FILE.gguf…`.

A context of each file takes its turn: it generates N tokens behind a context of a given depth, or reads N tokens. Ratios are of pairs of
neighboring turns, the first file's time over the other's.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.graph.opening import open_context
from yarn_edge.report.report import Table
from yarn_edge.report.tables import table_text
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from ..speed.command import depth, listed
from .race import Race, Results
from .sides import GENERATING, N_GENERATED, N_READ, READING, compared, row, turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the race."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE.gguf", help="files of one model; the first is compared with"
    )
    text = "cached tokens (default: 0)"
    parser.add_argument("--depth", type=listed(depth), default=[0], metavar="N,N", help=text)


def run(args: argparse.Namespace, results: Results) -> None:
    """Fill `results` with a row for each depth, test and file."""
    rows: list[dict[str, Any]] = []
    results["rows"], n_ctx = rows, max(args.depth) + N_READ
    settings = ContextSettings(n_ctx=n_ctx, n_batch=N_READ, threads=args.threads)
    with ExitStack() as stack:
        models = [stack.enter_context(Model(path)) for path in args.files]
        sides = {m.path.name: stack.enter_context(open_context(m, settings)) for m in models}
        tokens = np.random.default_rng(0).integers(0, models[0].n_vocab, n_ctx).tolist()
        for cached in args.depth:
            for context in sides.values():
                context.clear()
                context.evaluate(tokens[:cached] or tokens[:1], 0, "none")
            for test, n in ((GENERATING, N_GENERATED), (READING, N_READ)):
                seconds = turns(sides, tokens, cached, (test, n), args.repeat)
                first = seconds[models[0].path.name]
                rows += [
                    row(f"{test} {n}", cached, name, n, own, compared(first, own)) for name, own in seconds.items()
                ]


def tables(results: Results) -> str:
    """A line for each depth, test and file."""
    columns = {"test": "test", "depth": "depth", "side": "file", "tok_per_s": "tok/s", "ratio": "speed of the first"}
    columns |= {"low": "from", "high": "to (95 %)"}
    rows = tuple(tuple(row[key] for key in columns) for row in results["rows"])
    return table_text(Table("", tuple(columns.values()), rows, digits=4))


RACE = Race("files", "Speed of files of one model, in turns.", add_arguments, run, tables, repeat=15)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
