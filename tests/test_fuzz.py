"""A few hundred inputs of the fuzz target (`make fuzz` runs 120,000): nothing but a one-line refusal may come out."""

from __future__ import annotations

import signal
import tracemalloc
from pathlib import Path

from support.fuzz import Target
from support.fuzz_inputs import CONFIGS, gguf_seeds


def test_some_inputs(tmp_path: Path) -> None:
    target = Target(tmp_path, gguf_seeds(tmp_path), CONFIGS, seed=1)
    before = signal.getsignal(signal.SIGALRM)
    tracemalloc.start()
    try:
        results = [target.run(number) for number in range(500)]
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, before)
    assert [failure for _outcome, failure in results if failure is not None] == []
    outcomes = [outcome for outcome, _failure in results]
    assert 50 < outcomes.count("read") < 450


def test_the_target_can_fail(tmp_path: Path) -> None:
    """An exception that is not ours, and a hang, are seen."""
    from support import fuzz

    def wrong(_path: Path) -> None:
        raise KeyError("rope")

    def slow(_path: Path) -> None:
        while True:
            pass

    target = Target(tmp_path, gguf_seeds(tmp_path), CONFIGS, seed=1)
    original, fuzz.HANG_S = fuzz.read_gguf_everywhere, 0.05
    try:
        for broken, what in ((wrong, "KeyError"), (slow, "took over")):
            fuzz.read_gguf_everywhere = broken
            failure = target.run(0)[1]
            assert failure is not None
            assert what in failure.what
    finally:
        fuzz.read_gguf_everywhere, fuzz.HANG_S = original, 2.0
