"""The kill target: every writing command is ended by SIGKILL, SIGTERM or SIGHUP at a random moment, and then run again.

`make kills` (`cd tests && python -m support.kills --runs 1000`) prints a record (docs/fuzzing.md). Moments are uniform over the time
that the command took undisturbed, from the fork on, with its modules imported already. A run fails the target if a file under a final
name is neither whole nor the old one, if SIGTERM or SIGHUP leaves anything else or ends in anything but one line, or if the
next run does not give what an undisturbed run gives, with nothing beside it. Each run is reproducible, as far as moments are, from
its number and the seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from yarn_edge.progress import bar

from support.kill_targets import PRELOAD, TARGETS, Inputs, Target, same_bytes, start, write_inputs

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
HANG_S = 60.0
ENDS_WITHIN_S = 10.0
# Starting a process collects every other that ended, and of two threads that collect one, the second is told code 255.
_ONE_THREAD = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """How a process went. code: as multiprocessing has it, minus the signal's number for one that the signal ended."""

    code: int
    seconds: float
    stdout: str
    stderr: str


@dataclass(frozen=True)
class KillOutcome:
    """One run. what: "finished before", "nothing left", "partial left" or "can resume"; faults: what must not be."""

    number: int
    target: str
    signal: signal.Signals
    moment_s: float
    what: str
    faults: tuple[str, ...]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_once(name: str, words: list[str], folder: Path, number: int | None = None, moment_s: float = 0.0) -> Ended:
    """Run a command in a process of its own. number: the signal that is sent after `moment_s`."""
    (folder / "tmp").mkdir(exist_ok=True)
    process = _context().Process(target=start, args=(name, words, folder))
    began = time.monotonic()
    with _ONE_THREAD:
        process.start()
    ended = wait([process.sentinel], moment_s if number is not None else HANG_S)
    if number is not None and not ended:
        with suppress(ProcessLookupError):  # it has ended in the meantime
            os.kill(process.pid, number)
        ended = wait([process.sentinel], ENDS_WITHIN_S)
    if not ended:
        process.kill()
    with _ONE_THREAD:
        process.join()
    if not ended:
        raise TimeoutError(f"{' '.join(words)}: does not end")
    stdout, stderr = (
        (folder / name).read_text(errors="replace") if (folder / name).exists() else "" for name in ("stdout", "stderr")
    )
    return Ended(process.exitcode or 0, time.monotonic() - began, stdout, stderr)


class Yard:
    """The inputs, and for each command what an undisturbed run made of them, and how long that took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "inputs").mkdir()
        self.inputs: Inputs = write_inputs(folder / "inputs")
        self._undisturbed: dict[str, tuple[Path, Ended]] = {}

    def words(self, target: Target, room: Path) -> list[str]:
        """The command that writes into `room`/out."""
        return target.words_for(self.inputs, room / "out")

    def room(self, name: str) -> Path:
        """A fresh folder: out for the outputs, tmp for temporary files, and beside them what was printed."""
        room = self.folder / name
        (room / "out").mkdir(parents=True)
        return room

    def undisturbed(self, name: str) -> tuple[Path, Ended]:
        """(outputs, how it went) of a run that nobody ended; the shorter of two, because the first warms up."""
        if name not in self._undisturbed:
            target, runs = TARGETS[name], []
            for i in range(2):
                room = self.room(f"undisturbed-{len(self._undisturbed)}-{i}")
                ended = run_once(name, self.words(target, room), room)
                if ended.code:
                    raise RuntimeError(f"{name}: {ended.stderr}")
                runs.append((room / "out", ended))
            self._undisturbed[name] = min(runs, key=lambda run: run[1].seconds)
        return self._undisturbed[name]

    def trial(self, number: int, name: str, sent: signal.Signals, moment_s: float) -> KillOutcome:
        """End the command, look at what it left, and run it again."""
        target, (reference, undisturbed) = TARGETS[name], self.undisturbed(name)
        room = self.room(f"trial-{number}")
        words, old = self.words(target, room), room / "old"
        if target.replaces is not None:
            first = run_once(name, [*words, *target.replaces], room)
            assert first.code == 0, first.stderr
            shutil.copytree(room / "out", old)
            words += target.replace
        ended = run_once(name, words, room, sent, moment_s)
        look = _Look(target, reference, room / "out", old)
        what, faults = look.after(sent, ended)
        if sent != signal.SIGKILL and (left := list((room / "tmp").glob("yarn-edge-*"))):
            faults.append(f"left {left[0].name} in the folder of temporary files")
        shutil.rmtree(room / "tmp")
        again = run_once(name, [*self.words(target, room), *look.words_again()], room)
        faults += look.again(again, undisturbed)
        if not faults:
            shutil.rmtree(room)
        return KillOutcome(number, name, sent, moment_s, what, tuple(faults))


class _Look:
    """What is in the folder of outputs, compared with the undisturbed run's (`reference`) and with the replaced ones (`old`)."""

    def __init__(self, target: Target, reference: Path, out: Path, old: Path) -> None:
        self.target, self.reference, self.out, self.old = target, reference, out, old
        self.final = _files(reference)

    def whole(self, name: str) -> bool:
        """Whether the file of this name is what an undisturbed run writes."""
        same: Callable[[Path, Path], bool] = self.target.same.get(Path(name).suffix, same_bytes)
        try:
            return same(self.out / name, self.reference / name)
        except Exception:  # half of a file raises anything
            return False

    def after(self, sent: signal.Signals, ended: Ended) -> tuple[str, list[str]]:
        """(what the signal left, what it must not leave)."""
        faults = ending_faults(sent, ended)
        state: dict[str, str] = {}
        for name in _files(self.out):
            state[name] = self._state(name)
            if state[name] == "half" or (state[name] in ("partial", "set aside") and sent != signal.SIGKILL):
                faults.append(f"left {name}: {state[name]}")
        finals = {state.get(name, "absent") for name in self.final if self._differs_from_old(name)}
        if sent != signal.SIGKILL and self.old.exists() and len(finals) > 1:
            faults.append(f"left outputs of two runs: {state}")
        if ended.code == 0:
            return "finished before", faults
        for what in ("partial", "unfinished", "whole"):
            if what in state.values():
                return f"{what} left", faults
        return "nothing left", faults

    def _differs_from_old(self, name: str) -> bool:
        return not (self.old / name).exists() or not same_bytes(self.old / name, self.reference / name)

    def _state(self, name: str) -> str:
        read = self.target.unfinished.get(Path(name).suffix)
        if name.partition("/")[0].endswith(".partial") or name.endswith(".partial"):
            return "partial"
        if name.endswith(".replaced"):
            return "set aside"
        if self.old.exists() and (self.old / name).exists() and same_bytes(self.old / name, self.out / name):
            return "old"
        if name in self.final and self.whole(name):
            return "whole"
        if read is None:
            return "half"
        try:
            read(self.out / name)
        except Exception:
            return "half"
        return "unfinished"

    def words_again(self) -> tuple[str, ...]:
        """Words that the next run needs: to continue, or to replace what is there."""
        there = _files(self.out)
        if any(Path(name).suffix in self.target.unfinished and Path(name).suffix != ".cache" for name in there):
            return self.target.resume
        return self.target.replace if set(there) & set(self.final) else ()

    def again(self, ended: Ended, undisturbed: Ended) -> list[str]:
        """What is wrong with the run after the one that was ended."""
        if ended.code:
            return [f"the next run ended with {ended.code}: {ended.stderr[-300:]}"]
        there = [
            name for name in _files(self.out) if not name.endswith(".replaced")
        ]  # kill -9 while shards are replaced
        faults = [f"the next run left {name}" for name in there if name not in self.final]
        faults += [f"the next run's {name} differs" for name in self.final if not self.whole(name)]
        if self.target.prints_result and ended.stdout != undisturbed.stdout:
            faults.append(f"the next run prints {ended.stdout[:100]!r}")
        return faults


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def ending_faults(sent: signal.Signals, ended: Ended) -> list[str]:
    """What is wrong with how a process ended: by the signal, with 128 + its number and one line, or as if it had not come."""
    faults = []
    if ended.code not in (0, -sent) and (sent == signal.SIGKILL or ended.code != 128 + sent):
        faults.append(f"ended with {ended.code}: {ended.stderr[-300:]}")
    if ended.code == 128 + sent and f"ended by signal {int(sent)}" not in ended.stderr.splitlines()[-1]:
        faults.append(f"says {ended.stderr[-300:]!r}")
    if "Traceback" in ended.stderr or "Exception ignored" in ended.stderr:
        faults.append(f"prints a traceback: {ended.stderr[-1000:]}")
    return faults


def kill_all(yard: Yard, names: Sequence[str], n_runs: int, seed: int, workers: int) -> list[KillOutcome]:
    """`n_runs` runs, commands and signals in turn, moments at random."""
    for name in names:
        yard.undisturbed(name)

    def one(number: int) -> KillOutcome:
        name, sent = names[number % len(names)], SIGNALS[number // len(names) % len(SIGNALS)]
        moment_s = random.Random(f"{seed}-{number}").uniform(0, yard.undisturbed(name)[1].seconds)
        return yard.trial(number, name, sent, moment_s)

    with ThreadPoolExecutor(workers) as pool, bar("Ending commands", n_runs) as advance:
        outcomes = []
        for outcome in pool.map(one, range(n_runs)):
            outcomes.append(outcome)
            advance(1)
    return outcomes


def table(yard: Yard, outcomes: Sequence[KillOutcome]) -> str:
    """Markdown: a line for each command and signal, with what was left."""
    kinds = ["finished before", "nothing left", "whole left", "unfinished left", "partial left"]
    lines = [f"| command | signal | runs | {' | '.join(kinds)} | faults |", "|---" * (len(kinds) + 4) + "|"]
    for name in dict.fromkeys(outcome.target for outcome in outcomes):
        for sent in SIGNALS:
            own = [o for o in outcomes if (o.target, o.signal) == (name, sent)]
            counts = Counter(o.what for o in own)
            cells = [str(counts[kind]) for kind in kinds]
            seconds = yard.undisturbed(name)[1].seconds
            faulty = sum(bool(o.faults) for o in own)
            lines.append(f"| {name} ({seconds:.2f} s) | {sent.name} | {len(own)} | {' | '.join(cells)} | {faulty} |")
    return "".join(f"{line}\n" for line in lines)


def main() -> int:
    """End commands, print the record, 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Every writing command, ended at random moments and run again.")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", action="append", choices=TARGETS, help="a command; may be repeated (default: all)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="yarn-edge-kills-"))
    start = time.monotonic()
    yard = Yard(folder)
    outcomes = kill_all(yard, args.only or list(TARGETS), args.runs, args.seed, args.workers)
    failed = [outcome for outcome in outcomes if outcome.faults]
    out = sys.stdout.write
    out(f"{args.runs} runs from seed {args.seed} in {time.monotonic() - start:.0f} s, {len(failed)} with faults\n\n")
    out(table(yard, outcomes))
    for o in failed[:50]:
        out(f"run {o.number}: {o.target}, {o.signal.name} after {o.moment_s:.3f} s: {'; '.join(o.faults)}\n")
    if failed:
        out(f"what they left is in {folder}\n")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
