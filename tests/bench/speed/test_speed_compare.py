"""bench compare: its statistics against SciPy and against simple counting, its files against what may stand in them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.speed import rank_test
from yarn_edge.bench.speed.compare import FASTER, FEW, SAME, SLOWER, Pair, matched
from yarn_edge.bench.speed.configuration import Configuration
from yarn_edge.bench.speed.rank_test import null_distribution
from yarn_edge.bench.speed.results import OK, SpeedRow, TimedRuns
from yarn_edge.bench.speed.timed_rows import TimedRow, read_rows, timed_row
from yarn_edge.cli import main


def row(
    samples: Sequence[float], test: str = "tg", model: str = "m.gguf", depth: int = 0, **changes: Any
) -> dict[str, Any]:
    """A row as `bench --json` writes it."""
    c = Configuration(model, "cpu", "f16", "auto", 512, 512, 2, depth)
    times = TimedRuns(128, tuple(int(s * 1e9) for s in samples))
    return SpeedRow(model, Path(model), "cpu", "CPU", c, test, 128, OK, times=times).as_json() | changes


def timed(*words: Any, **more: Any) -> TimedRow:
    return timed_row(row(*words, **more))


def write(path: Path, *rows: Any) -> str:
    path.write_text(json.dumps({"rows": list(rows)}))
    return str(path)


@pytest.mark.parametrize("n, m", [(1, 1), (2, 3), (4, 4), (5, 3)])
def test_the_null_distribution_is_that_of_all_orders(n: int, m: int) -> None:
    counts = [0] * (n * m + 1)
    for places in itertools.combinations(range(n + m), n):
        others = [i for i in range(n + m) if i not in places]
        counts[sum(a > b for a in places for b in others)] += 1
    assert null_distribution(n, m) == pytest.approx([c / math.comb(n + m, n) for c in counts], abs=1e-15)


def test_large_samples_take_the_normal_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = np.cumsum(null_distribution.__wrapped__(60, 60))
    monkeypatch.setattr(rank_test, "MAX_EXACT", 0)
    normal = np.cumsum(null_distribution.__wrapped__(60, 60))
    assert np.abs(exact - normal).max() < 1e-3
    assert normal[-1] == pytest.approx(1, abs=1e-6)


def test_p_values_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for n, m, shift in itertools.product((3, 5, 9), (4, 5, 8), (0.0, 0.05, 0.3)):
        a, b = random.lognormal(0, 0.1, n), random.lognormal(shift, 0.1, m)
        expected = stats.mannwhitneyu(a, b, alternative="two-sided", method="exact").pvalue
        assert Pair.of(timed(a), timed(b)).p == pytest.approx(expected, rel=1e-9)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(600):
        found = Pair.of(timed(random.lognormal(0, 0.1, 6)), timed(random.lognormal(-math.log(1.2), 0.1, 6)))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 1.2 <= found.high
    assert 0.94 <= inside / 600 <= 0.985


def test_the_verdict_and_the_interval_agree() -> None:
    random = np.random.default_rng(2)
    seen = set()
    for shift in np.linspace(-0.3, 0.3, 41):
        found = Pair.of(timed(random.lognormal(0, 0.08, 5)), timed(random.lognormal(shift, 0.08, 5)))
        assert found.low is not None
        assert found.high is not None
        assert (found.verdict == SAME) == (found.low <= 1 <= found.high)
        assert (found.verdict == FASTER) == (found.low > 1)
        seen.add(found.verdict)
    assert seen == {FASTER, SLOWER, SAME}


def test_known_pairs() -> None:
    slow, fast = [1.0, 1.01, 1.02, 1.03, 1.04], [0.5, 0.51, 0.52, 0.53, 0.54]
    faster = Pair.of(timed(slow), timed(fast))
    assert (faster.verdict, faster.ratio) == (FASTER, pytest.approx(1.02 / 0.52))
    assert faster.p == pytest.approx(2 / 252)
    assert Pair.of(timed(fast), timed(slow)).verdict == SLOWER
    same = Pair.of(timed(slow), timed(slow))
    assert (same.p, same.ratio, same.verdict) == (1.0, 1.0, SAME)
    alike = Pair.of(timed([1.0] * 5), timed([1.0] * 5))
    assert (alike.p, alike.low, alike.high, alike.verdict) == (1.0, 1.0, 1.0, SAME)
    few = Pair.of(timed(slow[:3]), timed(fast[:3]))  # 20 orders: nothing below 5 %
    assert (few.low, few.high, few.verdict) == (None, None, FEW)
    assert Pair.of(timed([1.0]), timed([2.0])).verdict == FEW


def test_rows_are_matched_by_what_was_measured(tmp_path: Path) -> None:
    failed = row([1], "ttft", status="failed: no memory")
    a = read_rows(Path(write(tmp_path / "a.json", row([1, 2]), row([1, 2], "pp"), row([1, 2], depth=4096), failed)))
    b = read_rows(Path(write(tmp_path / "b.json", row([1, 2], "pp"), row([1, 2]), row([1, 2], n_threads=1))))
    pairs, only_a, only_b = matched(a, b)
    assert [p.row.test for p in pairs] == ["tg", "pp"]
    assert [r.depth for r in only_a] == [4096]
    assert [r.setting("n_threads") for r in only_b] == [1]
    # One model each: they may differ, as two quantizations do. Several: the name decides, not the folder.
    assert len(matched([timed([1], model="x-Q4.gguf")], [timed([1], model="x-Q8.gguf")])[0]) == 1
    several = [timed([1], model="a/x.gguf"), timed([1], model="a/y.gguf")]
    assert len(matched(several, [timed([1], model="b/y.gguf"), timed([1], model="b/z.gguf")])[0]) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = [1.0, 1.01, 1.02, 1.03, 1.04]
    a = write(tmp_path / "a.json", row(times), row(times, "pp"), row([1.0], "ttft", depth=256))
    b = write(tmp_path / "b.json", row([t / 2 for t in times]), row([t * 2 for t in times], "pp"))
    assert main(["bench", "compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "faster" in text
    assert "slower" in text
    assert "only in A: cpu f16 ttft @ d256, 2 threads" in text
    assert main(["bench", "compare", a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["ratio"] for r in found["rows"]] == pytest.approx([2.0, 0.5])
    assert found["geometric_mean"] == pytest.approx(1.0)
    assert found["geometric_mean_by_test"] == pytest.approx({"tg": 2.0, "pp": 0.5})
    assert [r["verdict"] for r in found["rows"]] == [FASTER, SLOWER]
    assert len(found["only_in_a"]) == 1
    assert main(["bench", "compare", a, write(tmp_path / "c.json", row([1.0], n_threads=64))]) == 1


def test_output_of_llama_bench_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = row([1.0, 1.1, 1.2, 1.3], depth=512)
    told = (
        "n_batch",
        "n_ubatch",
        "n_threads",
        "type_k",
        "type_v",
        "flash_attn",
        "n_prompt",
        "n_gen",
        "n_depth",
        "samples_ns",
    )
    peer = {key: ours[key] for key in told} | {"backends": "CPU", "model_filename": "m.gguf"}
    (tmp_path / "peer.json").write_text(json.dumps([peer]))
    assert main(["bench", "compare", str(tmp_path / "peer.json"), write(tmp_path / "b.json", ours), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["geometric_mean"] == pytest.approx(1.0)


BAD = {
    "no JSON": ("{", "is not JSON"),
    "nested": ("[" * 100_000, "is not JSON"),
    "binary": ("\0\1", "is not JSON"),
    "a number": ("3", "has no rows"),
    "no rows": ('{"rows": []}', "has no rows"),
    "other rows": ('{"rows": [1]}', "has no rows"),
    "another list": ("[{}]", "has no rows"),
    "no status": ('{"rows": [{}]}', "row 1: has no status"),
    "no test": ('{"rows": [{"status": "ok"}]}', "row 1: has no test"),
    "no model": (json.dumps({"rows": [row([1.0], model="m") | {"model": {}}]}), "row 1: has no model"),
    "no samples": (json.dumps({"rows": [row([1.0]) | {"samples_ns": []}]}), "row 1: has no samples_ns"),
    "zero": (json.dumps({"rows": [row([1.0]) | {"samples_ns": [0]}]}), "row 1: has no samples_ns"),
    "not a number": (json.dumps({"rows": [row([1.0]) | {"samples_ns": [math.nan]}]}), "row 1: has no samples_ns"),
    "enormous": ('{"rows": [' + json.dumps(row([1.0]) | {"samples_ns": [10**400]}) + "]}", "row 1: has no samples_ns"),
    "too many": (json.dumps({"rows": [row([1.0]) | {"samples_ns": [1] * 1001}]}), "at most 1000"),
}


@pytest.mark.parametrize("text, told", BAD.values(), ids=BAD)
def test_bad_files_are_one_line(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert main(["bench", "compare", str(tmp_path / "bad.json"), write(tmp_path / "b.json", row([1.0]))]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words, told",
    [
        (["a.json"], "two files"),
        (["a.json", "b.json", "c.json"], "two files"),
        (["a.json", "no.json"], "a.json: No such"),
        (["a.json", "b.json", "--depth", "4k"], "--depth is for measuring"),
        (["a.json", "b.json", "-p", "1"], "--prompt-tokens"),
    ],
)
def test_bad_arguments(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", *words]) == 2
    assert told in capsys.readouterr().err
