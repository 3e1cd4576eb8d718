"""Runs two programs that time themselves in turns, so that what slows the machine for seconds slows both.

Each program prints a line when the clock of a timed run has started. It is stopped there (SIGSTOP) while the other one continues to
its own next line, and that pause is subtracted from its time. So both load, warm up and fill their caches once, and each timed run of
one is next to a timed run of the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.child import last_words

from ..speed.process import PATIENCE_S, ended, read_lines

SHORTEST_NS = 20_000_000  # stopping a program takes up to about a millisecond, and the run must not be over by then
Starts = Callable[[bytes], bool]

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _with_us() -> None:
    """In the child, before the program starts: its own process group, and death with the parent, even while it is stopped."""
    os.setpgrp()
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended (for a zombie macOS reports EPERM)
        os.killpg(group, number)


class Paced:
    """A program in a process group of its own, which runs only between `go` and the start of its next timed run.

    name: for messages. lines_on: the stream on which it prints the lines that `starts` recognizes. `lines` is what it writes there,
    `other` what it writes to the other stream. stood_ns: nanoseconds for which it was stopped in each of its timed runs.
    If this process dies, it dies too (always on Linux; elsewhere the system sends SIGHUP to an orphaned, stopped group).
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        starts: Starts,
        lines_on: Literal["stdout", "stderr"],
        first_line: bytes = b"",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command, self.starts, self.lines_on = list(command), starts, lines_on
        self.first_line, self.variables = first_line, variables
        self.lines, self.stood_ns = list[bytes](), list[int]()
        self._process: subprocess.Popen[bytes] | None = None
        self._read: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stopped_at: int | None = None
        self._other: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close

    def go(self, timeout_s: float) -> bool:
        """Let it run until its next timed run has started. False if it reached its end.

        Raises YarnEdgeError if it cannot be started, fails, or prints nothing for `timeout_s` seconds.
        """
        if self._process is None:
            self._process = self._started()
        if self._stopped_at is not None:
            self.stood_ns.append(time.perf_counter_ns() - self._stopped_at)
            self._stopped_at = None
            _signal(self._process.pid, signal.SIGCONT)
        too_late = False
        while (line := self._next(timeout_s)) is not None:
            self.lines.append(line)
            if self.starts(line):
                if self._stopped(self._process):
                    self._stopped_at = time.perf_counter_ns()
                    return True
                too_late = True  # it ended before it could be stopped
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise YarnEdgeError(f"{self.name}: closed its output but did not exit") from None
        if code:
            words = last_words(b"".join(self.lines) if self.lines_on == "stderr" else self.other())
            raise YarnEdgeError(f"{self.name}: {ended(code, words)}")
        if too_late:
            raise self._too_short()
        return False

    def ran(self, samples_ns: Sequence[int], first: int) -> list[int]:
        """Its own times, in nanoseconds, from its timed run number `first` on, without the pauses.

        Raises YarnEdgeError if a run was so short that it may have been over when the program was stopped.
        """
        own_ns = [ns - stood for ns, stood in zip(samples_ns, self.stood_ns[first:], strict=False)]
        if min(own_ns, default=0) < SHORTEST_NS:
            raise self._too_short()
        return own_ns

    def _too_short(self) -> YarnEdgeError:
        least = f"{SHORTEST_NS / 1e9:g} s"
        return YarnEdgeError(f"{self.name}: runs shorter than {least} cannot be measured: use more tokens (-p, -n)")

    def _started(self) -> subprocess.Popen[bytes]:
        streams: dict[str, Any] = {"stdout": self._other, "stderr": self._other, self.lines_on: subprocess.PIPE}
        try:
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, env=self.variables, preexec_fn=_with_us, **streams
            )
        except OSError as error:
            raise YarnEdgeError(f"{self.command[0]} cannot be started: {error.strerror}") from error
        assert process.stdin is not None
        pipe = process.stdout if self.lines_on == "stdout" else process.stderr
        assert pipe is not None
        self._reader = threading.Thread(target=read_lines, args=(pipe, self._read), daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it has already ended: `go` reports why
            process.stdin.write(self.first_line)
            process.stdin.flush()
        return process

    def _next(self, timeout_s: float) -> bytes | None:
        try:
            return self._read.get(timeout=timeout_s)
        except queue.Empty:
            raise YarnEdgeError(f"{self.name}: printed nothing for {timeout_s:g} s (--timeout)") from None

    def _stopped(self, process: subprocess.Popen[bytes]) -> bool:
        """Stop it. False if it has already ended."""
        if process.returncode is not None:  # an earlier line was read too late
            return False
        _signal(process.pid, signal.SIGSTOP)
        _pid, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
        return os.WIFSTOPPED(status)

    def other(self) -> bytes:
        """What it has written to its other stream so far."""
        self._other.seek(0)
        return self._other.read()

    def close(self) -> None:
        """Kill it, whether it runs or is stopped."""
        process = self._process
        if process is not None:
            if process.poll() is None:
                _signal(process.pid, signal.SIGKILL)
                process.wait()
            self._reader.join()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):  # it did not read all of its input
                    if stream is not None:
                        stream.close()
        self._other.close()


def lockstep(one: Paced, other: Paced, timeout_s: float, after: Callable[[Paced], None]) -> None:
    """Run both to their ends, one timed run of each in turns. Raises YarnEdgeError if one fails, or has more runs."""
    while True:
        states = []
        for side in (one, other):
            states.append(side.go(timeout_s))
            after(side)
        if states[0] != states[1]:
            first = one if not states[0] else other
            raise YarnEdgeError(f"one side ended after {len(first.stood_ns)} timed runs, but the other has more")
        if not states[0]:
            return
