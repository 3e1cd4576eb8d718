"""One run of `yarn-edge bench`: its rows and where they were measured; as JSON, table, pictures and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.progress import note
from yarn_edge.report.report import Bars, Bound, Cell, Chart, Line, Picture, Report, Table
from yarn_edge.writer import write_file

from .configuration import Configuration
from .results import OK, SpeedRow

Column = tuple[str, Callable[[SpeedRow], Cell]]
_PICTURES = (("Reading", ("pp", "ttft")), ("Generating", ("tg", "tg+s")))


def _configured(value: Callable[[Configuration], Cell]) -> Callable[[SpeedRow], Cell]:
    return lambda row: None if row.configuration is None else value(row.configuration)


_MODEL: Column = ("model", lambda row: row.model)
_KV: Column = ("kv", _configured(lambda c: c.kv_type))
_THREADS: Column = ("threads", _configured(lambda c: c.threads))
_ATTENTION = "attention"
# Shown if they differ from row to row.
_IF_DIFFERENT: tuple[Column, ...] = (
    ("batch", _configured(lambda c: c.n_batch)),
    ("ubatch", _configured(lambda c: c.n_ubatch)),
    (_ATTENTION, _configured(lambda c: c.attention)),
)


@dataclass(frozen=True)
class SpeedOutcome:
    """All rows of a run, complete or not. machine: `machine_state` before it; read_bytes_per_s: memory bandwidth by threads."""

    rows: list[SpeedRow]
    environment: Mapping[str, str]
    machine: Mapping[str, Any]
    read_bytes_per_s: Mapping[int, float]
    complete: bool

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        env = {**self.environment, **self.machine, "read_bytes_per_s": self.read_bytes_per_s}
        return {"env": env, "rows": [row.as_json() for row in self.rows], "complete": self.complete}

    def report(self) -> Report:
        """The table with one line for each row, and pictures over depth or as bars."""
        differing = differing_columns(self.rows)
        summary = []
        if self.machine.get("busy"):
            summary.append(f"At the start {self.machine['busy']}.")
        if not self.complete:
            summary.append("Incomplete: stopped before everything was measured.")
        pictures = tuple(_pictures(self.rows, differing))
        return Report("Speed", tuple(summary), (self._table(differing),), pictures)

    def _table(self, differing: Sequence[Column]) -> Table:
        columns: list[Column] = [_MODEL] if _MODEL in differing else []
        columns += [("backend", lambda row: row.backend), ("test", lambda row: row.name()), _KV, _THREADS]
        columns.append((_ATTENTION, lambda row: row.loaded.attention_used if row.loaded else None))
        columns += [column for column in differing if column is not _MODEL and column[0] != _ATTENTION]
        columns += [
            ("tok/s", lambda row: row.times.tok_per_s if row.times else None),
            ("±", lambda row: row.times.stddev if row.times and len(row.times.samples_ns) > 1 else None),
            ("% of ceiling", lambda row: None if row.fraction is None else round(100 * row.fraction)),
            ("peak MiB", _peak_mib),
        ]
        if any(row.test == "ttft" for row in self.rows):
            columns.append(
                ("first token s", lambda row: row.times.seconds if row.times and row.test == "ttft" else None)
            )
        columns.append(("rope", _rope))
        if any(row.status != OK for row in self.rows):
            columns.append(("status", lambda row: row.status))
        rows = tuple(tuple(value(row) for _name, value in columns) for row in self.rows)
        return Table("", tuple(name for name, _value in columns), rows, note=self._ceiling_note(), digits=4)

    def _ceiling_note(self) -> str:
        speeds = ", ".join(
            f"{speed / 1e9:.1f} GB/s with {n} thread{'s' * (n > 1)}"
            for n, speed in sorted(self.read_bytes_per_s.items())
        )
        return f"ceiling of tg: memory reads {speeds}; each token needs weights and cache once" if speeds else ""


def differing_columns(rows: Sequence[SpeedRow]) -> list[Column]:
    """The model, if there are several, and the columns of _IF_DIFFERENT in which tests differ."""
    several = len({row.model for row in rows}) > 1
    tests = [row for row in rows if row.test is not None]
    others = [(name, value) for name, value in _IF_DIFFERENT if len({value(row) for row in tests}) > 1]
    return [*([_MODEL] if several else []), *others]


def _peak_mib(row: SpeedRow) -> int | None:
    peak = row.times.peak_rss_bytes if row.times else None
    return None if peak is None else round(peak / 2**20)


def _rope(row: SpeedRow) -> str | None:
    if row.rope is None:
        return None
    return row.rope.status if row.rope.value is None else f"{row.rope.status} {row.rope.value:.2g}"


def _pictures(rows: Sequence[SpeedRow], differing: Sequence[Column]) -> Iterable[Picture]:
    """Curves over depth if there are several depths, else bars. Reading and generating differ in scale: a picture for each."""
    measured = [row for row in rows if row.times is not None]
    columns = [
        (name, value) for name, value in (*differing, _KV, _THREADS) if len({value(row) for row in measured}) > 1
    ]
    for title, tests in _PICTURES:
        those = [row for row in measured if row.test in tests]
        depths = {row.depth for row in those if row.test != "ttft"}
        if len(depths) > 1:
            yield Chart(title, "depth (tokens in the cache)", "tokens per second", tuple(_lines(those, columns)))
        elif those:
            bars = tuple(
                Line(_label(row, columns, with_depth=True), (0.0,), (row.times.tok_per_s,), (row.times.stddev,))
                for row in those
                if row.times is not None
            )
            yield Bars(title, "", "tokens per second", bars, bounds=tuple(row.ceiling_tok_per_s for row in those))


def _lines(rows: Sequence[SpeedRow], columns: Sequence[Column]) -> Iterable[Line]:
    groups: dict[str, list[SpeedRow]] = {}
    for row in sorted(rows, key=lambda row: row.depth):
        groups.setdefault(_label(row, columns), []).append(row)
    for label, group in groups.items():
        points = [(float(row.depth), row.times.tok_per_s, row.times.stddev) for row in group if row.times is not None]
        x, y, error = zip(*points, strict=True)
        yield Line(label, x, y, error)
    ceilings: dict[tuple[tuple[float, float], ...], str] = {}
    for label, group in groups.items():
        bounds = tuple((float(row.depth), row.ceiling_tok_per_s) for row in group if row.ceiling_tok_per_s)
        if len(bounds) > 1:  # tg and tg+s share theirs
            ceilings.setdefault(bounds, f"ceiling of {label}")
    for bounds, label in ceilings.items():
        yield Bound(label, tuple(x for x, _y in bounds), tuple(y for _x, y in bounds))


def _label(row: SpeedRow, columns: Sequence[Column], with_depth: bool = False) -> str:
    words = [_LABELS.get(name, str)(value(row)) for name, value in columns]
    return " ".join([row.backend, *words, row.name(with_depth)])


# column -> how its value is written in a label
_LABELS: dict[str, Callable[[Any], str]] = {
    "model": lambda value: Path(value).name,
    "threads": lambda value: f"{value} threads",
}


def write_csv(rows: Sequence[SpeedRow], path: Path, force: bool) -> None:
    """Write all rows, a column for each key; lists and objects as JSON. Whole or not at all: YarnEdgeError."""
    records = [row.as_json() for row in rows]
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow([_field(record.get(key)) for key in columns])
    write_file(path, text.getvalue().encode("utf-8", errors="surrogateescape"), force)
    note(f"{path}: the rows")


def _field(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
