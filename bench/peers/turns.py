"""The sides of a race take turns: whole processes with their time and peak memory, medians over the turns, one table.

What slows a machine for minutes slows both sides: a turn of one follows a turn of the other, and who goes first alternates.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar, note
from yarn_edge.runtime.child import last_words

from ..speed.process import ended

YARN_EDGE = (sys.executable, "-m", "yarn_edge")
SAMPLE_S = 0.02
Measured = TypeVar("Measured")


def command_line(program: Sequence[object], *words: object, **flags: object) -> list[str]:
    """The words of a command: `m=path` is `-m path`, `ctx_size=512` is `--ctx-size 512`, `force=True` is `--force`.

    Flags that are None or False are left out.
    """
    line = [*program, *words]
    for name, value in flags.items():
        if value is not None and value is not False:
            line.append(f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}")
            line += [] if value is True else [value]
    return [str(word) for word in line]


@dataclass(frozen=True)
class ProcessRun:
    """A process from its start to its end. Peaks of memory are in bytes, 0 on systems without /proc."""

    seconds: float
    rss_bytes: int
    anonymous_bytes: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Contender:
    """A side of a race: commands that run one after the other. prepare: runs before each turn, and is not timed."""

    commands: Sequence[Sequence[str]]
    prepare: Callable[[], object] = lambda: None

    def turn(self, name: str) -> list[ProcessRun]:
        """Prepare, then run every command. Raises YarnEdgeError if one fails."""
        self.prepare()
        return [run_process(name, command) for command in self.commands]


def run_process(name: str, command: Sequence[str]) -> ProcessRun:
    """Run a command to its end and sample its memory. Raises YarnEdgeError with its last words if it fails."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        except OSError as error:
            raise YarnEdgeError(f"{command[0]} cannot be started: {error.strerror}") from error
        with MemoryPeaks(process.pid) as peaks:
            try:
                process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            seconds = time.perf_counter() - start
        stdout.seek(0)
        stderr.seek(0)
        printed = [stream.read().decode(errors="replace") for stream in (stdout, stderr)]
    if process.returncode:
        words = last_words((printed[1].strip() or printed[0]).encode())
        raise YarnEdgeError(f"{name}: {ended(process.returncode, words)}")
    return ProcessRun(seconds, peaks.rss_bytes, peaks.anonymous_bytes, *printed)


class MemoryPeaks:
    """Samples a process from a thread: the peaks of its resident and its anonymous memory in bytes, 0 without /proc.

    Resident: the kernel's own VmHWM. The maximum that wait4(2) reports includes the parent's memory at the fork.
    """

    def __init__(self, pid: int) -> None:
        self.rss_bytes = self.anonymous_bytes = 0
        self._status, self._ended = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeaks:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            values = dict(line.split(":", 1) for line in lines if ":" in line)
            rss, anonymous = (int(values.get(key, "0 kB").split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))
            self.rss_bytes = max(self.rss_bytes, rss)
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
            if self._ended.wait(SAMPLE_S):
                return


def in_turns(
    label: str,
    sides: Mapping[str, Callable[[], Measured]],
    repeat: int,
    warm_up: bool,
    describe: Callable[[Measured], str] | None = None,
) -> dict[str, list[Measured]]:
    """Call every side `repeat` times, in turns. Returns what each side returned, without that of the warm-up turn.

    describe: says what one call returned, for a note after it.
    """
    outcomes: dict[str, list[Measured]] = {name: [] for name in sides}
    with bar(label, len(sides) * (repeat + warm_up)) as advance:
        for turn in range(-int(warm_up), repeat):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                outcome = sides[name]()
                advance(1, name)
                if turn >= 0:
                    outcomes[name].append(outcome)
                    if describe is not None:
                        note(f"{name}: {describe(outcome)}")
    return outcomes


def run_turns(
    label: str, sides: Mapping[str, Contender], repeat: int, warm_up: bool = False
) -> dict[str, list[list[ProcessRun]]]:
    """The processes of every turn of every side."""

    def described(turn: Sequence[ProcessRun]) -> str:
        return ", ".join(f"{process.seconds:.2f} s" for process in turn)

    turns = {name: partial(side.turn, name) for name, side in sides.items()}
    return in_turns(label, turns, repeat, warm_up, described)


def timings(turns: Mapping[str, Sequence[Sequence[ProcessRun]]]) -> dict[str, Any]:
    """By side: seconds of each turn (all its processes), their median, and the peaks of any process, in bytes."""
    seconds = {name: [sum(p.seconds for p in turn) for turn in runs] for name, runs in turns.items()}
    processes = {name: [p for turn in runs for p in turn] for name, runs in turns.items()}
    return {
        "seconds": seconds,
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
        "peak_rss_bytes": {name: max(p.rss_bytes for p in all_of) for name, all_of in processes.items()},
        "peak_anonymous_bytes": {name: max(p.anonymous_bytes for p in all_of) for name, all_of in processes.items()},
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def timing_table(results: Mapping[str, Any], more: Mapping[str, Mapping[str, object]] | None = None) -> str:
    """The timings as a table. more: further columns, heading -> side -> cell."""
    extra, rows = more or {}, []
    for name, seconds in results["seconds"].items():
        times = (results["median_s"][name], min(seconds), max(seconds))
        peaks = (results[f"peak_{which}_bytes"][name] / 1e6 for which in ("rss", "anonymous"))
        cells = [column[name] for column in extra.values()]
        rows.append([name, *(f"{s:.2f}" for s in times), *cells, *(f"{peak:.0f}" for peak in peaks)])
    return markdown(["side", "median s", "min", "max", *extra, "peak memory MB", "anonymous MB"], rows)
