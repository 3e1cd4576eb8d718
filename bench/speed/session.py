"""A run of `yarn-edge bench` over its configurations: rows from what the children report, ceilings, the progress bar."""

from __future__ import annotations

from collections.abc import Mapping

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.progress import Advance, note
from yarn_edge.runtime import ggml

from ..scoring.variants import Variant
from .ceilings import Ceilings, bytes_per_token
from .configuration import GENERATED_COST, Configuration, name_of_test
from .process import Event, run_child
from .results import OK, LoadedModel, RopeCheck, SpeedRow, TimedRuns, empty_rows


class SpeedSession:
    """`rows` holds what is known so far, also after an interruption. files: by the MODEL of the command line."""

    def __init__(self, files: Mapping[str, tuple[Variant, GGUFFile]], timeout_s: float) -> None:
        self.files, self.timeout_s = files, timeout_s
        self.rows: list[SpeedRow] = []
        self.ceilings = Ceilings()
        others = sorted({d.backend for d in ggml.devices()} - {"CPU"})
        self.build = ",".join(others) or "CPU"  # as llama-bench names it

    def absent(self, model: str, backend: str, status: str, remedy: str) -> None:
        """Add a row for a backend that is not available."""
        path = self.files[model][0].path
        self.rows.append(SpeedRow(model, path, backend, self.build, status=status, remedy=remedy))

    def measure(self, configuration: Configuration, advance: Advance) -> None:
        """Run one configuration in its child. If the run is stopped, the rows of tests that were finished stay."""
        self._look(configuration)
        run = _Run(configuration, self, advance)
        try:
            reason = run_child(configuration.request(), self.timeout_s, run.seen)
        finally:
            self.rows += run.done()
            run.progress.end()
        self._look(configuration)
        if reason is not None:
            self.rows += run.failed(reason)
            note(f"{configuration.name()}: {reason}")

    def _look(self, configuration: Configuration) -> None:
        if configuration.backend == "cpu":
            try:
                self.ceilings.look(configuration.threads)
            except YarnEdgeError as error:
                note(f"no ceiling: {error}")

    def finish(self) -> None:
        """Compute the ceilings from the best bandwidth that was seen in the whole run."""
        for row in self.rows:
            if row.configuration is not None and row.bytes_per_token is not None and row.backend == "cpu":
                row.ceiling_tok_per_s = self.ceilings.tok_per_s(row.bytes_per_token, row.configuration.threads)


class _Run:
    """The events of one child, as rows by the name of the test."""

    def __init__(self, configuration: Configuration, session: SpeedSession, advance: Advance) -> None:
        variant, self.file = session.files[configuration.model]
        self.configuration = configuration
        self.rows = empty_rows(configuration, variant.path, session.build)
        self.progress = _Progress(configuration, advance)

    def seen(self, event: Event) -> None:
        kind = event.pop("event")
        if kind == "step":
            self.progress.step(event)
        elif kind == "loaded":
            loaded = LoadedModel.of(event)
            for row in self.rows.values():
                row.loaded = loaded
        elif kind == "rope":
            check = RopeCheck(**event)
            for row in self.rows.values():
                row.rope = check
        elif kind == "test":
            row = self.rows[event["test"]]
            row.times, row.status = TimedRuns(row.n, tuple(event["samples_ns"]), event["peak_rss_bytes"]), OK
            if row.test in ("tg", "tg+s"):  # the cache as it is in the middle of the test
                c = self.configuration
                row.bytes_per_token = bytes_per_token(self.file, c.depth + row.n // 2, c.kv_type)

    def done(self) -> list[SpeedRow]:
        return [row for row in self.rows.values() if row.status == OK]

    def failed(self, reason: str) -> list[SpeedRow]:
        rows = [row for row in self.rows.values() if row.status != OK]
        for row in rows:
            row.status = f"failed: {reason}"
        return rows


class _Progress:
    """A configuration's part of the progress bar: what is measured now, and how much of its work is done."""

    def __init__(self, configuration: Configuration, advance: Advance) -> None:
        self.configuration, self.advance = configuration, advance
        self.left, self.begun = configuration.cost, 0.0
        advance(0, f"{configuration.name()}: loading")

    def step(self, event: Event) -> None:
        """The child begins a step, so the one before is done."""
        c, what = self.configuration, str(event["what"])
        costs = {"warming up": c.n_prompt, "pp": c.n_prompt, "tg": GENERATED_COST * c.n_gen}
        self._done(self.begun + event.get("tokens", 0))
        self.begun = costs.get(what.removesuffix("+s"), 0.0)
        tests = dict(c.tests)
        name = name_of_test(what, tests[what], c.depth) if what in tests else what
        turn = f" {event['number']}/{c.samples}" if "number" in event else ""
        self.advance(0, f"{c.backend} {c.kv_type} {name}{turn}")

    def end(self) -> None:
        """However it ended, its part is over."""
        self._done(self.left)

    def _done(self, amount: float) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        self.advance(amount)
