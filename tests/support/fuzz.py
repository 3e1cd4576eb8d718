"""The fuzz target: mutated GGUFs and configs go through everything that reads them; only a YarnEdgeError may come out.

`make fuzz` (`cd tests && python -m support.fuzz --inputs 120000 --deep 1000`) prints a record (docs/fuzzing.md). Each input is
reproducible from its number. An input fails if it raises another exception, takes over 2 s, allocates more than its size justifies, or
ends the process. With `--deep N`, `verify` also loads N mutated files into llama.cpp, each in its own child process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import TRUST, PlannerOptions, ScalingOverrides
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.command import inspect_checkpoint, inspect_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.llama_rules.rescale import from_file
from yarn_edge.progress import bar
from yarn_edge.verify.command import verify

from support.fuzz_inputs import CONFIGS, gguf_seeds, mutate_bytes, mutate_json, mutate_value

APPROXIMATE = PlannerOptions(allow_approximate=True)

HANG_S = 2.0
# Python's objects for a string or a number of the file take some dozen times its bytes; gguf's tables are the rest.
ALLOWED_BYTES, ALLOWED_TIMES = 16 << 20, 64


@dataclass(frozen=True)
class Failure:
    """An input that did what no input may."""

    number: int
    what: str


class _Hang(BaseException):
    pass


def _each(steps: Sequence[Callable[[], object]]) -> None:
    """Every step; the last refusal is raised when none got through."""
    refusal: YarnEdgeError | None = None
    through = 0
    for step in steps:
        try:
            step()
            through += 1
        except YarnEdgeError as error:
            refusal = error
    if refusal is not None and not through:
        raise refusal


def read_gguf_everywhere(path: Path) -> None:
    """What `inspect`, `patch` and the loader do with a header."""
    file = read_gguf(path)
    positions = FilePositions(file)
    _each(
        [
            lambda: json.dumps(inspect_gguf(positions).as_json()["findings"]),
            lambda: plan_rope(from_file(positions), file.architecture, APPROXIMATE),
            lambda: plan_rope(
                from_file(positions, ScalingOverrides(4.0, 256)), file.architecture, PlannerOptions("always")
            ),
            lambda: positions.explicit_arguments,
        ]
    )


def read_config_everywhere(folder: Path) -> None:
    """What `inspect`, `convert` and `verify` do with a config."""
    config = read_config(folder)
    _each(
        [
            lambda: json.dumps(inspect_checkpoint(folder).as_json()["findings"]),
            lambda: read_positions(config, ScalingOverrides(freeze_at=65536)),
            lambda: read_positions(config, ScalingOverrides(4.0, 4096)),
            lambda: plan_rope(read_scaling(config), "llama", APPROXIMATE),
            lambda: plan_rope(read_scaling(config), "qwen2", APPROXIMATE),
        ]
    )


def _timed(number: int, size: int, action: Callable[[], None]) -> tuple[str, Failure | None]:
    """(outcome, failure) of one input under the limits."""

    def ring(_signal: int, _frame: object) -> None:
        raise _Hang

    signal.signal(signal.SIGALRM, ring)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        action()
        outcome = "read"
    except YarnEdgeError as error:
        outcome = "refused"
        if not str(error).isprintable():
            return outcome, Failure(number, f"a message of several lines: {str(error)[:100]!r}")
    except _Hang:
        return "hang", Failure(number, f"took over {HANG_S} s")
    except BaseException as error:
        return "exception", Failure(number, f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    used = tracemalloc.get_traced_memory()[1] - before
    if used > ALLOWED_BYTES + ALLOWED_TIMES * size:
        return outcome, Failure(number, f"allocated {used} bytes for an input of {size}")
    return outcome, None


def _header(scratch: Path, data: bytes) -> GGUFFile:
    path = scratch / "seed.gguf"
    path.write_bytes(data)
    return read_gguf(path)


class Target:
    """Seeds and a scratch folder."""

    def __init__(self, scratch: Path, ggufs: Sequence[bytes], configs: Sequence[dict[str, Any]], seed: int) -> None:
        self.scratch, self.ggufs, self.configs, self.seed = scratch, ggufs, configs, seed
        self.headers = [_header(scratch, data) for data in ggufs]

    def gguf(self, number: int) -> Path:
        """Input `number` as a GGUF."""
        rng = random.Random(f"{self.seed}-gguf-{number}")
        which = rng.randrange(len(self.ggufs))
        path = self.scratch / f"{os.getpid()}.gguf"
        header = self.headers[which]
        if rng.random() < 0.6:
            path.write_bytes(mutate_value(rng, self.ggufs[which], header))
        else:
            path.write_bytes(mutate_bytes(rng, self.ggufs[which], header.data_offset))
        return path

    def config(self, number: int) -> Path:
        """Input `number` as a checkpoint folder that has only a config."""
        rng = random.Random(f"{self.seed}-config-{number}")
        folder = self.scratch / f"{os.getpid()}"
        folder.mkdir(exist_ok=True)
        values = mutate_json(rng, rng.choice(self.configs))
        data = json.dumps(values).encode()
        if rng.random() < 0.1:
            data = mutate_bytes(rng, data, len(data))
        name, other = ("config.json", "params.json") if "yarn" not in values else ("params.json", "config.json")
        (folder / other).unlink(missing_ok=True)
        (folder / name).write_bytes(data)
        return folder

    def run(self, number: int) -> tuple[str, Failure | None]:
        """Input `number`: even ones are GGUFs, odd ones configs."""
        if number % 2:
            folder = self.config(number)
            size = sum(p.stat().st_size for p in folder.iterdir())
            return _timed(number, size, lambda: read_config_everywhere(folder))
        path = self.gguf(number)
        return _timed(number, path.stat().st_size, lambda: read_gguf_everywhere(path))


def _worker(target: Target, numbers: range, results: Any, at: Any) -> None:
    tracemalloc.start()
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    for number in numbers:
        at.value = number
        outcome, failure = target.run(number)
        counts["config " * (number % 2) + "gguf " * (1 - number % 2) + outcome] += 1
        if failure is not None:
            failures.append(failure)
    results.put((counts, failures))


def fuzz(target: Target, n_inputs: int, n_workers: int) -> tuple[Counter[str], list[Failure]]:
    """Run inputs 0 … n_inputs - 1. Returns (outcomes, failures)."""
    context = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    chunk = 1000
    with bar("Fuzzing", n_inputs) as advance:
        for start in range(0, n_inputs, chunk * n_workers):
            jobs = []
            for worker in range(n_workers):
                numbers = range(start + worker * chunk, min(start + (worker + 1) * chunk, n_inputs))
                results, at = context.SimpleQueue(), context.Value("q", -1)
                process = context.Process(target=_worker, args=(target, numbers, results, at))
                process.start()
                jobs.append((process, results, at, numbers))
            for process, results, at, numbers in jobs:
                while process.is_alive() and results.empty():
                    process.join(0.05)
                if results.empty():
                    failures.append(Failure(at.value, f"ended the process (exit code {process.exitcode})"))
                else:
                    found, failed = results.get()
                    counts += found
                    failures += failed
                process.join()
                advance(len(numbers))
    return counts, failures


def _verify_child(path: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ[TRUST] = "1"  # this process is there to be ended
    code = 70
    try:
        code = 1 if any(c.status == "fail" for c in verify(path, threads=1)) else 0
    except YarnEdgeError:
        code = 2
    finally:
        os._exit(code)


def deep(target: Target, n_inputs: int) -> Counter[str]:
    """`verify` of mutated files, each in a child: llama.cpp loads them. Counts by outcome; a signal is llama.cpp's abort."""
    names = {0: "passed", 1: "failed a check", 2: "refused", 70: "exception", None: "took over 30 s"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["yarn_edge.verify.command", "llama_cpp"])
    counts: Counter[str] = Counter()
    with bar("Loading into llama.cpp", n_inputs) as advance:
        for number in range(0, 2 * n_inputs, 2):
            child = context.Process(target=_verify_child, args=(target.gguf(number),))
            child.start()
            child.join(30)
            code = child.exitcode
            child.kill()
            counts[names.get(code, f"ended by signal {-(code or 0)}")] += 1
            advance(1)
    return counts


def main() -> int:
    """Fuzz, print the record, 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Mutated GGUFs and configs through everything that reads them.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--deep", type=int, default=0, help="files to load into llama.cpp besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="yarn-edge-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        target = Target(scratch, gguf_seeds(scratch), CONFIGS, args.seed)
        start = time.monotonic()
        counts, failures = fuzz(target, args.inputs, args.workers)
        out = sys.stdout.write
        out(f"{args.inputs} inputs from seed {args.seed} in {time.monotonic() - start:.0f} s\n")
        out("".join(f"  {what}: {n}\n" for what, n in sorted(counts.items())))
        if args.deep:
            out(f"{args.deep} files loaded by verify:\n")
            out("".join(f"  {what}: {n}\n" for what, n in sorted(deep(target, args.deep).items())))
        out(f"{len(failures)} failures\n" + "".join(f"  input {f.number}: {f.what}\n" for f in failures[:50]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
