"""perplexity and compare next to llama-perplexity: the same figures, the time, the memory; and one pass next to one for each length.

`python -m yarn_edge.bench.peers.perplexity MODEL.gguf --text FILE --peer DIR` in turns, whole processes, on the same tokens:
`same` (chunks of 512 and more: perplexity, and with --other the divergence), `pass` (one chunk of --ctx tokens, where ours scores
all of it and theirs the second half), `lengths` (ours alone: a pass for each of --lengths, as the authors' script does it).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import MAX_THREADS, count, lengths
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar, note
from yarn_edge.runtime.kv_cache import kv_bytes
from yarn_edge.runtime.llama_api import physical_threads

from .convert import ConvertRun, run_process

PARTS = ("same", "pass", "lengths")
# our key -> llama-perplexity's line, and what its value is multiplied with
KL_LINES = {
    "kld_mean": (r"Mean +KLD: +([-\d.]+)", 1.0),
    "kld_median": (r"Median +KLD: +([-\d.]+)", 1.0),
    "kld_p99": (r"99\.0% +KLD: +([-\d.]+)", 1.0),
    "kld_max": (r"Maximum KLD: +([-\d.]+)", 1.0),
    "delta_p_rms": (r"RMS Δp +: +([-\d.]+)", 0.01),
    "top1": (r"Same top p: +([-\d.]+)", 0.01),
    "ppl": (r"Mean PPL\(Q\) +: +([-\d.]+)", 1.0),
    "ppl_ratio": (r"Mean PPL\(Q\)/PPL\(base\) +: +([-\d.]+)", 1.0),
}


class Sides:
    """Commands of both sides on one model and text."""

    def __init__(self, model: Path, text: Path, peer: Path, threads: int) -> None:
        self.model, self.text, self.peer, self.threads = model, text, peer, threads

    def ours(self, command: str, *words: str) -> ConvertRun:
        """`yarn-edge COMMAND MODEL …`, its JSON as output."""
        shared = ["--text", str(self.text), "--threads", str(self.threads), "--json", "--quiet"]
        return run_process([sys.executable, "-m", "yarn_edge", command, str(self.model), *words, *shared])

    def theirs(self, *words: str, model: Path | None = None) -> ConvertRun:
        """`llama-perplexity -m MODEL -f TEXT …`."""
        program = str(self.peer / "llama-perplexity")
        return run_process(
            [program, "-m", str(model or self.model), "-f", str(self.text), "-t", str(self.threads), *words]
        )


def found_in(output: str, pattern: str) -> float:
    """A number that llama-perplexity printed. Raises YarnEdgeError where it did not."""
    match = re.search(pattern, output)
    if match is None:
        raise YarnEdgeError(f"llama-perplexity printed no {pattern}: {output.strip().splitlines()[-1:]}")
    return float(match[1])


def same_figures(sides: Sides, ctx: int, chunks: int, others: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Perplexity by the protocol llama.cpp, and divergences, of both; ours by default and with flash attention as theirs."""
    cut = ["--ctx", str(ctx), "--chunks", str(chunks), "--protocol", "llama.cpp"]
    ours = {
        kind: json.loads(sides.ours("perplexity", *cut, "--flash-attention", kind).output)["ppl"]
        for kind in ("auto", "on")
    }
    base = folder / "base.kld"
    run = sides.theirs(
        "-c", str(ctx), "--chunks", str(chunks), *(["--kl-divergence-base", str(base)] if others else [])
    )
    theirs = found_in(run.output, r"Final estimate: PPL = ([\d.]+)")
    found: dict[str, Any] = {"ctx": ctx, "chunks": chunks, "ppl": {**ours, "llama-perplexity": theirs}}
    if others:
        compared = json.loads(sides.ours("compare", *map(str, others), *cut, "--flash-attention", "on").output)
        found["base_bytes"] = base.stat().st_size
        found["kl"] = {}
        for path, mine in zip(others, compared["models"], strict=True):
            told = sides.theirs("-c", str(ctx), "--kl-divergence", "--kl-divergence-base", str(base), model=path).output
            found["kl"][path.name] = {
                key: {"yarn-edge": mine[key], "llama-perplexity": found_in(told, line) * unit}
                for key, (line, unit) in KL_LINES.items()
            }
        base.unlink()
    return found


def one_pass(sides: Sides, ctx: int, repeat: int) -> dict[str, Any]:
    """Seconds and peak memory of a whole process of each side, in turns; ours also without what the model and cache take."""
    seconds: dict[str, list[float]] = {"yarn-edge": [], "llama-perplexity": []}
    rss: dict[str, int] = {}
    scored: dict[str, int] = {"llama-perplexity": ctx - 1 - ctx // 2}
    for turn in range(repeat):
        for side in sorted(seconds, reverse=bool(turn % 2)):
            cut = ["--ctx", str(ctx), "--chunks", "1"]
            run = (
                sides.ours("perplexity", *cut) if side == "yarn-edge" else sides.theirs("-c", str(ctx), "--chunks", "1")
            )
            if side == "yarn-edge":
                scored[side] = json.loads(run.output)["n_tokens"]
            seconds[side].append(run.seconds)
            rss[side] = max(rss.get(side, 0), run.rss_bytes)
            note(f"{side}: {run.seconds:.1f} s, {run.rss_bytes / 1e6:.0f} MB")
    file = read_gguf(sides.model)
    held = sum(t.n_bytes for t in file.tensors.values()) + (kv_bytes(file, ctx, "f16") or 0)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "ctx": ctx,
        "seconds": seconds,
        "median_s": medians,
        "ratio": medians["yarn-edge"] / medians["llama-perplexity"],
        "tokens_scored": scored,
        "peak_rss_bytes": rss,
        "model_and_cache_bytes": held,
        "yarn_edge_besides_bytes": rss["yarn-edge"] - held,
    }


def by_length(sides: Sides, points: Sequence[int]) -> dict[str, Any]:
    """The curve from one pass, and from a pass for each length."""
    whole = json.loads(
        sides.ours("perplexity", "--ctx", str(points[-1]), "--lengths", ",".join(map(str, points))).output
    )
    curve = {p["ctx"]: p["ppl"] for p in whole["curve"]}
    alone: dict[int, float] = {}
    seconds = 0.0
    with bar("A pass for each length", sum(points), "tokens") as advance:
        for n in points:
            one = json.loads(sides.ours("perplexity", "--ctx", str(n), "--lengths", str(n)).output)
            alone[n], seconds = one["ppl"], seconds + one["seconds"]
            advance(n)
            note(f"{n} tokens: {one['ppl']:.5f}, in one pass {curve[n]:.5f}; {one['seconds']:.1f} s")
    apart = max(abs(curve[n] / alone[n] - 1) for n in points)
    return {
        "lengths": list(points),
        "one_pass_s": whole["seconds"],
        "each_length_s": seconds,
        "ratio": whole["seconds"] / seconds,
        "largest_relative_difference": apart,
        "one_pass": curve,
        "each_length": alone,
    }


def table_of(found: dict[str, Any]) -> str:
    """All of it, for a README."""
    lines: list[str] = []
    if "same" in found:
        same = found["same"]
        told = ", ".join(f"{name} {value:.5f}" for name, value in same["ppl"].items())
        lines.append(f"perplexity, {same['chunks']} chunks of {same['ctx']}: {told}")
        for model, values in same.get("kl", {}).items():
            lines += ["", f"| {model} | yarn-edge | llama-perplexity | ratio |", "|---|---|---|---|"]
            for key, pair in values.items():
                mine, theirs = pair["yarn-edge"], pair["llama-perplexity"]
                lines.append(f"| {key} | {mine:.6g} | {theirs:.6g} | {mine / theirs if theirs else float('nan'):.4f} |")
    if "pass" in found:
        one = found["pass"]
        lines += ["", f"| one chunk of {one['ctx']} | median s | tokens scored | peak memory MB |", "|---|---|---|---|"]
        for side, seconds in one["median_s"].items():
            lines.append(
                f"| {side} | {seconds:.1f} | {one['tokens_scored'][side]} | {one['peak_rss_bytes'][side] / 1e6:.0f} |"
            )
        besides, held = one["yarn_edge_besides_bytes"] / 1e6, one["model_and_cache_bytes"] / 1e6
        lines.append(
            f"\nratio {one['ratio']:.2f}; weights and cache are {held:.0f} MB, ours takes {besides:.0f} MB besides"
        )
    if "lengths" in found:
        each = found["lengths"]
        lines.append(
            f"\n{len(each['lengths'])} lengths to {each['lengths'][-1]}: one pass {each['one_pass_s']:.0f} s, a pass for each "
            f"{each['each_length_s']:.0f} s: {each['ratio']:.3f}; at most {each['largest_relative_difference']:.1e} apart"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(
        prog="perplexity_speed", description="perplexity and compare, next to llama-perplexity."
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="of at least twice --ctx tokens")
    parser.add_argument("--peer", type=Path, required=True, metavar="DIR", help="where llama-perplexity is")
    parser.add_argument("--parts", default="same,pass", metavar="LIST", help=f"of {','.join(PARTS)} (%(default)s)")
    parser.add_argument(
        "--other", type=Path, action="append", default=[], metavar="GGUF", help="same: compared with the model"
    )
    parser.add_argument("--same-ctx", type=count(8, 2**31 - 1), default=512, metavar="N", help="same: (%(default)s)")
    parser.add_argument("--chunks", type=count(1, 10**6), default=16, metavar="N", help="same: (%(default)s)")
    parser.add_argument("--ctx", type=count(8, 2**31 - 1), default=16384, metavar="N", help="pass: (%(default)s)")
    parser.add_argument("--lengths", type=lengths, default=lengths("2k:16k:1k"), metavar="LIST", help="(2k:16k:1k)")
    parser.add_argument("--repeat", type=count(1, 1000), default=1, metavar="N", help="pass: turns (%(default)s)")
    parser.add_argument("--threads", type=count(1, MAX_THREADS), default=physical_threads(), metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    parts = args.parts.split(",")
    sides = Sides(args.model, args.text, args.peer, args.threads)
    found: dict[str, Any] = {}
    try:
        if not set(parts) <= set(PARTS):
            raise YarnEdgeError(f"--parts: known are {', '.join(PARTS)}")
        for path in (args.model, args.text, args.peer / "llama-perplexity", *args.other):
            if not path.is_file():
                raise YarnEdgeError(f"{path}: no such file")
        with tempfile.TemporaryDirectory(prefix="perplexity-speed-") as folder:
            if "same" in parts:
                found["same"] = same_figures(sides, args.same_ctx, args.chunks, args.other, Path(folder))
            if "pass" in parts:
                found["pass"] = one_pass(sides, args.ctx, args.repeat)
            if "lengths" in parts:
                found["lengths"] = by_length(sides, args.lengths)
    except YarnEdgeError as error:
        sys.stderr.write(f"perplexity_speed: error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(found) + "\n" if args.json else table_of(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
