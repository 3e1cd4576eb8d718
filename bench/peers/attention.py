"""Our attention next to ggml's: `python -m yarn_edge.bench.peers.attention FILE.gguf`.

Contexts of one loaded model take turns: ggml's flash attention, its plain attention (where the cache type allows it), our kernels.
All hold the same cached tokens. Each turn generates, checks drafts, or reads. Ratios are of neighboring turns, to the faster of
ggml's two.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np

from yarn_edge.flags import add_kv_flags
from yarn_edge.graph.opening import open_context
from yarn_edge.progress import bar, note
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.kv_cache import kv_types, with_kv_parts
from yarn_edge.runtime.model import Model

from ..speed.command import depth, listed
from .race import Race, Results
from .sides import (
    DRAFTS,
    GENERATING,
    N_DRAFTS,
    N_GENERATED,
    N_READ,
    READING,
    compared,
    copy_cache,
    row,
    rows_text,
    turns,
)

FAST, FLASH, PLAIN = "fast", "flash", "plain"
_TESTS = {GENERATING: N_GENERATED, DRAFTS: N_DRAFTS, READING: N_READ}


@contextmanager
def _contexts(model: Model, settings: ContextSettings) -> Iterator[dict[str, Context]]:
    """The sides by name, ours first."""
    v_type = kv_types(settings.kv_type)[1]
    sides: list[Attention] = ["fast", "flash", "plain"] if v_type in ("f16", "bf16") else ["fast", "flash"]
    with ExitStack() as stack:
        yield {kind: stack.enter_context(open_context(model, replace(settings, attention=kind))) for kind in sides}


def _run(args: argparse.Namespace, results: Results) -> None:
    """Fill `results` with a row for each depth, test and side."""
    kv_type = with_kv_parts(args.kv_type, args.kv_k, args.kv_v)
    results |= {"model": args.model.rpartition("/")[2], "kv_type": kv_type, "threads": args.threads, "rows": []}
    n_ctx = max(args.depth) + N_READ
    settings = ContextSettings(n_ctx=n_ctx, n_batch=N_READ, threads=args.threads, kv_type=kv_type)
    with Model(args.model) as model, _contexts(model, settings) as sides:
        tokens = np.random.default_rng(0).integers(0, model.n_vocab, n_ctx).tolist()
        for depth in args.depth:
            _fill(sides, tokens[: depth or 1])
            for test in args.test or _TESTS:
                n = N_READ if test == READING else _TESTS[test]
                repeat = min(args.repeat, args.readings) if test == READING else args.repeat
                seconds = turns(sides, tokens, depth, (test, n), repeat)
                peer = min((name for name in sides if name != FAST), key=lambda name: statistics.median(seconds[name]))
                for name, own in seconds.items():
                    results["rows"].append(row(f"{test} {n}", depth, name, n, own, compared(seconds[peer], own)))
                note(
                    "; ".join(
                        f"{r['side']} {r['tok_per_s']:.4g} tok/s, {r['ratio']:.3f}"
                        for r in results["rows"][-len(sides) :]
                    )
                )


def _fill(sides: dict[str, Context], tokens: list[int]) -> None:
    """Read the tokens with our kernels, and copy the cache to the others."""
    ours = sides[FAST]
    ours.clear()
    with bar("reading", len(tokens), "tokens") as advance:
        ours.evaluate(tokens, 0, "none", advance)
    for name, context in sides.items():
        if name != FAST:
            copy_cache(ours, context, len(tokens), transposed=name == PLAIN)


def _tables(results: Results) -> str:
    """A line for each depth, test and side."""
    return rows_text(results["rows"], "side", "of the faster of ggml's")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the race."""
    add = parser.add_argument
    add("model", metavar="FILE.gguf", help="any GGUF")
    add(
        "--depth",
        type=listed(depth),
        default=[0, 4096, 12288],
        metavar="N,N",
        help="cached tokens (default: 0,4096,12288)",
    )
    add_kv_flags(parser, "the caches", "f16")
    add("--test", choices=tuple(_TESTS), action="append", help="only this test; may be repeated (default: all)")
    add("--readings", type=int, default=5, metavar="N", help="turns of reading, which are long (default: 5)")


RACE = Race("attention", "Our attention next to ggml's.", add_arguments, _run, _tables, repeat=15)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
