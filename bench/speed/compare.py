"""`yarn-edge bench compare A.json B.json`: is B faster, by how much, and can these samples tell?

Rows are matched by their configuration. The ratio is that of the medians. Its interval and the verdict are those of the exact
Mann-Whitney test on the logarithms of the samples (Hodges and Lehmann's interval: the ratios that the test would not reject),
which assumes no distribution. It knows the spread within each run, not what changed on the machine between them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.report.deliver import check_outputs, deliver
from yarn_edge.report.report import Bars, Cell, Line, Picture, Report, Table

from .rank_test import LEVEL, geometric_mean, not_rejected, null_distribution, p_value
from .timed_rows import SETTINGS, TimedRow, read_rows

FASTER, SLOWER, SAME, FEW = "faster", "slower", "no difference shown", "too few samples"


@dataclass(frozen=True)
class Pair:
    """One configuration in both files. a, b: tokens per second; ratio: b / a; low, high: its 95 % interval, None if too few samples."""

    row: TimedRow
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    p: float
    verdict: str

    @classmethod
    def of(cls, a: TimedRow, b: TimedRow) -> Pair:
        """Compare the samples of two rows."""
        times = [np.array(row.samples_ns, dtype=np.float64) for row in (a, b)]
        speeds = [row.n * 1e9 / statistics.median(row.samples_ns) for row in (a, b)]
        steps = np.sort((np.log(times[0])[:, None] - np.log(times[1])[None, :]).ravel())  # log of B's speed over A's
        p = p_value(steps, len(times[0]), len(times[1]))
        interval = not_rejected(steps, null_distribution(len(times[0]), len(times[1])))
        low, high = (None, None) if interval is None else tuple(math.exp(end) for end in interval)
        verdict = FEW if interval is None else SAME if p >= LEVEL else FASTER if float(np.median(steps)) > 0 else SLOWER
        return cls(a, speeds[0], speeds[1], speeds[1] / speeds[0], low, high, p, verdict)

    def as_json(self) -> dict[str, Any]:
        """With the names of --json."""
        return self.row.as_json() | {
            "a_tok_per_s": self.a,
            "b_tok_per_s": self.b,
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "p": self.p,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class SpeedComparison:
    """Two files compared: pairs in A's order, and the rows that only one of them has."""

    a: Path
    b: Path
    pairs: list[Pair]
    only_a: list[TimedRow]
    only_b: list[TimedRow]

    @classmethod
    def of(cls, a: Path, b: Path) -> SpeedComparison:
        """Read and match two files. Raises YarnEdgeError."""
        return cls(a, b, *matched(read_rows(a), read_rows(b)))

    @property
    def mean(self) -> float | None:
        """Geometric mean of all ratios, None without pairs."""
        return geometric_mean(p.ratio for p in self.pairs) if self.pairs else None

    @property
    def mean_by_test(self) -> dict[str, float]:
        """Geometric mean of the ratios of each test."""
        by_test: dict[str, list[float]] = {}
        for p in self.pairs:
            by_test.setdefault(p.row.test, []).append(p.ratio)
        return {test: geometric_mean(ratios) for test, ratios in by_test.items()}

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "rows": [p.as_json() for p in self.pairs],
            "geometric_mean": self.mean,
            "geometric_mean_by_test": self.mean_by_test,
            "only_in_a": [row.as_json() for row in self.only_a],
            "only_in_b": [row.as_json() for row in self.only_b],
        }

    def report(self) -> Report:
        """One line for each pair, the means, and what has no pair."""
        sentences = [f"A: {self.a}", f"B: {self.b}"]
        if self.mean is None:
            sentences.append("The files have no configuration in common.")
        else:
            means = ", ".join(f"{test} {ratio:.3f}" for test, ratio in self.mean_by_test.items())
            sentences.append(f"geometric mean of B / A: {self.mean:.3f} ({means})")
        for side, rows in (("A", self.only_a), ("B", self.only_b)):
            sentences += [f"only in {side}: {row.label()}" for row in rows]
        tables = (self._table(),) if self.pairs else ()
        return Report("Speed compared", tuple(sentences), tables, (self._picture(),) if self.pairs else ())

    def _table(self) -> Table:
        differing = [key for key in SETTINGS if len({p.row.setting(key) for p in self.pairs}) > 1]
        several = len({p.row.model for p in self.pairs}) > 1
        rows: list[tuple[Cell, ...]] = []
        for p in self.pairs:
            model = (p.row.model,) if several else ()
            settings = (p.row.setting(key) for key in differing)
            rows.append((p.row.name(), *model, *settings, p.a, p.b, p.ratio, p.low, p.high, p.p, p.verdict))
        named = (*(("model",) if several else ()), *differing)
        columns = ("test", *named, "A tok/s", "B tok/s", "B / A", "low", "high", "p", "verdict")
        note = (
            "low, high: 95 % interval of the ratio; p: exact Mann-Whitney test, which knows only the noise within a run"
        )
        return Table("", columns, tuple(rows), note=note, digits=4)

    def _picture(self) -> Picture:
        lines = tuple(Line(p.row.label(), (0.0,), (p.ratio,)) for p in self.pairs)
        return Bars("B / A", "", "tokens per second of B / those of A", lines)


def matched(a: Sequence[TimedRow], b: Sequence[TimedRow]) -> tuple[list[Pair], list[TimedRow], list[TimedRow]]:
    """(pairs in A's order, rows only in A, rows only in B).

    If each file is of one model, the models may differ: so two quantizations can be compared.
    """
    several = any(len({row.model for row in rows}) > 1 for rows in (a, b))
    ours, theirs = ({row.key(several): row for row in rows} for rows in (a, b))
    pairs = [Pair.of(row, theirs[key]) for key, row in ours.items() if key in theirs]
    alone = [[row for key, row in one.items() if key not in other] for one, other in ((ours, theirs), (theirs, ours))]
    return pairs, alone[0], alone[1]


_OURS = ("models", "json", "report", "plot", "force", "help", "quiet", "debug")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge bench compare`. Returns 1 if the files have no configuration in common."""
    given = [name for name, usual in args.usual.items() if name not in _OURS and getattr(args, name, usual) != usual]
    if given:
        raise YarnEdgeError(f"--{given[0].replace('_', '-')} is for measuring: bench compare reads two files")
    if len(args.models) != 3:
        raise YarnEdgeError(f"bench compare takes two files, A.json and B.json, not {len(args.models) - 1}")
    check_outputs(args)
    comparison = SpeedComparison.of(*map(Path, args.models[1:]))
    deliver(args, comparison.as_json(), comparison.report())
    return int(not comparison.pairs)
