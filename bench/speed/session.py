"""A run of `yarn-edge bench` over its configurations: rows as the children tell them, ceilings, the progress bar."""

from __future__ import annotations

from collections.abc import Mapping

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.progress import Advance, note
from yarn_edge.runtime import ggml

from ..scoring.variants import Variant
from .ceilings import Ceilings, bytes_per_token
from .process import Event, run_child
from .rows import (
    GENERATED_COST,
    Configuration,
    Row,
    absent,
    buffer_places,
    configured,
    device_bytes,
    empty_row,
    measured,
    name_of,
)


class SpeedSession:
    """`rows` holds what is known so far, also when it was stopped. files: by the MODEL of the command line."""

    def __init__(self, files: Mapping[str, tuple[Variant, GGUFFile]], timeout_s: float) -> None:
        self.files, self.timeout_s = files, timeout_s
        self.rows: list[Row] = []
        self.ceilings = Ceilings()
        others = sorted({d.backend for d in ggml.devices()} - {"CPU"})
        self.backends = ",".join(others) or "CPU"  # llama-bench's word for the build

    def absent(self, model: str, backend: str, status: str, remedy: str) -> None:
        """A row for a backend that is not there."""
        self.rows.append(absent(model, str(self.files[model][0].path), backend, self.backends, status, remedy))

    def measure(self, configuration: Configuration, advance: Advance) -> None:
        """Run one configuration in its child. Rows of tests that came to their end stay also where this is stopped."""
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
        """Ceilings, by the best bandwidth that was seen in the whole run."""
        for row in self.rows:
            if row["bytes_per_token"] is None or row["backend"] != "cpu":
                continue
            ceiling = self.ceilings.tok_per_s(row["bytes_per_token"], row["n_threads"])
            row["ceiling_tok_per_s"] = ceiling
            row["fraction"] = row["tok_per_s"] / ceiling if ceiling and row["tok_per_s"] else None


class _Run:
    """One child's events, as rows by the name of the test."""

    def __init__(self, configuration: Configuration, session: SpeedSession, advance: Advance) -> None:
        variant, self.file = session.files[configuration.model]
        base = configured(configuration, str(variant.path), session.backends)
        self.rows = {name: empty_row(base, name, n, configuration.depth) for name, n in configuration.tests}
        self.progress = _Progress(configuration, advance)

    def seen(self, event: Event) -> None:
        kind = event.pop("event")
        if kind == "step":
            self.progress.step(event)
        elif kind == "loaded":
            for row in self.rows.values():
                row.update(_placed(event))
        elif kind == "rope":
            for row in self.rows.values():
                row["rope_check"] = event
        elif kind == "test":
            name = event["test"]
            self.rows[name] = row = measured(self.rows[name], event["samples_ns"])
            row["peak_rss_bytes"] = event["peak_rss_bytes"]
            if name in ("tg", "tg+s"):  # the cache as it is in the middle of the test
                row["bytes_per_token"] = bytes_per_token(self.file, row["depth"] + row["n"] // 2, row["type_k"])

    def done(self) -> list[Row]:
        return [row for row in self.rows.values() if row["status"] == "ok"]

    def failed(self, reason: str) -> list[Row]:
        return [row | {"status": f"failed: {reason}"} for row in self.rows.values() if row["status"] != "ok"]


def _placed(event: Event) -> Row:
    """Columns of a row from what was loaded where."""
    buffers = [(str(where), str(what), int(n_bytes)) for where, what, n_bytes in event["buffers"]]
    on_gpu = event["n_gpu_layers"] != 0
    return {key: value for key, value in event.items() if key != "buffers"} | {
        "weights_on": buffer_places(buffers, "model"),
        "cache_on": buffer_places(buffers, "KV", "RS"),
        "device_memory_bytes": device_bytes(buffers, event["device"]) if on_gpu else None,
    }


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
        name = name_of({"test": what, "n": tests[what], "depth": c.depth}) if what in tests else what
        turn = f" {event['number']}/{c.samples}" if "number" in event else ""
        self.advance(0, f"{c.backend} {c.kv_type} {name}{turn}")

    def end(self) -> None:
        """Whatever became of it, its part is over."""
        self._done(self.left)

    def _done(self, amount: float) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        self.advance(amount)
