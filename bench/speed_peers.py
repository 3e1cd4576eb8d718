"""Ours next to llama-bench, in short turns: a machine with neighbours is fast and slow in phases, which both sides then share.

`python -m yarn_edge.bench.speed_peers MODEL.gguf --peer DIR [--depth 0,4096] [--repeat 5]`: DIR holds llama-bench. In each of
--repeat turns ours (the child of `yarn-edge bench`) and theirs measure pp and tg at a depth, who goes first in turns, with the
same threads, batches, cache and flash attention. The ratio is the median over the turns of the ratios within a turn.
--our-libraries: theirs runs with the libllama of our llama-cpp-python, so that two builds of the kernels are not what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yarn_edge.backends import BACKENDS, devices_of, missing
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import MAX_THREADS, count
from yarn_edge.gguf_file import read_gguf
from yarn_edge.llama_api import physical_threads
from yarn_edge.memory import KV_TYPES
from yarn_edge.progress import bar, note

from .environment import environment, machine_state
from .speed import MAX_TOKENS, TIMEOUT_S, depth, listed
from .speed_process import Event, run_child
from .speed_rows import FLASH, Configuration

Speeds = dict[str, float]  # test -> tokens per second


def ours(configuration: Configuration) -> Speeds:
    """One child over one configuration; the median of each test. Raises YarnEdgeError with the reason of a failure."""
    found: Speeds = {}
    tests = dict(configuration.tests)

    def seen(event: Event) -> None:
        if event["event"] == "test":
            found[event["test"]] = tests[event["test"]] * 1e9 / statistics.median(event["samples_ns"])

    reason = run_child(configuration.request(), TIMEOUT_S, seen)
    if reason is not None:
        raise YarnEdgeError(f"ours: {reason}")
    return found


def our_libraries() -> dict[str, str]:
    """The environment in which a program of llama.cpp loads the libraries of llama-cpp-python."""
    from llama_cpp import _ggml

    return {**os.environ, "LD_LIBRARY_PATH": str(_ggml.libggml_base_path)}


def theirs(program: Path, c: Configuration, variables: Mapping[str, str] | None) -> Speeds:
    """llama-bench over the same configuration; the median of each test. Raises YarnEdgeError where it fails."""
    command = [
        str(program), "-m", c.model, "-p", str(c.n_prompt), "-n", str(c.n_gen), "-d", str(c.depth), "-t", str(c.threads),
        "-b", str(c.n_batch), "-ub", str(c.n_ubatch), "-ctk", c.kv_type, "-ctv", c.kv_type, "-fa", c.flash_attention,
        "-ngl", "0" if c.backend == "cpu" else "99", "-r", str(c.samples), "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=False, env=variables)
    told = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise YarnEdgeError(f"{program.name} ended with {done.returncode}: {one_line((told or [''])[-1], 300)}")
    try:
        rows = json.loads(done.stdout)
        return {
            "pp" if row["n_prompt"] else "tg": (row["n_prompt"] + row["n_gen"]) * 1e9 / statistics.median(row["samples_ns"])
            for row in rows
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, statistics.StatisticsError) as error:
        raise YarnEdgeError(f"{program.name} told no rows that we can read: {one_line(str(error), 100)}") from error


def measure(
    configurations: Sequence[Configuration], program: Path, turns: int, variables: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A row for each depth and test: speeds of both sides by turn, medians, and the ratio. Turns go round the depths."""
    seen: dict[int, list[dict[str, Speeds]]] = {c.depth: [] for c in configurations}
    with bar("Measuring", 2.0 * turns * sum(c.cost for c in configurations)) as advance:
        for turn in range(turns):
            for c in configurations:
                speeds: dict[str, Speeds] = {}
                for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
                    advance(0, f"{side}, depth {c.depth}, turn {turn + 1} of {turns}")
                    speeds[side] = ours(c) if side == "ours" else theirs(program, c, variables)
                    advance(c.cost)
                seen[c.depth].append(speeds)
                note(f"depth {c.depth}, turn {turn + 1}: " + ", ".join(_told(speeds)))
    return [
        _row(c, test, n, seen[c.depth]) for c in configurations for test, n in c.tests if test in ("pp", "tg", "tg+s")
    ]


def _told(speeds: Mapping[str, Speeds]) -> list[str]:
    return [f"{test} {speeds['ours'][test] / speed:.3f}" for test, speed in speeds["theirs"].items()]


def _row(c: Configuration, test: str, n: int, turns: Sequence[Mapping[str, Speeds]]) -> dict[str, Any]:
    """tg+s, generation with sampling, is held against their tg, which does not sample."""
    own = [turn["ours"][test] for turn in turns]
    other = [turn["theirs"][test.removesuffix("+s")] for turn in turns]
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return {
        "test": test, "n": n, "depth": c.depth, "ours_tok_per_s": own, "theirs_tok_per_s": other, "ratios": ratios,
        "ours_median": statistics.median(own), "theirs_median": statistics.median(other), "ratio": statistics.median(ratios),
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| test | depth | ours tok/s | llama-bench tok/s | ratio | of turns |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['test'].replace('+s', '')}{r['n']}{'+s' * r['test'].endswith('+s')} | {r['depth']} | {r['ours_median']:.1f} | "
            f"{r['theirs_median']:.1f} | {r['ratio']:.3f} | {min(r['ratios']):.3f} to {max(r['ratios']):.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table, or JSON. Returns 2 for bad input, a side that fails among it."""
    parser = argparse.ArgumentParser(prog="speed_peers", description="Speed next to llama-bench, in turns.")
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("--peer", type=Path, required=True, metavar="DIR", help="where llama-bench is")
    add("--depth", type=listed(depth), default=[0], metavar="LIST", help="default: 0")
    add("-p", "--prompt-tokens", type=count(1, MAX_TOKENS), default=512, metavar="N")
    add("-n", "--gen-tokens", type=count(1, MAX_TOKENS), default=128, metavar="N")
    add("--repeat", type=count(1, 1000), default=5, metavar="N", help="turns (default: 5)")
    add("--samples", type=count(1, 100), default=2, metavar="N", help="timed runs of a test in each turn (default: 2)")
    add("--threads", type=count(1, MAX_THREADS), default=physical_threads(), metavar="N")
    add("--batch", type=count(1, MAX_TOKENS), default=512, metavar="N", help="of both, with --ubatch (default: 512)")
    add("--ubatch", type=count(1, MAX_TOKENS), default=512, metavar="N")
    add("--kv-type", choices=tuple(KV_TYPES), default="f16")
    add("--flash-attention", choices=tuple(FLASH), default="auto")
    add("--backend", choices=tuple(BACKENDS), default="cpu", help="of both (default: cpu)")
    add("--our-libraries", action="store_true", help="theirs with the libraries of our llama-cpp-python (Linux)")
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    program = args.peer / "llama-bench"
    try:
        if not program.is_file() or not os.access(program, os.X_OK):
            raise YarnEdgeError(f"{program}: no such program")
        if not devices_of(args.backend):
            raise YarnEdgeError(missing(args.backend))
        read_gguf(args.model, vocabulary=False)
        first = Configuration(
            str(args.model), args.backend, args.kv_type, args.flash_attention, args.batch, min(args.batch, args.ubatch), args.threads,
            0, args.prompt_tokens, args.gen_tokens, args.samples,
        )  # fmt: skip
        state = machine_state()
        if state["busy"]:
            note(state["busy"])
        variables = our_libraries() if args.our_libraries else None
        rows = measure([replace(first, depth=n) for n in args.depth], program, args.repeat, variables)
    except YarnEdgeError as error:
        sys.stderr.write(f"speed_peers: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("speed_peers: interrupted\n")
        return 130
    env = environment([args.model]) | state
    shared = {
        "backend": args.backend, "threads": args.threads, "n_batch": first.n_batch, "n_ubatch": first.n_ubatch,
        "flash_attention": args.flash_attention,
    }  # fmt: skip
    found = {"env": env, "model": args.model.name, **shared, "type_k": args.kv_type, "rows": rows}
    sys.stdout.write(json.dumps(found) + "\n" if args.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
