"""`yarn-edge bench compare A.json B.json`: is B faster, by how much, and can these samples tell?

Rows are matched by their configuration. The ratio is that of the medians. Its interval and the verdict are those of the exact
Mann-Whitney test on the logarithms of the samples (Hodges and Lehmann's interval: the ratios that the test would not reject),
which assumes no distribution. It knows the spread within each run, not what changed on the machine between them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.report.deliver import check_outputs, deliver
from yarn_edge.report.report import Bars, Line, Picture, Report, Table

from .rows import name_of

LEVEL = 0.05
MAX_BYTES = 1 << 30
MAX_SAMPLES = 1000
MAX_EXACT = 10_000  # n * m of the exact distribution; above, the normal one is as good
FASTER, SLOWER, SAME, FEW = "faster", "slower", "no difference shown", "too few samples"
# What makes a row's configuration, besides its model and test.
KEYS = ("backend", "type_k", "type_v", "flash_attn", "n_batch", "n_ubatch", "n_threads")


@dataclass(frozen=True)
class Pair:
    """One configuration in both files. ratio: B / A of tokens per second; low, high: its 95 % interval, None for too few samples."""

    row: Mapping[str, Any]
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    p: float
    verdict: str


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of `bench --json`, or of llama-bench -o json as the same. Raises YarnEdgeError where it is neither."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
        found = json.loads(data.decode("utf-8", errors="surrogateescape"))
    except OSError as error:
        raise os_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise YarnEdgeError(f"{path}: is no JSON: {one_line(str(error), 120)}") from error
    rows = [_from_llama_bench(row) for row in found] if isinstance(found, list) else _rows_of(found)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise YarnEdgeError(f"{path}: has no rows of `yarn-edge bench --json` or `llama-bench -o json`")
    for number, row in enumerate(rows, 1):
        problem = _problem(row)
        if problem:
            raise YarnEdgeError(f"{path}: row {number}: {problem}")
    return rows


def _rows_of(found: Any) -> list[Any]:
    rows = found.get("rows") if isinstance(found, dict) else None
    return rows if isinstance(rows, list) else []


def _from_llama_bench(row: Any) -> Any:
    """Its rows have the same columns; what we add to them follows from those."""
    if not isinstance(row, dict) or not {"n_prompt", "n_gen", "n_depth", "samples_ns", "backends"} <= row.keys():
        return None
    reads, writes = row["n_prompt"], row["n_gen"]
    test = "pp" if reads and not writes else "tg" if writes and not reads else "pg"
    backend = str(row["backends"]).split(",")[0].lower()
    named = {"model": row.get("model_filename"), "backend": {"mtl": "metal"}.get(backend, backend)}
    return row | named | {"test": test, "n": (reads or 0) + (writes or 0), "depth": row["n_depth"], "status": "ok"}


def _problem(row: Mapping[str, Any]) -> str:
    """What keeps a row from being compared, "" if nothing does."""
    if not isinstance(row.get("status"), str):
        return "has no status"
    if row["status"] != "ok":
        return ""
    missing = [key for key in ("test", "n", "depth", *KEYS) if not isinstance(row.get(key), (str, int))]
    if missing:
        return f"has no {missing[0]}"
    if not isinstance(row["n"], int) or row["n"] < 1 or not isinstance(row.get("model"), str):
        return "has no model, or no number of tokens"
    samples = row.get("samples_ns")
    numbers = isinstance(samples, list) and all(isinstance(t, (int, float)) and 0 < t < 1e18 for t in samples)
    if not samples or not numbers:
        return "has no samples_ns above 0"
    return f"has {len(samples)} samples, at most {MAX_SAMPLES} are compared" if len(samples) > MAX_SAMPLES else ""


def key_of(row: Mapping[str, Any], with_model: bool) -> tuple[Any, ...]:
    """Equal for rows that measure the same. with_model: the name of the file, too, for runs of several models."""
    name = Path(row["model"]).name if with_model else ""
    return (name, row["test"], row["n"], row["depth"], *(row[key] for key in KEYS))


def matched(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> tuple[list[Pair], list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(pairs in A's order, rows in A alone, rows in B alone), of the rows that were measured.

    Where each file is of one model the models may differ: so two quantizations can be compared.
    """
    fine = [[row for row in rows if row["status"] == "ok"] for rows in (a, b)]
    several = any(len({row["model"] for row in rows}) > 1 for rows in fine)
    ours, theirs = ({key_of(row, several): row for row in rows} for rows in fine)
    pairs = [pair(row, theirs[key]) for key, row in ours.items() if key in theirs]
    alone = [[row for key, row in one.items() if key not in other] for one, other in ((ours, theirs), (theirs, ours))]
    return pairs, alone[0], alone[1]


def pair(a: Mapping[str, Any], b: Mapping[str, Any]) -> Pair:
    """Compare the samples of two rows."""
    times = [np.array(row["samples_ns"], dtype=np.float64) for row in (a, b)]
    speeds = [row["n"] * 1e9 / statistics.median(row["samples_ns"]) for row in (a, b)]
    steps = np.sort((np.log(times[0])[:, None] - np.log(times[1])[None, :]).ravel())  # log of B's speed over A's
    p = p_value(steps, len(times[0]), len(times[1]))
    interval = not_rejected(steps, null_distribution(len(times[0]), len(times[1])))
    low, high = (None, None) if interval is None else tuple(math.exp(end) for end in interval)
    verdict = FEW if interval is None else SAME if p >= LEVEL else FASTER if float(np.median(steps)) > 0 else SLOWER
    return Pair(a, speeds[0], speeds[1], speeds[1] / speeds[0], low, high, p, verdict)


@lru_cache(maxsize=64)
def null_distribution(n: int, m: int) -> tuple[float, ...]:
    """P(U = 0), P(U = 1), … of Mann and Whitney's U for n and m samples where nothing differs, without ties.

    Exact for up to 100 samples each: the counts are the coefficients of the Gaussian binomial: prod (1 - q^(m + i)) / (1 - q^i), i to n.
    """
    size = n * m + 1
    if size > MAX_EXACT:
        normal = statistics.NormalDist(n * m / 2, math.sqrt(n * m * (n + m + 1) / 12))
        below = [normal.cdf(u + 0.5) for u in range(size)]
        return (below[0], *(b - a for a, b in itertools.pairwise(below)))
    counts = [1] + [0] * (size - 1)
    for i in range(1, n + 1):
        for at in range(size - 1, m + i - 1, -1):
            counts[at] -= counts[at - m - i]
        for at in range(i, size):
            counts[at] += counts[at - i]
    total = math.comb(n + m, n)
    return tuple(count / total for count in counts)


def p_value(steps: Sequence[float] | np.ndarray[Any, Any], n: int, m: int) -> float:
    """Two-sided, from all n * m differences; a tie counts for the side that shows less."""
    above, below = int(np.sum(np.asarray(steps) > 0)), int(np.sum(np.asarray(steps) < 0))
    smaller = n * m - max(above, below)  # ties with the smaller side
    return min(1.0, 2 * sum(null_distribution(n, m)[: min(smaller, n * m) + 1]))


def not_rejected(ordered: Sequence[float] | np.ndarray[Any, Any], null: Iterable[float]) -> tuple[float, float] | None:
    """The ends of what a two-sided rank test does not reject at LEVEL; None where it can reject nothing.

    ordered: the values in question, ascending; null: P(rank 0), P(rank 1), … of its statistic where nothing differs.
    """
    tail, inside = 0.0, 0
    for probability in null:
        tail += probability
        if 2 * tail >= LEVEL:
            break
        inside += 1
    return (float(ordered[inside - 1]), float(ordered[len(ordered) - inside])) if inside else None


def geometric_mean(ratios: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


def run(args: argparse.Namespace) -> int:
    """`yarn-edge bench compare`. Returns 1 where the files have no configuration in common."""
    given = [name for name, usual in args.usual.items() if name not in _OURS and getattr(args, name, usual) != usual]
    if given:
        raise YarnEdgeError(f"--{given[0].replace('_', '-')} is for measuring: bench compare reads two files")
    if len(args.models) != 3:
        raise YarnEdgeError(f"bench compare takes two files, A.json and B.json, not {len(args.models) - 1}")
    check_outputs(args)
    a, b = (Path(name) for name in args.models[1:])
    pairs, only_a, only_b = matched(read_rows(a), read_rows(b))
    data = as_json(a, b, pairs, only_a, only_b)
    deliver(args, data, report_of(data, pairs))
    return int(not pairs)


_OURS = ("models", "json", "report", "plot", "force", "help", "quiet", "debug")


def as_json(
    a: Path, b: Path, pairs: Sequence[Pair], only_a: Sequence[Mapping[str, Any]], only_b: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Every pair, the means, and what has no pair."""
    told = ("model", "test", "n", "depth", *KEYS)
    by_test: dict[str, list[float]] = {}
    for p in pairs:
        by_test.setdefault(p.row["test"], []).append(p.ratio)
    return {
        "a": str(a),
        "b": str(b),
        "rows": [
            {key: p.row.get(key) for key in told}
            | {
                "a_tok_per_s": p.a,
                "b_tok_per_s": p.b,
                "ratio": p.ratio,
                "low": p.low,
                "high": p.high,
                "p": p.p,
                "verdict": p.verdict,
            }
            for p in pairs
        ],
        "geometric_mean": geometric_mean([p.ratio for p in pairs]) if pairs else None,
        "geometric_mean_by_test": {test: geometric_mean(ratios) for test, ratios in by_test.items()},
        "only_in_a": [{key: row.get(key) for key in told} for row in only_a],
        "only_in_b": [{key: row.get(key) for key in told} for row in only_b],
    }


def report_of(data: Mapping[str, Any], pairs: Sequence[Pair]) -> Report:
    """One line for each pair, then the means and what has no pair."""
    differing = [key for key in ("model", *KEYS) if len({r[key] for r in data["rows"]}) > 1]
    columns = ("test", *differing, "A tok/s", "B tok/s", "B / A", "low", "high", "p", "verdict")
    rows = tuple(
        (
            name_of(r),
            *(r[key] for key in differing),
            r["a_tok_per_s"],
            r["b_tok_per_s"],
            r["ratio"],
            r["low"],
            r["high"],
            r["p"],
            r["verdict"],
        )
        for r in data["rows"]
    )
    said = [f"A: {data['a']}", f"B: {data['b']}"]
    if not rows:
        said.append("The files have no configuration in common.")
    else:
        means = ", ".join(f"{test} {ratio:.3f}" for test, ratio in data["geometric_mean_by_test"].items())
        said.append(f"geometric mean of B / A: {data['geometric_mean']:.3f} ({means})")
    for side in ("a", "b"):
        said += [f"only in {side.upper()}: {_named(row)}" for row in data[f"only_in_{side}"]]
    note = "low, high: 95 % interval of the ratio; p of the exact Mann-Whitney test, of noise within a run only"
    table = Table("", columns, rows, note=note if rows else "", digits=4)
    pictures: tuple[Picture, ...] = ()
    if pairs:
        lines = tuple(Line(_named(p.row), (0.0,), (p.ratio,)) for p in pairs)
        pictures = (Bars("B / A", "", "tokens per second of B / those of A", lines),)
    return Report("Speed compared", tuple(said), (table,) if rows else (), pictures)


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['backend']} {row['type_k']} {name_of(row)}, {row['n_threads']} threads"
