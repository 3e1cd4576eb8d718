"""Units on workers of this machine: killed workers, errors, results that are kept, and nothing left behind."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from yarn_edge.errors import YarnEdgeBug, YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.jobs.crew import Crew, add_job_flags, crew_of, parse_place
from yarn_edge.jobs.run import calls_of, run_units
from yarn_edge.jobs.sent_file import SentFile
from yarn_edge.jobs.unit import Unit, UnitResult, attempt

from support import job_units, tiny_gguf
from support.job_units import unit_of


def squares(units: list[Unit], crew: Crew) -> dict[int, int]:
    found: dict[int, int] = {}
    run_units(units, crew, "Squaring", lambda i, result: found.update({i: int(result.arrays["square"][0])}))
    return found


def test_a_killed_worker_costs_only_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    units = [unit_of(job_units.squared, n) for n in range(5)]
    units[2] = unit_of(job_units.killed_once, 2, str(tmp_path))
    assert squares(units, Crew(n_workers=2)) == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}
    told = capfd.readouterr().err
    assert "a worker died computing unit 2 (worker " in told
    assert "ended with -9): another one computes it again" in told
    assert "5 units in " in told


ERRORS = {
    "ours": (job_units.refused, YarnEdgeError, "7: no"),
    "a bug": (job_units.divided_by_zero, YarnEdgeBug, "ZeroDivisionError"),
    "every worker dies": (job_units.killed_always, YarnEdgeError, "unit 7: 3 workers died computing it"),
}


@pytest.mark.parametrize("work, kind, message", ERRORS.values(), ids=ERRORS)
def test_errors_of_units(work: object, kind: type[YarnEdgeError], message: str) -> None:
    with pytest.raises(YarnEdgeError, match=message) as error:
        squares([unit_of(work, 7)], Crew())
    assert type(error.value) is kind


def test_finished_units_are_not_computed_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    crew = Crew(n_workers=2, results=tmp_path / "kept")
    units = [unit_of(job_units.squared, n) for n in range(3)]
    first = squares(units, crew)
    deadly = [unit_of(job_units.killed_always, n) for n in range(3)]  # the same keys
    assert squares(deadly, crew) == first == {0: 0, 1: 1, 2: 4}
    assert "has the results of 3 of 3 units" in capfd.readouterr().err
    file = tmp_path / "kept" / f"{units[1].key}.npz"
    file.write_bytes(file.read_bytes()[:-40])
    assert squares([deadly[0], units[1], deadly[2]], crew) == first
    assert f"{file}: is damaged and computed again" in capfd.readouterr().err


def test_a_link_among_the_results_is_replaced(tmp_path: Path) -> None:
    """Not what it points to, which is no result."""
    unit, other = unit_of(job_units.squared, 3), tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "kept").mkdir()
    path = tmp_path / "kept" / f"{unit.key}.npz"
    path.symlink_to(other)
    assert squares([unit], Crew(results=tmp_path / "kept")) == {0: 9}
    assert other.read_text() == "precious"
    assert not path.is_symlink()


def wait_for(path: Path) -> int:
    until = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(path.read_text())


def gone(pid: int) -> bool:
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_an_interruption_ends_the_workers(tmp_path: Path) -> None:
    mark = tmp_path / "pid"

    def interrupt(_index: int, _result: UnitResult) -> None:
        wait_for(mark)
        raise KeyboardInterrupt

    units = [unit_of(job_units.slow, 0, str(mark)), unit_of(job_units.squared, 1)]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_units(units, Crew(n_workers=2), "Waiting", interrupt)
    assert time.monotonic() - began < 30
    assert gone(int(mark.read_text()))


def test_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from support import job_units\nfrom yarn_edge.jobs.crew import Crew\nfrom yarn_edge.jobs.run import run_units\n"
        "run_units([job_units.unit_of(job_units.slow, 0, sys.argv[2])], Crew(), 'Waiting', print)\n"
    )
    tests, mark = Path(__file__).parents[1], tmp_path / "pid"
    command = subprocess.Popen([sys.executable, "-c", program, str(tests), str(mark)])
    worker = wait_for(mark)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert gone(worker)


def test_a_worker_with_other_versions_refuses() -> None:
    (attempted,) = attempt([unit_of(job_units.squared, 1)], "yarn-edge 0.0.1 and llama-cpp-python 0.3.1")
    with pytest.raises(YarnEdgeError, match=r"worker .*: has yarn-edge .*, the command yarn-edge 0\.0\.1 and"):
        attempted.unwrap()


CALLS = {
    "one each": (5, 2, None, [[0], [1], [2], [3], [4]]),
    "four calls per worker": (16, 2, 4, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]),
    "fewer units than calls": (3, 2, 4, [[0], [1], [2]]),
    "one call per worker": (5, 2, 1, [[0, 1, 2], [3, 4]]),
}


@pytest.mark.parametrize("n, workers, per_worker, wanted", CALLS.values(), ids=CALLS)
def test_calls(n: int, workers: int, per_worker: int | None, wanted: list[list[int]]) -> None:
    assert calls_of(range(n), workers, per_worker) == wanted


PLACES = {
    "local": ("local", ""),
    "ray": ("ray", ""),
    "ray:10.0.0.1:6379": ("ray", "10.0.0.1:6379"),
    "ray://10.0.0.1:10001": ("ray", "ray://10.0.0.1:10001"),
    "dask:tcp://10.0.0.1:8786": ("dask", "tcp://10.0.0.1:8786"),
    "slurm:partition=cpu,time=60": ("slurm", "partition=cpu,time=60"),
}


@pytest.mark.parametrize("text, wanted", PLACES.items(), ids=PLACES)
def test_places(text: str, wanted: tuple[str, str]) -> None:
    assert parse_place(text) == wanted


@pytest.mark.parametrize("text", ["local:2", "k8s", "Ray", ""])
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_place(text)


def crew_from(*words: str) -> Crew | None:
    parser = argparse.ArgumentParser()
    add_job_flags(parser, "units")
    parser.add_argument("--threads", type=int)
    return crew_of(parser.parse_args(words))


def test_cores_are_shared_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yarn_edge.jobs.crew.physical_threads", lambda: 8)
    assert crew_from() is None
    for words, (n_workers, threads) in {(): (8, 1), ("--workers", "3"): (3, 2), ("--threads", "4"): (2, 4)}.items():
        crew = crew_from("--on", "local", *words)
        assert crew is not None
        assert (crew.n_workers, crew.threads) == (n_workers, threads)
    with pytest.raises(YarnEdgeError, match="--workers needs --on"):
        crew_from("--workers", "2")
    with pytest.raises(YarnEdgeError, match="--results needs --on"):
        crew_from("--results", "x")


@pytest.mark.parametrize("place, module", [("ray", "ray"), ("dask", "distributed"), ("slurm", "submitit")])
def test_a_missing_extra_is_one_line(place: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        n for n in sys.modules if n.startswith(("yarn_edge.jobs.ray", "yarn_edge.jobs.dask", "yarn_edge.jobs.slurm"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(YarnEdgeError, match=rf"--on {place} needs \w+: pip install 'yarn-edge\[{place}\]'"):
        Crew(place).open()


def test_a_worker_wants_the_same_file(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama")
    sent = SentFile.of(read_gguf(path))
    assert sent.read().path == path
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(YarnEdgeError, match=r"is another model on .*: copy it again"):
        sent.read()
    path.write_bytes(data + bytes(32))
    with pytest.raises(YarnEdgeError, match=rf"has {len(data) + 32} bytes on .*, {len(data)} where the command runs"):
        sent.read()
    path.unlink()
    with pytest.raises(YarnEdgeError, match=r"does not exist on .*: copy it there"):
        sent.read()
