"""llama-bench, the peer: its command line for a configuration, and how its output is read."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.runtime.kv_cache import kv_types

from ..speed.configuration import Configuration
from .turns import run_process

RUN_STARTS = re.compile(rb"(prompt|generation) run \d+/\d+\s*$")  # with --progress; printed when the clock already runs


def executable(folder: Path, name: str = "llama-bench") -> Path:
    """A program of llama.cpp in `folder`. Raises YarnEdgeError if it is missing or not executable."""
    program = folder / name
    if not program.is_file() or not os.access(program, os.X_OK):
        raise YarnEdgeError(f"{program}: no such program")
    return program


_FA = {"ggml": "auto", "flash": "on", "plain": "off"}  # values of -fa


def our_libraries() -> dict[str, str]:
    """The environment in which a program of llama.cpp loads the libraries of llama-cpp-python (Linux)."""
    from llama_cpp import _ggml

    return {**os.environ, "LD_LIBRARY_PATH": str(_ggml.libggml_base_path)}


def llama_bench_line(program: Path, c: Configuration, *more: str, gen: str | None = None) -> list[str]:
    """llama-bench over a configuration, with JSON as output. gen: value of -n, if it is not c.n_gen once."""
    flags = {"m": c.model, "p": c.n_prompt, "n": gen or c.n_gen, "d": c.depth, "r": c.samples, "o": "json"}
    flags |= {"t": c.threads, "b": c.n_batch, "ub": c.n_ubatch, "ngl": 0 if c.backend == "cpu" else 99}
    k_type, v_type = kv_types(c.kv_type)
    flags |= {"ctk": k_type, "ctv": v_type, "fa": _FA[c.attention]}
    return [str(program), *(word for name, value in flags.items() for word in (f"-{name}", str(value))), *more]


def samples_in(output: str | bytes) -> list[tuple[str, list[int]]]:
    """(pp or tg, nanoseconds of its runs) of each test in llama-bench's JSON. Raises YarnEdgeError for anything else."""
    try:
        rows = json.loads(output)
        tests = [("pp" if r["n_prompt"] else "tg", [int(ns) for ns in r["samples_ns"]]) for r in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise YarnEdgeError(f"llama-bench printed no rows that we can read: {one_line(str(error), 100)}") from error
    if not all(samples for _test, samples in tests):
        raise YarnEdgeError("llama-bench printed no rows that we can read: no samples")
    return tests


def llama_bench_speeds(program: Path, c: Configuration) -> dict[str, float]:
    """Median tokens per second of each test. Raises YarnEdgeError if it fails."""
    done = run_process(program.name, llama_bench_line(program, c))
    n = dict(c.tests)
    return {test: n[test] * 1e9 / statistics.median(samples) for test, samples in samples_in(done.stdout)}
