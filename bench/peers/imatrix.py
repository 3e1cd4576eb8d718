"""How long `yarn-edge imatrix` takes, next to llama.cpp's llama-imatrix, and how far their values are apart.

`python -m yarn_edge.bench.peers.imatrix MODEL.gguf --peer DIR [--text FILE] [--ctx 512] [--chunks 20] [--repeat 5]`: DIR holds
llama-imatrix. Whole processes in turns, with the same threads. The peer runs without the perplexity that it can compute besides
(--no-ppl), because we do not compute it. Without --text both read the bundled text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from yarn_edge.convert.imatrix.matrix import ImportanceMatrix, read_imatrix
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count, length_from
from yarn_edge.sample_text import sample_text

from .llama_bench import executable
from .race import Race, Results
from .turns import YARN_EDGE, Contender, command_line, run_turns, timing_table, timings

OURS, THEIRS = "yarn-edge", "llama-imatrix"
LIMIT = 1.1  # ours / llama-imatrix
LIMIT_APART = 1e-3  # relative, of any value


def worst_difference(ours: ImportanceMatrix, theirs: ImportanceMatrix) -> tuple[float, str]:
    """The largest relative difference of two sums of squares, and its matrix. Raises YarnEdgeError for other names or counts."""
    if set(ours.entries) != set(theirs.entries):
        apart = sorted(set(ours.entries) ^ set(theirs.entries))
        raise YarnEdgeError(f"{len(apart)} matrices are in only one of the files, such as {apart[0]}")
    worst = (0.0, "")
    for name, entry in theirs.entries.items():
        own = ours.entries[name]
        if own.sums.shape != entry.sums.shape or (own.counts != entry.counts).any():
            raise YarnEdgeError(f"{name}: the files differ in its shape or its token counts")
        apart_by = np.abs(own.sums - entry.sums) / np.maximum(entry.sums, np.finfo(np.float32).tiny)
        worst = max(worst, (float(apart_by.max()), name))
    return worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("--peer", type=Path, required=True, metavar="DIR", help="folder with llama-imatrix")
    add("--text", type=Path, metavar="FILE", help="text to read (default: the bundled text)")
    add("--ctx", type=length_from(16), default=512, metavar="N", help="tokens of a chunk (default: 512)")
    add("--chunks", type=count(1, 2**31 - 1), default=20, metavar="N", help="chunks to read (default: 20)")


def run(args: argparse.Namespace, results: Results) -> None:
    """Both sides in turns after a warm-up, and the distance of their values."""
    program = executable(args.peer, THEIRS)
    with tempfile.TemporaryDirectory(prefix="imatrix-race-") as folder:
        text = args.text or Path(folder, "text.txt")
        if args.text is None:
            text.write_text(sample_text(), encoding="utf-8")
        made = {side: Path(folder, f"{side}.gguf") for side in (OURS, THEIRS)}
        shared = {"chunks": args.chunks, "threads": args.threads}
        ours = command_line(
            YARN_EDGE, "imatrix", args.model, text=text, o=made[OURS], ctx=args.ctx, force=True, quiet=True, **shared
        )
        theirs = command_line([program], m=args.model, f=text, o=made[THEIRS], ctx_size=args.ctx, no_ppl=True, **shared)
        sides = {OURS: Contender([ours]), THEIRS: Contender([theirs])}
        turns = run_turns("Collecting", sides, args.repeat, warm_up=True)
        own, other = (read_imatrix(path) for path in made.values())
    apart, where = worst_difference(own, other)
    results |= {"model": str(args.model), "text": str(text), "ctx": args.ctx, "chunks": own.chunk_count}
    results |= {"threads": args.threads, "repeat": args.repeat, "entries": len(own.entries), **timings(turns)}
    results |= {"ratio": results["median_s"][OURS] / results["median_s"][THEIRS], "limit": LIMIT}
    results |= {"worst_relative_difference": apart, "worst_entry": where, "limit_difference": LIMIT_APART}


def _tables(results: Results) -> str:
    tokens = results["ctx"] * results["chunks"]
    rates = {side: f"{tokens / seconds:.0f}" for side, seconds in results["median_s"].items()}
    return timing_table(results, {"tok/s": rates}) + (
        f"\nyarn-edge / llama-imatrix: {results['ratio']:.2f} of medians (limit {LIMIT}); {results['chunks']} chunks of "
        f"{results['ctx']} tokens, {results['threads']} threads; values differ by at most "
        f"{results['worst_relative_difference']:.1e} ({results['worst_entry']}), limit {LIMIT_APART:g}\n"
    )


def _passed(results: Results) -> bool:
    return bool(results["ratio"] <= LIMIT and results["worst_relative_difference"] <= LIMIT_APART)


RACE = Race("imatrix", "Time of imatrix, next to llama-imatrix.", add_arguments, run, _tables, _passed, repeat=5)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
