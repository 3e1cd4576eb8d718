"""perplexity and compare, next to llama-perplexity: the figures, the time, the memory; and one pass, next to one for each length.

`python -m yarn_edge.bench.peers.perplexity MODEL.gguf --text FILE --peer DIR` runs whole processes in turns, on the same tokens.
Its parts: `same` (chunks of 512 and more: perplexity, and with --other the divergence), `pass` (one chunk of --ctx tokens, of which
ours scores all and theirs the second half), `lengths` (ours alone: a pass for each of --lengths, as the authors' script does it).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count, length_from, lengths
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar, note
from yarn_edge.runtime.kv_cache import kv_bytes

from .llama_bench import executable
from .race import Race, Results
from .turns import (
    YARN_EDGE,
    Contender,
    ProcessRun,
    command_line,
    markdown,
    run_process,
    run_turns,
    timing_table,
    timings,
)

OURS, THEIRS = "yarn-edge", "llama-perplexity"
PARTS = ("same", "pass", "lengths")
# our key -> the line of llama-perplexity, and the factor that its value is multiplied by
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


@dataclass(frozen=True)
class TextRuns:
    """Commands of both sides on one model and text."""

    model: Path
    text: Path
    program: Path
    threads: int

    def our_line(self, command: str, *words: object, **flags: object) -> list[str]:
        """`yarn-edge COMMAND MODEL …`, which prints JSON."""
        shared = {"text": self.text, "threads": self.threads, "json": True, "quiet": True}
        return command_line(YARN_EDGE, command, self.model, *words, **flags, **shared)

    def their_line(self, model: Path | None = None, **flags: object) -> list[str]:
        """`llama-perplexity -m MODEL -f TEXT …`."""
        return command_line([self.program], m=model or self.model, f=self.text, t=self.threads, **flags)

    def ours(self, command: str, *words: object, **flags: object) -> dict[str, Any]:
        """The JSON that our command prints."""
        return json_of(run_process(OURS, self.our_line(command, *words, **flags)))

    def theirs(self, model: Path | None = None, **flags: object) -> str:
        """What llama-perplexity prints."""
        process = run_process(THEIRS, self.their_line(model, **flags))
        return process.stdout + process.stderr


def json_of(process: ProcessRun) -> dict[str, Any]:
    """The object that a command of ours printed."""
    return dict(json.loads(process.stdout))


def printed_number(output: str, pattern: str) -> float:
    """A number that llama-perplexity printed. Raises YarnEdgeError if it did not."""
    match = re.search(pattern, output)
    if match is None:
        raise YarnEdgeError(f"llama-perplexity printed no {pattern}: {output.strip().splitlines()[-1:]}")
    return float(match[1])


def same_figures(runs: TextRuns, ctx: int, chunks: int, others: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Perplexity by the protocol llama.cpp, and divergences, of both; ours by default and with flash attention as theirs."""
    cut: dict[str, object] = {"ctx": ctx, "chunks": chunks, "protocol": "llama.cpp"}
    ppl = {kind: runs.ours("perplexity", attention=kind, **cut)["ppl"] for kind in ("auto", "flash")}
    base = folder / "base.kld"
    output = runs.theirs(c=ctx, chunks=chunks, kl_divergence_base=base if others else None)
    ppl[THEIRS] = printed_number(output, r"Final estimate: PPL = ([\d.]+)")
    results: dict[str, Any] = {"ctx": ctx, "chunks": chunks, "ppl": ppl}
    if others:
        compared = runs.ours("compare", *others, attention="flash", **cut)["models"]
        results |= {"base_bytes": base.stat().st_size, "kl": {}}
        for path, mine in zip(others, compared, strict=True):
            output = runs.theirs(path, c=ctx, kl_divergence=True, kl_divergence_base=base)
            results["kl"][path.name] = {
                key: {OURS: mine[key], THEIRS: printed_number(output, line) * unit}
                for key, (line, unit) in KL_LINES.items()
            }
    return results


def one_pass(runs: TextRuns, ctx: int, repeat: int) -> dict[str, Any]:
    """Time and peak memory of both on one chunk, in turns; ours also without what the model and the cache take."""
    lines = {OURS: runs.our_line("perplexity", ctx=ctx, chunks=1), THEIRS: runs.their_line(c=ctx, chunks=1)}
    turns = run_turns("One pass", {name: Contender([line]) for name, line in lines.items()}, repeat)
    results: dict[str, Any] = {"ctx": ctx, **timings(turns)}
    results["ratio"] = results["median_s"][OURS] / results["median_s"][THEIRS]
    results["tokens_scored"] = {OURS: json_of(turns[OURS][0][0])["n_tokens"], THEIRS: ctx - 1 - ctx // 2}
    file = read_gguf(runs.model)
    held = sum(t.n_bytes for t in file.tensors.values()) + (kv_bytes(file, ctx, "f16") or 0)
    besides = results["peak_rss_bytes"][OURS] - held
    return results | {"model_and_cache_bytes": held, "yarn_edge_besides_bytes": besides}


def by_length(runs: TextRuns, points: Sequence[int]) -> dict[str, Any]:
    """The curve from one pass, and from a pass for each length."""
    whole = runs.ours("perplexity", ctx=points[-1], lengths=",".join(map(str, points)))
    curve = {p["ctx"]: p["ppl"] for p in whole["curve"]}
    alone: dict[int, float] = {}
    seconds = 0.0
    with bar("A pass for each length", sum(points), "tokens") as advance:
        for n in points:
            one = runs.ours("perplexity", ctx=n, lengths=n)
            alone[n], seconds = one["ppl"], seconds + one["seconds"]
            advance(n)
            note(f"{n} tokens: {one['ppl']:.5f}, in one pass {curve[n]:.5f}; {one['seconds']:.1f} s")
    apart = max(abs(curve[n] / alone[n] - 1) for n in points)
    results = {"lengths": list(points), "one_pass_s": whole["seconds"], "each_length_s": seconds}
    results |= {"ratio": whole["seconds"] / seconds, "largest_relative_difference": apart}
    return results | {"one_pass": curve, "each_length": alone}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add, tokens = parser.add_argument, length_from(8)
    add("model", type=Path, metavar="MODEL.gguf")
    add("--text", type=Path, required=True, metavar="FILE", help="text of at least twice --ctx tokens")
    add("--peer", type=Path, required=True, metavar="DIR", help="folder with llama-perplexity")
    add("--parts", default="same,pass", metavar="LIST", help=f"any of {','.join(PARTS)} (default: same,pass)")
    add("--other", type=Path, action="append", default=[], metavar="GGUF", help="same: a file to compare with MODEL")
    add("--same-ctx", type=tokens, default=512, metavar="N", help="same: tokens of a chunk (default: 512)")
    add("--chunks", type=count(1, 10**6), default=16, metavar="N", help="same: chunks (default: 16)")
    add("--ctx", type=tokens, default=16384, metavar="N", help="pass: tokens (default: 16384)")
    points = lengths("2k:16k:1k")
    add("--lengths", type=lengths, default=points, metavar="LIST", help="lengths: their list (default: 2k:16k:1k)")


def run(args: argparse.Namespace, results: Results) -> None:
    """The parts, in their order."""
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise YarnEdgeError(f"--parts: known are {', '.join(PARTS)}")
    for path in (args.model, args.text, *args.other):
        if not path.is_file():
            raise YarnEdgeError(f"{path}: no such file")
    runs = TextRuns(args.model, args.text, executable(args.peer, THEIRS), args.threads)
    with tempfile.TemporaryDirectory(prefix="perplexity-race-") as folder:
        if "same" in parts:
            results["same"] = same_figures(runs, args.same_ctx, args.chunks, args.other, Path(folder))
        if "pass" in parts:
            results["pass"] = one_pass(runs, args.ctx, args.repeat)
        if "lengths" in parts:
            results["lengths"] = by_length(runs, args.lengths)


def _tables(results: Results) -> str:
    made = {"same": _same_table, "pass": _pass_table, "lengths": _lengths_line}
    return "\n".join(table(results[part]) for part, table in made.items() if part in results)


def _same_table(same: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.5f}" for name, value in same["ppl"].items())
    text = f"perplexity, {same['chunks']} chunks of {same['ctx']}: {values}\n"
    for model, pairs in same.get("kl", {}).items():
        rows = []
        for key, pair in pairs.items():
            mine, theirs = pair[OURS], pair[THEIRS]
            ratio = f"{mine / theirs:.4f}" if theirs else "-"
            rows.append([key, f"{mine:.6g}", f"{theirs:.6g}", ratio])
        text += "\n" + markdown([model, OURS, THEIRS, "ratio"], rows)
    return text


def _pass_table(one: dict[str, Any]) -> str:
    besides, held = one["yarn_edge_besides_bytes"] / 1e6, one["model_and_cache_bytes"] / 1e6
    return (
        f"one chunk of {one['ctx']} tokens\n\n"
        + timing_table(one, {"tokens scored": one["tokens_scored"]})
        + (f"\nratio {one['ratio']:.2f}; weights and cache are {held:.0f} MB, ours takes {besides:.0f} MB besides\n")
    )


def _lengths_line(each: dict[str, Any]) -> str:
    return (
        f"{len(each['lengths'])} lengths to {each['lengths'][-1]}: one pass {each['one_pass_s']:.0f} s, a pass for each "
        f"{each['each_length_s']:.0f} s: {each['ratio']:.3f}; at most {each['largest_relative_difference']:.1e} apart\n"
    )


WHAT = "Figures, time and memory of perplexity and compare, next to llama-perplexity."
RACE = Race("perplexity", WHAT, add_arguments, run, _tables, repeat=1)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
