"""Units on workers: as many at a time as there are workers, each again on another one if its worker dies.

The order in which results come is that of the workers; whoever adds them up puts them into the order of the units first.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import replace

from yarn_edge.errors import YarnEdgeError
from yarn_edge.jobs.crew import Crew
from yarn_edge.jobs.results import ResultFolder
from yarn_edge.jobs.unit import Attempt, Unit, UnitResult, attempt, software
from yarn_edge.progress import Advance, bar, note

MOST_DEATHS = 3  # of workers by one unit: then it is the unit

_Call = list[int]  # indices of units


def run_units(units: Sequence[Unit], crew: Crew, label: str, take: Callable[[int, UnitResult], None]) -> None:
    """Compute the units. take: gets (index of the unit, its result) as they are finished; first those that `crew.results` holds.

    Raises YarnEdgeError for a unit that fails, or whose worker died MOST_DEATHS times. However it ends, no worker is left behind.
    """
    folder = ResultFolder(crew.results)
    left = []
    for index, unit in enumerate(units):
        found = folder.get(unit)
        if found is None:
            left.append(index)
        else:
            take(index, found)
    if len(left) < len(units):
        note(f"{crew.results}: has the results of {len(units) - len(left)} of {len(units)} units")
    if not left:
        return

    def finished(index: int, result: UnitResult) -> None:
        folder.put(units[index], result)
        take(index, result)

    crew = replace(crew, n_workers=min(crew.n_workers, len(left)))
    total = sum(units[index].cost for index in left)
    with bar(f"{label}, {crew.n_workers} {crew.place} workers", total, "tokens") as advance:
        run = _Run(units, crew, advance)
        executor = crew.open()
        try:
            run.go(executor, left, finished)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
        executor.shutdown()
    run.tell()


def calls_of(left: Sequence[int], n_workers: int, per_worker: int | None) -> list[list[int]]:
    """The units in calls, in their order. per_worker: calls for each worker; None for a call per unit."""
    if per_worker is None:
        return [[index] for index in left]
    size = -(-len(left) // (n_workers * per_worker))
    return [list(left[at : at + size]) for at in range(0, len(left), size)]


class _Run:
    """The state of one run: what is on its way, and which workers did what."""

    def __init__(self, units: Sequence[Unit], crew: Crew, advance: Advance) -> None:
        self.units, self.crew, self.advance = units, crew, advance
        self.by_worker: Counter[str] = Counter()
        self.deaths: Counter[int] = Counter()
        self.began = time.perf_counter()

    def go(self, executor: Executor, left: Sequence[int], finished: Callable[[int, UnitResult], None]) -> None:
        """Submit the units and hand on the results as they come."""
        todo = deque(calls_of(left, self.crew.n_workers, self.crew.calls))
        running: dict[Future[list[Attempt]], _Call] = {}
        while todo or running:
            while todo and len(running) < self.crew.n_workers:
                call = todo.popleft()
                running[executor.submit(attempt, [self.units[i] for i in call], software())] = call
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                call = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    todo.extendleft([i] for i in reversed(self._died(call, error)))
                    continue
                for index, attempted in zip(call, future.result(), strict=True):
                    result = attempted.unwrap()
                    self.by_worker[attempted.worker] += 1
                    self.advance(self.units[index].cost, f"{self.by_worker.total()}/{len(left)}, {attempted.worker}")
                    finished(index, result)

    def _died(self, call: _Call, error: BrokenExecutor) -> _Call:
        """The units to run again."""
        self.deaths.update(call)
        first = self.units[call[0]].label
        if any(self.deaths[index] >= MOST_DEATHS for index in call):
            raise YarnEdgeError(f"{first}: {MOST_DEATHS} workers died computing it, the last one so: {error}")
        note(f"a worker died computing {first} ({error}): another one computes it again")
        return call

    def tell(self) -> None:
        """Say what each worker did."""
        shares = ", ".join(f"{worker} {n}" for worker, n in sorted(self.by_worker.items()))
        seconds = time.perf_counter() - self.began
        note(f"{self.by_worker.total()} units in {seconds:.1f} s by {len(self.by_worker)} workers: {shares}")
