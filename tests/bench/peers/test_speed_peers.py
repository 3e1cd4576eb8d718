"""The race with llama-bench: two programs in lockstep, their rows, and what happens when something ends early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from yarn_edge.bench.peers import bench as bench_race
from yarn_edge.bench.peers import lockstep as lockstep_module
from yarn_edge.bench.peers.bench import RACE, median_interval
from yarn_edge.bench.peers.llama_bench import samples_in
from yarn_edge.bench.peers.lockstep import Paced, lockstep
from yarn_edge.errors import YarnEdgeError

from support import tiny_gguf
from support.processes import state_of

RUNS, TICKS = 4, 200
# Reports that its clock runs, then ticks for a while; prints the times of the ticks, by the clock that all processes share.
TICKING = f"""
import json, sys, time
ticks, samples = [], []
for number in range({RUNS}):
    start = time.perf_counter_ns()
    print(f"prompt run {{number + 1}}/{RUNS}", file=sys.stderr, flush=True)
    for _ in range({TICKS}):
        ticks.append((number, time.perf_counter_ns()))
        time.sleep(0.001)
    samples.append(time.perf_counter_ns() - start)
print(json.dumps([ticks, samples]))
"""


def program(code: str, flag: str = "-S") -> list[str]:
    return [sys.executable, flag, "-c", code]


def starts(line: bytes) -> bool:
    return b" run " in line


def test_one_runs_while_the_other_stands_still() -> None:
    """Their ticks never mix, and the pause that is subtracted is the gap in the ticks of a run."""
    with (
        closing(Paced("peer", program(TICKING), starts, "stderr")) as one,
        closing(Paced("peer", program(TICKING), starts, "stderr")) as other,
    ):
        lockstep(one, other, 60, lambda _side: None)
        found = [json.loads(side.other()) for side in (one, other)]
        stood = [side.stood_ns for side in (one, other)]
    order = [who for _at, who in sorted((at, who) for who in (0, 1) for _number, at in found[who][0])]
    switches = sum(a != b for a, b in pairwise(order))
    assert 2 * RUNS - 1 <= switches <= 2 * RUNS + 1  # one tick or none before it is stopped
    for (ticks, samples), stood_ns in zip(found, stood, strict=True):
        assert len(stood_ns) == RUNS
        for number in range(RUNS):
            own = [at for run, at in ticks if run == number]
            gap = max(b - a for a, b in pairwise(own))
            in_one_gap = gap >= stood_ns[number]  # else it was stopped before its first tick
            before = samples[number] - (own[-1] - own[0]) >= stood_ns[number]
            assert in_one_gap or before
    ran = [[ns - still for ns, still in zip(found[who][1], stood[who], strict=True)] for who in (0, 1)]
    for number in range(RUNS):
        assert min(ran[0][number], ran[1][number]) >= 0.9 * TICKS * 1e6
        assert stood[1][number] >= 0.5 * ran[0][number]  # it was stopped while the other one ran
        if number:
            assert stood[0][number] >= 0.5 * ran[1][number - 1]


def test_runs_that_may_have_been_over_before_it_stood_are_refused() -> None:
    one = Paced("peer", [], starts, "stderr")
    one.stood_ns = [10**9, 10**9, 10**9, 10**9]
    assert one.ran([1_030_000_000, 1_020_000_000], 2) == [30_000_000, 20_000_000]
    for too_short in ([1_030_000_000, 1_019_000_000], [5_000_000, 1_030_000_000]):
        with pytest.raises(YarnEdgeError, match=r"peer: runs shorter than 0.02 s cannot be measured"):
            one.ran(too_short, 0)
    one.close()


def test_a_program_that_ends_before_it_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are read too late: all of its runs are over, and the program, too."""
    real = Paced._stopped
    monkeypatch.setattr(Paced, "_stopped", lambda self, process: real(self, process) if process.wait() == 0 else None)
    code = "import sys; print('prompt run 1/2\\nprompt run 2/2', file=sys.stderr)"
    with (
        closing(Paced("peer", program(code), starts, "stderr")) as one,
        pytest.raises(YarnEdgeError, match="cannot be measured: use more tokens"),
    ):
        one.go(60)


def test_sides_with_unlike_runs_are_refused() -> None:
    fewer = TICKING.replace(f"range({RUNS})", f"range({RUNS - 1})")
    with (
        closing(Paced("peer", program(TICKING), starts, "stderr")) as one,
        closing(Paced("peer", program(fewer), starts, "stderr")) as other,
        pytest.raises(YarnEdgeError, match="one side ended after 3 timed runs, but the other has more"),
    ):
        lockstep(one, other, 60, lambda _side: None)


@pytest.mark.parametrize(
    "code, timeout_s, message",
    [
        (
            "import sys; sys.exit('no memory for that')",
            60,
            "peer: the measuring process ended with 1: no memory for that",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 60, "peer: killed .SIGKILL"),
        ("import time; time.sleep(60)", 0.5, r"peer: printed nothing for 0.5 s \(--timeout\)"),
        ("import os, time; os.close(2); time.sleep(60)", 60, "peer: closed its output but did not exit"),
    ],
)
def test_a_side_that_fails(code: str, timeout_s: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep_module, "PATIENCE_S", 0.5)
    with (
        closing(Paced("peer", program(code), starts, "stderr")) as one,
        closing(Paced("peer", program(TICKING), starts, "stderr")) as other,
        pytest.raises(YarnEdgeError, match=message),
    ):
        lockstep(one, other, timeout_s, lambda _side: None)


def test_a_program_that_is_not_there() -> None:
    with (
        closing(Paced("peer", ["/nowhere/llama-bench"], starts, "stderr")) as one,
        pytest.raises(YarnEdgeError, match="cannot be started"),
    ):
        one.go(1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_nobody_is_left_standing_when_we_are_killed() -> None:
    code = f"""
import sys
import psutil
from yarn_edge.bench.peers.lockstep import Paced
one = Paced("peer", [sys.executable, "-S", "-c", {TICKING!r}], lambda line: b" run " in line, "stderr")
one.go(60)
print(*(child.pid for child in psutil.Process().children()), flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        assert state_of(pid) == "T"
        parent.kill()
        parent.communicate()
        deadline = time.monotonic() + 20
        while state_of(pid) != "gone" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert state_of(pid) == "gone"
    finally:
        if state_of(pid) != "gone":
            os.kill(pid, signal.SIGKILL)


# On a busy machine the run of a tiny model can end before it is stopped. A program is stopped once in every timed run, so these wait
# until that has happened before they work.
STOPPED = """
import signal, time
continued = []
signal.signal(signal.SIGCONT, lambda *_: continued.append(True))
def until_stopped(before):
    while len(continued) == before:
        time.sleep(0.001)
"""
OURS = f"""{STOPPED}
from yarn_edge.bench.speed import child
class Bench(child.Bench):
    def __init__(self, request, model, context, tell):
        def tell_and_wait(event, **values):
            before = len(continued)
            tell(event, **values)
            if "number" in values:
                until_stopped(before)
        super().__init__(request, model, context, tell_and_wait)
child.Bench = Bench
raise SystemExit(child.main())
"""
FAKE = """#!{python} -S
import json, sys, time
{stopped}
flags = dict(zip(sys.argv[1::2], sys.argv[2::2])) if "--progress" not in sys.argv else dict(
    zip(sys.argv[1:-1:2], sys.argv[2:-1:2]))
assert sys.argv[-1] == "--progress" and flags["-m"].endswith("tiny.gguf") and flags["-d"] == "{depth}", sys.argv
rows = []
for kind, n in [("prompt", flags["-p"]), *(("generation", n) for n in flags["-n"].split(","))]:
    samples = []
    for number in range(int(flags["-r"])):
        print(f"llama-bench: benchmark 1/3: depth run {{number + 1}}/{{flags['-r']}} (cached)", file=sys.stderr, flush=True)
        before, start = len(continued), time.perf_counter_ns()
        print(f"llama-bench: benchmark 1/3: {{kind}} run {{number + 1}}/{{flags['-r']}}", file=sys.stderr, flush=True)
        until_stopped(before)
        for _ in range(100):  # one long sleep would elapse while it is stopped
            time.sleep(0.001)
        samples.append(time.perf_counter_ns() - start)
    is_prompt = kind == "prompt"
    rows.append({{"n_prompt": int(n) * is_prompt, "n_gen": int(n) * (not is_prompt), "samples_ns": samples}})
{end}
print(json.dumps(rows))
"""


def peer(folder: Path, end: str = "", depth: int = 32) -> Path:
    """A folder with a llama-bench that sleeps 0.1 s in every run."""
    path = folder / "llama-bench"
    path.write_text(FAKE.format(python=sys.executable, stopped=STOPPED, end=end, depth=depth))
    path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("peers") / "tiny.gguf", "llama")


@pytest.fixture
def patient_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours does not start to work in a timed run before it was stopped there."""
    monkeypatch.setattr(bench_race, "CHILD", program(OURS, "-u"))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(lockstep_module, "SHORTEST_NS", 1_000_000)  # a tiny model's runs
    return RACE.main(words)


def short(tiny: Path, folder: Path) -> list[str]:
    sizes = "--depth 32 -p 2048 -n 256 --repeat 6 --threads 1"
    return [str(tiny), "--peer", str(folder), *sizes.split()]


@pytest.mark.usefixtures("patient_child")
def test_ours_next_to_a_peer_of_known_speed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *short(tiny, peer(tmp_path)), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"]
    assert [(r["test"], r["n"], r["depth"]) for r in found["rows"]] == [
        ("pp", 2048, 32),
        ("tg", 256, 32),
        ("tg+s", 256, 32),
    ]
    for row in found["rows"]:
        assert len(row["ratios"]) == 6
        assert min(row["ours_tok_per_s"]) > 0
        assert max(row["theirs_tok_per_s"]) <= row["n"] / 0.095  # no run is faster than its sleeps
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["ratios"] == [a / b for a, b in zip(row["ours_tok_per_s"], row["theirs_tok_per_s"], strict=True)]


@pytest.mark.usefixtures("patient_child")
@pytest.mark.parametrize(
    "end, message",
    [
        ("sys.exit('out of memory')", "llama-bench: the measuring process ended with 1: out of memory"),
        ("rows = rows[1:]", "ran other tests: tg, tg"),
        ("print('no JSON')", "no rows that we can read"),
    ],
)
def test_a_peer_that_fails_is_reported(
    end: str,
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *short(tiny, peer(tmp_path, end))) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


@pytest.mark.usefixtures("patient_child")
def test_rows_of_earlier_depths_are_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Any = bench_race.paired_rows
    seen = []

    def interrupted(c: Any, *rest: Any) -> Any:
        seen.append(c.depth)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(c, *rest)

    monkeypatch.setattr(bench_race, "paired_rows", interrupted)
    words = short(tiny, peer(tmp_path))
    words[words.index("--depth") + 1] = "32,64"
    assert run(monkeypatch, *words, "--json") == 130
    found = json.loads(capsys.readouterr().out)
    assert {row["depth"] for row in found["rows"]} == {32}
    assert not found["complete"]


def test_ours_that_fails_is_reported(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*short(tiny, peer(tmp_path)), "--kv-type", "q4_0", "--attention", "plain"]  # llama.cpp wants it on
    assert run(monkeypatch, *words) == 2
    assert "peers.bench: error: ours: " in capsys.readouterr().err


def test_a_folder_without_llama_bench(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *short(tiny, tmp_path)) == 2
    assert "no such program" in capsys.readouterr().err


@pytest.mark.parametrize(
    "n, ends", [(5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (15, (3, 11)), (20, (5, 14)), (30, (9, 20))]
)
def test_median_interval(n: int, ends: tuple[int, int] | None) -> None:
    """The ranks that tables of the sign test give for 95 %."""
    assert median_interval([float(v) for v in reversed(range(n))]) == ends


def test_the_output_of_llama_bench_is_read() -> None:
    rows = [{"n_prompt": 512, "n_gen": 0, "samples_ns": [1, 2]}, {"n_prompt": 0, "n_gen": 128, "samples_ns": [3]}]
    assert samples_in(json.dumps(rows).encode()) == [("pp", [1, 2]), ("tg", [3])]
    for broken in (b"", b"{", b"[1]", b'[{"n_prompt": 1}]'):
        with pytest.raises(YarnEdgeError, match="no rows"):
            samples_in(broken)


def test_ctrl_c_ends_both() -> None:
    """A stopped side ends with us, as a running one does."""
    pids, others = [], set(psutil.Process().children())

    def until_ctrl_c() -> None:
        with closing(Paced("peer", program(TICKING), starts, "stderr")) as one:
            assert one.go(60)
            pids.extend(child.pid for child in set(psutil.Process().children()) - others)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        until_ctrl_c()
    (pid,) = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["--backend", "cuda"], "a GPU goes on reading while its program is stopped: -p 0"),
        (["-p", "1", "-n", "1"], "cannot be measured: use more tokens"),
    ],
)
def test_what_cannot_be_measured(
    words: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *short(tiny, peer(tmp_path)), *words) == 2
    assert message in capsys.readouterr().err
