"""Some runs of the kill target (`make kills` ends 1,000): a signal at a random moment leaves nothing half-written."""

from __future__ import annotations

import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("sends SIGKILL", allow_module_level=True)

from support.kills import Ended, Yard, ending_faults, kill_all, table

# The others take longer, or write as one of these does.
QUICK = ["convert", "quantize over old files", "patch shards", "imatrix", "perplexity --save", "chat --cache", "/save"]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("kills"))


def test_some_kills(yard: Yard) -> None:
    outcomes = kill_all(yard, QUICK, 3 * len(QUICK), seed=1, workers=2)
    assert [outcome for outcome in outcomes if outcome.faults] == []
    assert Counter(outcome.signal for outcome in outcomes)[signal.SIGKILL] == len(QUICK)
    assert sum(outcome.what != "finished before" for outcome in outcomes) > len(QUICK)
    assert len(table(yard, outcomes).splitlines()) == 2 + 3 * len(QUICK)


# What a bad writer leaves when it is ended, by name; what the run after it writes; what is said of that.
FAULTY: dict[str, tuple[dict[str, str], str, str]] = {
    "half a file": ({"saved.json": "{"}, "whole", "left saved.json: half"),
    "a partial file": ({"saved.json.0123abcd.partial": "{"}, "whole", "left saved.json.0123abcd.partial: partial"),
    "a file of another name": ({"saved.json~": "{"}, "whole", "the next run left saved.json~"),
    "another result": ({}, "{}", "the next run's saved.json differs"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_the_target_can_fail(fault: str, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, _ended = yard.undisturbed("/save")
    left, written, told = FAULTY[fault]

    def bad_writer(_name: str, words: list[str], folder: Path, number: int | None = None, _moment: float = 0) -> Ended:
        output = Path(words[1])
        (folder / "tmp").mkdir(exist_ok=True)
        if number is None:
            shutil.copy(reference / output.name, output) if written == "whole" else output.write_text(written)
        else:
            for name, text in left.items():
                output.with_name(name).write_text(text)
        return Ended(0 if number is None else -number, 0.1, "", "")

    monkeypatch.setattr("support.kills.run_once", bad_writer)
    outcome = yard.trial(1000 + list(FAULTY).index(fault), "/save", signal.SIGTERM, 0.0)
    assert told in outcome.faults
    assert len(outcome.faults) <= 2


@pytest.mark.parametrize(
    "code, stderr, told",
    [
        (70, "yarn-edge: error: a bug in yarn-edge\n", "ended with 70"),
        (143, "Traceback (most recent call last):\nTerminated\n", "says"),
        (1, "Traceback (most recent call last):\nTerminated: 15\n", "prints a traceback"),
        (-11, "", "ended with -11"),
        (143, "yarn-edge: error: ended by signal 15\n", None),
        (-15, "", None),
        (0, "done\n", None),
    ],
)
def test_how_a_process_may_end(code: int, stderr: str, told: str | None) -> None:
    faults = ending_faults(signal.SIGTERM, Ended(code, 1.0, "", stderr))
    assert (faults == []) if told is None else any(told in fault for fault in faults)
