"""llama-bench, the peer: its command line for a configuration, and what it tells."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line

from ..speed.configuration import Configuration
from ..speed.process import last_words

RUN_STARTS = re.compile(rb"(prompt|generation) run \d+/\d+\s*$")  # with --progress, told when the clock runs already


def executable(folder: Path, name: str = "llama-bench") -> Path:
    """A program of llama.cpp in `folder`. Raises YarnEdgeError where it is not, or cannot be run."""
    program = folder / name
    if not program.is_file() or not os.access(program, os.X_OK):
        raise YarnEdgeError(f"{program}: no such program")
    return program


def our_libraries() -> dict[str, str]:
    """The environment in which a program of llama.cpp loads the libraries of llama-cpp-python (Linux)."""
    from llama_cpp import _ggml

    return {**os.environ, "LD_LIBRARY_PATH": str(_ggml.libggml_base_path)}


def command(program: Path, c: Configuration, *more: str, gen: str | None = None) -> list[str]:
    """llama-bench over a configuration, told as JSON. gen: of -n, where it is not c.n_gen once."""
    return [
        str(program),
        "-m",
        c.model,
        "-p",
        str(c.n_prompt),
        "-n",
        gen or str(c.n_gen),
        "-d",
        str(c.depth),
        "-t",
        str(c.threads),
        "-b",
        str(c.n_batch),
        "-ub",
        str(c.n_ubatch),
        "-ctk",
        c.kv_type,
        "-ctv",
        c.kv_type,
        "-fa",
        c.flash_attention,
        "-ngl",
        "0" if c.backend == "cpu" else "99",
        "-r",
        str(c.samples),
        "-o",
        "json",
        *more,
    ]


def samples_in(output: bytes) -> list[tuple[str, list[int]]]:
    """(pp or tg, nanoseconds of its runs) of each test that llama-bench told. Raises YarnEdgeError for what it cannot have told."""
    try:
        rows = json.loads(output)
        found = [("pp" if r["n_prompt"] else "tg", [int(ns) for ns in r["samples_ns"]]) for r in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise YarnEdgeError(f"llama-bench told no rows that we can read: {one_line(str(error), 100)}") from error
    if not all(samples for _test, samples in found):
        raise YarnEdgeError("llama-bench told no rows that we can read: no samples")
    return found


def speeds(program: Path, c: Configuration) -> dict[str, float]:
    """Median tokens per second of each test. Raises YarnEdgeError where it fails."""
    done = subprocess.run(command(program, c), capture_output=True, check=False)
    if done.returncode:
        raise YarnEdgeError(f"{program.name} ended with {done.returncode}: {last_words(done.stderr)}")
    n = dict(c.tests)
    return {test: n[test] * 1e9 / statistics.median(samples) for test, samples in samples_in(done.stdout)}
