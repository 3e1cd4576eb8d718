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
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from ..speed.command import depth, listed
from .race import Race, Results
from .sides import N_READ, generating_and_reading, rows_text


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
            rows += generating_and_reading(sides, tokens, cached, args.repeat)


def tables(results: Results) -> str:
    """A line for each depth, test and file."""
    return rows_text(results["rows"], "file", "speed of the first")


RACE = Race("files", "Speed of files of one model, in turns.", add_arguments, run, tables, repeat=15)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
