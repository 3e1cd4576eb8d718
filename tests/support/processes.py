"""Processes in tests: the signals they start with, the core that a worker has, and what /proc says of one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def receive_signals() -> None:
    """Signals that whoever started the tests had ignored reach this process's children again.

    A shell starts background jobs with SIGINT ignored and nohup ignores SIGHUP. Ignored signals are inherited, handled
    ones are not: with a handler of Python's here, every child starts with the default. This process itself goes on
    when the terminal closes, as nohup promised.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def take_share_of_cores(worker: int, n_workers: int) -> None:
    """Keep worker number `worker` of pytest-xdist, and its children, to its share of the cores.

    Two threads that wait for each other are slow on a core they share with others, so llama.cpp, torch and numba must
    not each start one for every core of the machine. They all count the cores of the process's affinity.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[worker::n_workers] or cores)


def run_timed(words: Sequence[str]) -> tuple[subprocess.CompletedProcess[bytes], float]:
    """A command that succeeds, and the processor time it took in seconds: others that compute hardly change it."""
    before = os.times()
    done = subprocess.run(words, capture_output=True, check=True)
    after = os.times()
    return done, sum(after[2:4]) - sum(before[2:4])


def state_of(pid: int) -> str:
    """Its state by one letter, as proc(5) has them (T: stopped); "gone" also for one that is dead and not waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return "gone" if state == "Z" else state
