"""How long `yarn-edge imatrix` takes, next to llama.cpp's llama-imatrix, and how far their numbers are apart.

`python -m yarn_edge.bench.peers.imatrix MODEL.gguf --peer DIR [--text FILE] [--ctx 512] [--chunks 20] [--repeat 5]`: DIR holds
llama-imatrix. Whole processes in turns, on the same threads; the peer without the perplexity that it can tell besides
(--no-ppl), which we do not compute either. Without --text the text is the one that comes with the package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.convert.imatrix.matrix import ImportanceMatrix, read_imatrix
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import MAX_THREADS, count
from yarn_edge.progress import bar, note
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.sample_text import sample_text

from .llama_bench import executable

LIMIT = 1.1  # ours / llama-imatrix
LIMIT_APART = 1e-3  # relative, of any value


def worst_difference(ours: ImportanceMatrix, theirs: ImportanceMatrix) -> tuple[float, str]:
    """The largest relative difference of two sums of squares, and whose. Raises YarnEdgeError for other names or counts."""
    if set(ours.entries) != set(theirs.entries):
        apart = sorted(set(ours.entries) ^ set(theirs.entries))
        raise YarnEdgeError(f"{len(apart)} matrices are in one file alone, such as {apart[0]}")
    worst = (0.0, "")
    for name, entry in theirs.entries.items():
        own = ours.entries[name]
        if own.sums.shape != entry.sums.shape or (own.counts != entry.counts).any():
            raise YarnEdgeError(f"{name}: other shapes or counts of tokens")
        apart_by = np.abs(own.sums - entry.sums) / np.maximum(entry.sums, np.finfo(np.float32).tiny)
        worst = max(worst, (float(apart_by.max()), name))
    return worst


def _timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise YarnEdgeError(f"{command[0]}: failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    return time.perf_counter() - start


def measure(model: Path, peer: Path, text: Path, ctx: int, chunks: int, threads: int, repeat: int) -> dict[str, Any]:
    """Seconds of each side, one warm-up turn not counted, who goes first in turns; medians, ratio, distance of the values."""
    with tempfile.TemporaryDirectory(prefix="imatrix-speed-") as inside:
        outputs = {side: Path(inside, f"{side}.gguf") for side in ("yarn-edge", "llama-imatrix")}
        shared = ["--chunks", str(chunks), "--threads", str(threads)]
        sides = {
            "yarn-edge": [
                sys.executable,
                "-m",
                "yarn_edge",
                "imatrix",
                str(model),
                "--text",
                str(text),
                "-o",
                str(outputs["yarn-edge"]),
                "--ctx",
                str(ctx),
                "--force",
                "--quiet",
                *shared,
            ],
            "llama-imatrix": [
                str(peer),
                "-m",
                str(model),
                "-f",
                str(text),
                "-o",
                str(outputs["llama-imatrix"]),
                "--ctx-size",
                str(ctx),
                "--no-ppl",
                *shared,
            ],
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        with bar("Collecting", len(sides) * (repeat + 1)) as advance:
            for turn in range(repeat + 1):
                for side in sorted(sides, reverse=bool(turn % 2)):
                    took = _timed(sides[side])
                    advance(1)
                    if turn:
                        times[side].append(took)
                        note(f"{side}: {took:.2f} s")
        ours, theirs = (read_imatrix(path) for path in outputs.values())
    apart, where = worst_difference(ours, theirs)
    medians = {side: statistics.median(values) for side, values in times.items()}
    return {
        "model": str(model),
        "text": str(text),
        "ctx": ctx,
        "chunks": ours.chunk_count,
        "threads": threads,
        "repeat": repeat,
        "entries": len(ours.entries),
        "seconds": times,
        "median_s": medians,
        "ratio": medians["yarn-edge"] / medians["llama-imatrix"],
        "limit": LIMIT,
        "worst_relative_difference": apart,
        "worst_entry": where,
        "limit_difference": LIMIT_APART,
    }


def main() -> int:
    """Print the table, or JSON. Returns 1 if ours takes more than 1.1 times the peer's, or a value is 1e-3 apart."""
    parser = argparse.ArgumentParser(prog="imatrix_speed", description="Time of imatrix, against llama-imatrix.")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--peer", type=Path, required=True, metavar="DIR", help="where llama-imatrix is")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: the text of the package")
    parser.add_argument("--ctx", type=count(16, 2**31 - 1), default=512, metavar="N", help="default: 512")
    parser.add_argument("--chunks", type=count(1, 2**31 - 1), default=20, metavar="N", help="default: 20")
    parser.add_argument("--threads", type=count(1, MAX_THREADS), default=physical_threads(), metavar="N")
    parser.add_argument("--repeat", type=count(1, 1000), default=5, metavar="N", help="pairs that count (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    try:
        peer = executable(args.peer, "llama-imatrix")
        with tempfile.TemporaryDirectory(prefix="imatrix-text-") as folder:
            text = args.text
            if text is None:
                text = Path(folder, "ruth-samuel.txt")
                text.write_text(sample_text(), encoding="utf-8")
            found = measure(args.model, peer, text, args.ctx, args.chunks, args.threads, args.repeat)
    except YarnEdgeError as error:
        sys.stderr.write(f"imatrix_speed: error: {error}\n")
        return 2
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write("| side | median s | least | most | tok/s |\n|---|---|---|---|---|\n")
        for side, values in found["seconds"].items():
            median = found["median_s"][side]
            rate = found["ctx"] * found["chunks"] / median
            sys.stdout.write(f"| {side} | {median:.2f} | {min(values):.2f} | {max(values):.2f} | {rate:.0f} |\n")
        sys.stdout.write(
            f"\nyarn-edge / llama-imatrix: {found['ratio']:.2f} of medians (limit {LIMIT}); {found['chunks']} chunks of "
            f"{found['ctx']} tokens, {found['threads']} threads; the values are at most "
            f"{found['worst_relative_difference']:.1e} apart ({found['worst_entry']}), limit {LIMIT_APART:g}\n"
        )
    return int(found["ratio"] > LIMIT or found["worst_relative_difference"] > LIMIT_APART)


if __name__ == "__main__":
    raise SystemExit(main())
