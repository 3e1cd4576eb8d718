"""Some hundred inputs of each kind (`make fuzz` runs many more): nothing but a one-line refusal may come out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.fuzz import runner
from support.fuzz.kinds import KINDS
from support.fuzz.runner import Case, one

N_INPUTS = {
    "headers": 400,
    "configs": 400,
    "texts": 30,
    "states": 60,
    "checkpoints": 60,
    "terminals": 16,
    "prompts": 40,
}


@pytest.mark.parametrize("name", N_INPUTS)
def test_some_inputs(tmp_path: Path, name: str) -> None:
    kind = KINDS[name][0](tmp_path)
    counts, failures, _longest = runner.run(kind, N_INPUTS[name], 1, tmp_path, 1)
    assert failures == []
    assert max(counts.values()) > N_INPUTS[name] / 4


def test_some_files_in_llama_cpp() -> None:
    """In a new process, because threads of OpenMP do not survive the forks."""
    command = [
        sys.executable,
        "-m",
        "support.fuzz",
        "--kind",
        "loads",
        "--inputs",
        "60",
        "--seed",
        "1",
        "--workers",
        "1",
    ]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "used by" in ran.stdout


class Bad:
    """Inputs of which each does something that it may not."""

    name, in_process = "bad", True

    def __init__(self, action: object) -> None:
        self.action = action

    def case(self, _rng: random.Random, _scratch: Path) -> Case:
        return Case(10, self.action)  # type: ignore[arg-type]


def _endless() -> None:
    while True:
        pass


def _exit() -> None:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (lambda: {}["rope"], "KeyError"),
        (_endless, "took over"),
        (lambda: bytearray(2 << 30), "MemoryError"),
        (lambda: bytearray(64 << 20) and None, "allocated"),
        (_exit, "SystemExit"),
    ],
    ids=["exception", "hang", "memory", "allocations", "exit"],
)
def test_what_no_input_may_do_is_seen(
    action: object, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if action is _endless:  # the others may be slow beside other work
        monkeypatch.setattr(runner, "HANG_S", 0.2)
    failure = one(Bad(action), 0, 0, tmp_path)[1]
    assert failure is not None
    assert what in failure.what


def test_an_input_that_ends_the_process_is_seen(tmp_path: Path) -> None:

    kind = Bad(lambda: os.kill(os.getpid(), signal.SIGKILL))
    counts, failures, _longest = runner.run(kind, 3, 0, tmp_path, 1)
    assert [f.number for f in failures] == [0, 1, 2]
    assert counts == {"ended the process": 3}
