"""The child process of one configuration: its events as they come, and why it ended, however it ended."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.runtime.child import last_words
from yarn_edge.signals import deferred_ctrl_c

CHILD: tuple[str, ...] = (sys.executable, "-m", "yarn_edge.bench.speed.child")
PATIENCE_S = 10.0  # for a process to end after its output ended
Event = dict[str, Any]
_STOP = b""  # in place of a line: Ctrl-C


def run_child(
    request: Mapping[str, Any],
    timeout_s: float,
    on_event: Callable[[Event], None],
    command: Sequence[str] | None = None,
) -> str | None:
    """Run a child over one request. Returns None if it finished, otherwise the reason why not.

    The child is in a session of its own, so that this process handles Ctrl-C. It never outlives this call, nor this process,
    because its stdin ends with us. Ctrl-C and SIGTERM end it, and are raised after its earlier events were passed to `on_event`.
    """
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile() as errors, deferred_ctrl_c(lambda: lines.put(_STOP)):
        try:
            process = subprocess.Popen(
                list(command or CHILD),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise YarnEdgeError(f"a process for measuring cannot be started: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        reader = threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already, for a reason found below
                process.stdin.write(json.dumps(dict(request)).encode("ascii") + b"\n")
                process.stdin.flush()
            return _attend(process, lines, timeout_s, on_event, errors)
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()
            with contextlib.suppress(OSError):  # the request came too late
                process.stdin.close()


def _attend(
    process: subprocess.Popen[bytes],
    lines: queue.SimpleQueue[bytes | None],
    timeout_s: float,
    on_event: Callable[[Event], None],
    errors: IO[bytes],
) -> str | None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return f"not done within {timeout_s:g} s (--timeout)"
        if line is None:
            return _why_silent(process, errors)
        if line is _STOP:
            process.kill()
            for left in iter(lines.get, None):
                if left is not _STOP:
                    on_event(_event(left))
            return "stopped"
        event = _event(line)
        if event["event"] == "done":
            return None
        if event["event"] == "failed":
            return one_line(str(event.get("reason")), 400)
        on_event(event)


def _why_silent(process: subprocess.Popen[bytes], errors: IO[bytes]) -> str:
    """Why its output ended before it reported that it is done."""
    try:
        code = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return "the measuring process closed its output and did not end"
    errors.seek(0)
    return ended(code, last_words(errors.read()))


def read_lines(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    """Put every complete line into the queue, then None. Runs in a thread."""
    for line in pipe:
        if line.endswith(b"\n"):  # otherwise the process ended in the middle of a line
            lines.put(line)
    lines.put(None)


def _event(line: bytes) -> Event:
    """An event from a line. Only our own child writes there."""
    event = json.loads(line)
    if not isinstance(event, dict) or "event" not in event:
        raise YarnEdgeError(f"the measuring process wrote {one_line(repr(line), 80)}")
    return event


def ended(code: int, words: str) -> str:
    """Why a child ended without reporting: by a signal (negative codes, as in subprocess), or by itself."""
    details = f": {words}" if words else ""
    if code >= 0:
        return f"the measuring process ended with {code}{details}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name == "SIGKILL":
        return "killed (SIGKILL), as the system does when memory runs out"
    return f"ended by {name}{details}"
