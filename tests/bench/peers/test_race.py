"""The harness of the races: processes in turns, their times and memory, and what a race prints and returns however it ends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.bench.peers import turns as turns_module
from yarn_edge.bench.peers.race import Race, Results
from yarn_edge.bench.peers.turns import Contender, ProcessRun, command_line, in_turns, run_process, run_turns, timings
from yarn_edge.errors import YarnEdgeError


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_words_of_a_command() -> None:
    line = command_line(["cp", Path("a b")], "x", m=Path("m.gguf"), ctx_size=512, force=True, quiet=False, kernels=None)
    assert line == ["cp", "a b", "x", "-m", "m.gguf", "--ctx-size", "512", "--force"]


@pytest.mark.parametrize(
    "warm_up, order", [(False, "ab ba ab"), (True, "ba ab ba ab")], ids=["without warm-up", "with warm-up"]
)
def test_who_goes_first_alternates_and_the_warm_up_does_not_count(warm_up: bool, order: str) -> None:
    called: list[str] = []

    def side(name: str) -> Callable[[], int]:
        def call() -> int:
            called.append(name)
            return len(called)

        return call

    found = in_turns("Racing", {"a": side("a"), "b": side("b")}, 3, warm_up)
    assert "".join(called) == order.replace(" ", "")
    first = 1 + 2 * warm_up
    assert sorted(found["a"] + found["b"]) == list(range(first, first + 6))


def test_a_process_is_timed_and_its_streams_are_kept_apart() -> None:
    run = run_process(
        "side", python("import sys, time; print('data'); print('a note', file=sys.stderr); time.sleep(0.2)")
    )
    assert (run.stdout, run.stderr) == ("data\n", "a note\n")
    assert 0.2 <= run.seconds < 60


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is sampled from /proc")
def test_peaks_of_memory() -> None:
    """72 MiB are written and given back before the end: the peak holds them, give or take the pages of two interpreters."""
    code = "import time; x = bytearray(b'x') * (72 << 20); time.sleep(0.5); del x; time.sleep(0.2)"
    big, small = run_process("side", python(code)), run_process("side", python("import time; time.sleep(0.2)"))
    assert 64 << 20 <= big.rss_bytes - small.rss_bytes < 80 << 20
    assert 64 << 20 <= big.anonymous_bytes - small.anonymous_bytes < 80 << 20


@pytest.mark.parametrize(
    "command, error",
    [
        (
            python("import sys; print('what it printed'); sys.exit('no such model')"),
            "side: .* ended with 1: no such model",
        ),
        (python("import sys; print('the last line'); sys.exit(3)"), "side: .* ended with 3: the last line"),
        (["/nowhere/program"], "/nowhere/program cannot be started: No such file"),
    ],
)
def test_a_process_that_fails(command: list[str], error: str) -> None:
    with pytest.raises(YarnEdgeError, match=error):
        run_process("side", command)


def test_every_turn_is_prepared_and_has_all_its_processes(tmp_path: Path) -> None:
    prepared: list[str] = []
    copy = Contender(
        [["cp", sys.executable, str(tmp_path / "a")], ["rm", str(tmp_path / "a")]], lambda: prepared.append("copy")
    )
    turns = run_turns("Racing", {"copy": copy, "nothing": Contender([["true"]])}, 2, warm_up=True)
    assert prepared == ["copy"] * 3
    assert [len(turn) for turn in turns["copy"]] == [2, 2]
    assert [len(turn) for turn in turns["nothing"]] == [1, 1]


def test_timings_by_side() -> None:
    def turn(*processes: tuple[float, int, int]) -> list[ProcessRun]:
        return [ProcessRun(*process, "", "") for process in processes]

    runs = {
        "a": [turn((1, 5, 2), (2, 9, 1)), turn((7, 4, 3), (1, 1, 1)), turn((2, 1, 1), (2, 1, 1))],
        "b": [turn((0.5, 7, 6))],
    }
    results = timings(runs)
    assert results == {
        "seconds": {"a": [3, 8, 4], "b": [0.5]},
        "median_s": {"a": 4, "b": 0.5},
        "peak_rss_bytes": {"a": 9, "b": 7},
        "peak_anonymous_bytes": {"a": 3, "b": 6},
    }
    results["peak_rss_bytes"]["a"] = 9_400_000
    lines = turns_module.timing_table(results, {"tok/s": {"a": "12", "b": "13"}}).splitlines()
    assert lines[0] == "| side | median s | min | max | tok/s | peak memory MB | anonymous MB |"
    assert lines[2] == "| a | 4.00 | 3.00 | 8.00 | 12 | 9 | 0 |"


def made(end: BaseException | None = None, parts: int = 2) -> Race:
    """A race of `parts` results that an exception may end."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--limit", type=int, default=2)

    def run(args: argparse.Namespace, results: Results) -> None:
        for number in range(parts):
            results[f"part {number}"] = args.limit
        if end is not None:
            raise end

    def tables(results: Results) -> str:
        return f"{len(results)} parts\n"

    return Race("made", "A race.", add_arguments, run, tables, lambda results: results["part 0"] < 3, repeat=4)


@pytest.mark.parametrize(
    "race_row, words, code, out, error",
    [
        (made(), [], 0, "2 parts\n", ""),
        (made(), ["--limit", "3"], 1, "2 parts\n", ""),
        (made(), ["--limit", "x"], 2, "", "peers.made: error: argument --limit: invalid int value: 'x' (see --help)\n"),
        (
            made(),
            ["--repeat", "0"],
            2,
            "",
            "peers.made: error: argument --repeat: 0 is not from 1 to 1000 (see --help)\n",
        ),
        (made(YarnEdgeError("no model")), [], 2, "2 parts\n", "peers.made: error: no model\n"),
        (made(YarnEdgeError("no model"), 0), [], 2, "", "peers.made: error: no model\n"),
        (made(OSError(2, "No such file", "f")), [], 2, "2 parts\n", "peers.made: error: f: No such file\n"),
        (made(KeyboardInterrupt()), [], 130, "2 parts\n", "peers.made: interrupted\n"),
    ],
)
def test_how_a_race_ends(
    race_row: Race, words: list[str], code: int, out: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results that are there are printed however it ends; the error is one line."""
    assert race_row.main(words) == code
    captured = capsys.readouterr()
    assert captured.out == out
    assert captured.err.endswith(error)
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("end", [None, KeyboardInterrupt()])
def test_the_json_of_a_race(end: BaseException | None, capsys: pytest.CaptureFixture[str]) -> None:
    made(end).main(["--json"])
    results: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert results.pop("env").keys() > {"date", "CPU", "load_average", "busy"}
    assert results == {"part 0": 2, "part 1": 2, "complete": end is None}
