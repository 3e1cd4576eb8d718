"""Ours next to llama-bench, in lockstep: a machine with neighbors is fast and slow in phases, which both sides then share.

`python -m yarn_edge.bench.peers.bench MODEL.gguf --peer DIR [--depth 0,4096] [--repeat 60]`: DIR holds llama-bench. Ours (the child
of `yarn-edge bench`) and theirs are loaded side by side, with the same threads, batches, cache and flash attention. Each fills its
cache to the depth, and then a timed run of one follows a timed run of the other (`lockstep`). Runs of 0.1 to 1 s (-p, -n) are short
enough for both to meet the same conditions, and long enough for the stopping not to count. The ratio is the median of the ratios of
such pairs, with its exact 95 % interval (the sign test's).
--our-libraries: theirs runs with the libllama of our llama-cpp-python, so that the difference is not that of two builds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import BACKENDS, add_kv_flags, count, length_from
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar, note
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.kv_cache import kv_types, with_kv_parts

from ..speed.command import MAX_TOKENS, TIMEOUT_S, add_size_flags, depth, listed
from ..speed.configuration import FLASH, Configuration, name_of_test
from ..speed.process import CHILD
from ..speed.rank_test import not_rejected
from .llama_bench import RUN_STARTS, executable, llama_bench_line, our_libraries, samples_in
from .lockstep import Paced, lockstep
from .race import Race, Results
from .turns import markdown


def paired_rows(
    c: Configuration, program: Path, variables: Mapping[str, str] | None, timeout_s: float
) -> list[dict[str, Any]]:
    """A row for each test. Their tg is run twice, because ours is: with sampling (tg+s) and without."""
    peer = llama_bench_line(program, c, "--progress", gen=f"{c.n_gen},{c.n_gen}")
    request = json.dumps(c.request()).encode("ascii") + b"\n"
    our_runs = [n for test, n in c.tests if test != "ttft" for _ in range(c.samples)]
    with (
        closing(Paced("ours", CHILD, _our_run_starts, "stdout", request)) as ours,
        closing(Paced(program.name, peer, _their_run_starts, "stderr", variables=variables)) as theirs,
        bar("Measuring", 2.0 * (c.depth + sum(our_runs)), "tokens") as advance,
    ):
        advance(0, f"depth {c.depth}, warming up and filling the caches")

        def after(side: Paced) -> None:
            if side is ours:
                _check(ours)
            done = len(side.stood_ns)
            what = f"depth {c.depth}, run {min(done + 1, len(our_runs))} of {len(our_runs)}"
            advance(c.depth if done == 0 else our_runs[done - 1], what)

        lockstep(ours, theirs, timeout_s, after)
        own, other = _our_samples(ours), samples_in(theirs.other())
    if [test.removesuffix("+s") for test, _ in own] != [test for test, _ in other]:
        raise YarnEdgeError(f"{program.name} ran other tests: {', '.join(test for test, _ in other) or 'none'}")
    rows: list[dict[str, Any]] = []
    for (test, own_ns), (_test, other_ns) in zip(own, other, strict=True):
        first = len(rows) * c.samples
        rows.append(_row(c, test, ours.ran(own_ns, first), theirs.ran(other_ns, first)))
    return rows


def _our_run_starts(line: bytes) -> bool:
    event = json.loads(line)
    return event["event"] == "step" and "number" in event


def _their_run_starts(line: bytes) -> bool:
    return RUN_STARTS.search(line) is not None


def _check(ours: Paced) -> None:
    for line in ours.lines[-1:]:
        event = json.loads(line)
        if event["event"] == "failed":
            raise YarnEdgeError(f"ours: {event['reason']}")


def _our_samples(ours: Paced) -> list[tuple[str, list[int]]]:
    events = [json.loads(line) for line in ours.lines]
    return [(e["test"], e["samples_ns"]) for e in events if e["event"] == "test" and e["test"] != "ttft"]


def _row(c: Configuration, test: str, own_ns: Sequence[int], other_ns: Sequence[int]) -> dict[str, Any]:
    """tg+s, generation with sampling, is compared with their tg, which does not sample."""
    n = dict(c.tests)[test]
    own, other = ([n * 1e9 / ns for ns in side] for side in (own_ns, other_ns))
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    low, high = median_interval(ratios) or (None, None)
    row = {"test": test, "n": n, "depth": c.depth, "ours_tok_per_s": own, "theirs_tok_per_s": other, "ratios": ratios}
    row |= {"ours_median": statistics.median(own), "theirs_median": statistics.median(other)}
    return row | {"ratio": statistics.median(ratios), "low": low, "high": high}


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median, whatever the distribution: the medians that the sign test does not reject.

    None for fewer than 6 values, with which it rejects none.
    """
    n = len(values)
    return not_rejected(sorted(values), (math.comb(n, k) / 2**n for k in range(n)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add, tokens = parser.add_argument, length_from(1, MAX_TOKENS)
    add("model", type=Path, metavar="MODEL.gguf")
    add("--peer", type=Path, required=True, metavar="DIR", help="folder with llama-bench")
    add(
        "--depth", type=listed(depth), default=[0], metavar="LIST", help="tokens in the cache before a run (default: 0)"
    )
    add_size_flags(parser, 64, 8)
    add(
        "--timeout",
        type=count(1, 10**7),
        default=TIMEOUT_S,
        metavar="S",
        help="seconds for a step (default: %(default)s)",
    )
    add("--batch", type=tokens, default=512, metavar="N", help="batch size of both sides (default: 512)")
    add("--ubatch", type=tokens, default=512, metavar="N", help="micro-batch size of both sides (default: 512)")
    add_kv_flags(parser, "the cache on both sides", "f16")
    add("--attention", choices=tuple(FLASH), default="ggml", help="of both sides (default: ggml)")
    add("--backend", choices=tuple(BACKENDS), default="cpu", help="of both sides (default: cpu)")
    add(
        "--our-libraries",
        action="store_true",
        help="run llama-bench with the libraries of our llama-cpp-python (Linux)",
    )


def run(args: argparse.Namespace, results: Results) -> None:
    """Every depth; rows of a finished depth are results."""
    program = executable(args.peer)
    if args.backend != "cpu" and args.prompt_tokens:
        raise YarnEdgeError("a GPU goes on reading while its program is stopped: -p 0 with --backend")
    if not args.prompt_tokens and not args.gen_tokens:
        raise YarnEdgeError("-p 0 -n 0: nothing to measure")
    if not devices_of(args.backend):
        raise YarnEdgeError(missing(args.backend))
    read_gguf(args.model, vocabulary=False)
    ubatch = min(args.batch, args.ubatch)
    sizes = (args.batch, ubatch, args.threads, 0, args.prompt_tokens, args.gen_tokens, args.repeat)
    kv_type = with_kv_parts(args.kv_type, args.kv_k, args.kv_v)
    first = Configuration(str(args.model), args.backend, kv_type, args.attention, *sizes)
    k_type, v_type = kv_types(kv_type)
    variables = our_libraries() if args.our_libraries else None
    rows: list[dict[str, Any]] = []
    for n in args.depth:
        rows += paired_rows(replace(first, depth=n), program, variables, args.timeout)
        note(f"depth {n}: " + ", ".join(f"{row['test']} {row['ratio']:.3f}" for row in rows if row["depth"] == n))
        results |= {"model": args.model.name, "backend": args.backend, "threads": args.threads, "n_batch": args.batch}
        results |= {"n_ubatch": ubatch, "attention": args.attention, "our_libraries": args.our_libraries}
        results |= {"type_k": k_type, "type_v": v_type, "rows": rows}


def _tables(results: Results) -> str:
    rows = []
    for r in results["rows"]:
        interval = "too few runs" if r["low"] is None else f"{r['low']:.3f} to {r['high']:.3f}"
        speeds = (f"{r['ours_median']:.1f}", f"{r['theirs_median']:.1f}", f"{r['ratio']:.3f}")
        rows.append([name_of_test(r["test"], r["n"], 0), r["depth"], *speeds, interval, len(r["ratios"])])
    head = ["test", "depth", "ours tok/s", "llama-bench tok/s", "ratio", "95 % interval", "runs"]
    return markdown(head, rows)


RACE = Race("bench", "Speed next to llama-bench, in lockstep.", add_arguments, run, _tables, repeat=60)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
