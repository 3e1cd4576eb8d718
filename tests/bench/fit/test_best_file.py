"""`fit --text`: of all pairs of types that fit, the one that is expected to lose least; it is made, measured and written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("numba")

from yarn_edge.bench.fit.cache_loss import CacheLoss
from yarn_edge.bench.fit.frontier import Frontier
from yarn_edge.cli import main
from yarn_edge.convert.one_pass import SourceTensor
from yarn_edge.convert.sizing.sensitivity import TensorCost
from yarn_edge.gguf.read import read_gguf
from yarn_edge.memory.choice import DoesNotFitError
from yarn_edge.memory.plan import Simulation
from yarn_edge.memory.weights import weights_in_memory
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.sample_text import sample_text

from support import tiny

KINDS = [type_named(name) for name in ("Q2_K", "Q4_K", "Q6_K", "Q8_0")]
LOSSES = CacheLoss({"f16": 0.0, "q8_0": 0.01, "q4_0": 0.5}, {"f16": 0.0, "q8_0": 0.005, "q4_0": 0.02})
CACHES = {"f16": 4000, "q8_0": 2000, "q4_0": 1000}


class PlainSimulation:
    """Weights of Q4_K, 100 bytes besides, and a cache whose K and V take what CACHES says."""

    def __init__(self, costs: list[TensorCost]) -> None:
        self.file = SimpleNamespace(tensors={"output.weight": None})
        self._weights = sum(c.n_weights // 256 * KINDS[1].block_bytes for c in costs)

    def refusal(self, kv_type: str) -> str | None:
        return "no" if kv_type == "q8_0/q4_0" else None

    def plan(self, _n_ctx: int, kv_type: str) -> Any:
        k, _, v = kv_type.partition("/")
        return SimpleNamespace(taken_bytes=self._weights + 100 + CACHES[k] + CACHES[v or k])


def frontier() -> tuple[Frontier, list[TensorCost]]:
    sizes, scales = (256 * 10, 256 * 30, 256 * 4), (0.2, 0.05, 0.9)
    costs = [
        TensorCost(f"{i}", n, n, {kind: scale * 4.0**-j for j, kind in enumerate(KINDS)})
        for i, (n, scale) in enumerate(zip(sizes, scales, strict=True))
    ]
    tensors = [
        SourceTensor(c.name, (256, c.n_weights // 256), KINDS[1], lambda _row, _out: None, c.name) for c in costs
    ]
    simulation = cast("Simulation", PlainSimulation(costs))
    return Frontier(simulation, 512, tensors, costs, {c.name: KINDS[1] for c in costs}, LOSSES), costs


def test_the_best_pair_is_chosen() -> None:
    planner, costs = frontier()
    for budget in range(planner.least, planner.most + 2000, 500):
        best = min(
            LOSSES.nats(kv) + sum(c.nats[kind] for c, kind in zip(costs, kinds, strict=True))
            for kv in LOSSES.kv_types
            if kv != "q8_0/q4_0"
            for kinds in itertools.product(KINDS, repeat=len(costs))
            if 100
            + sum(CACHES[part] for part in (kv.split("/") * 2)[:2])
            + sum(planner.taken(c, kind) for c, kind in zip(costs, kinds, strict=True))
            <= budget
        )
        planned = planner.best(budget)
        assert planned.memory_bytes <= budget
        assert best <= planned.nats <= best * 1.35  # the hull leaves out what only an exact fill would take
    whole = planner.best(planner.most)
    assert (whole.kv_type, set(whole.types.values())) == ("f16", {KINDS[-1]})


def test_a_frontier_falls() -> None:
    points = frontier()[0].points()
    assert len(points) > 5
    assert all(a.nats > b.nats and a.memory_bytes < b.memory_bytes for a, b in itertools.pairwise(points))


def test_nothing_fits() -> None:
    planner, _ = frontier()
    with pytest.raises(DoesNotFitError, match="nothing fits into 0 MiB"):
        planner.best(planner.least - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    tiny.write_checkpoint(folder / "ck", hidden_size=256, intermediate_size=512)
    (folder / "a.txt").write_text(sample_text()[:9000], encoding="utf-8")
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300, encoding="utf-8")
    (folder / "short.txt").write_text("a quick fox", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process without torch, as if it had been measured."""
    monkeypatch.setattr("yarn_edge.bench.fit.best_file.process_bytes_apart", lambda _path, _threads: 60 << 20)


def test_the_file_fits_and_is_the_best(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out.gguf", tmp_path / "page.html"
    texts = f"{folder / 'a.txt'},{folder / 'b.txt'}"
    words = ["fit", str(folder / "ck"), "--memory", "78MB", "--ctx", "512", "--text", texts]
    assert main([*words, "-o", str(out), "--json", "--report", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    chosen, *standard = found["files"]
    assert chosen["quant"] == "chosen"
    assert chosen["best"] is (not any(file["best"] for file in standard))
    best = next(file for file in found["files"] if file["best"])
    assert best["kld_mean"] == min(file["kld_mean"] for file in found["files"])
    assert all(file["total_bytes"] <= 78_000_000 for file in found["files"])
    made = read_gguf(out)
    if best is chosen:
        assert {n: made.tensors[n].type_name for n in chosen["tensor_types"]} == chosen["tensor_types"]
        assert made.metadata["yarn_edge.calibration.texts"] == "a.txt, b.txt"
    with Simulation(out, process_bytes=60 << 20) as simulation:
        plan = simulation.plan(512, best["kv_type"], weights=weights_in_memory(made))
    assert abs(plan.taken_bytes - best["total_bytes"]) <= (
        0 if best is chosen else 8192
    )  # the name of a matrix is a key
    assert found["commands"] == [["yarn-edge", "chat", str(out), "--ctx", "512", "--kv-type", best["kv_type"]]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "page.html"]


@pytest.mark.parametrize(
    ("flags", "reason", "code"),
    [
        (["-o", "{out}"], "pass --text TEXT as well", 2),
        (["--text", ","], "--text is empty", 2),
        (["--text", "{short}"], "tokens: 512 are needed, half to calibrate and half to measure", 2),
        (["--text", "{a}", "--memory", "1MiB"], "nothing fits into 1 MiB: the smallest types", 1),
        (["--text", "{a}", "--backend", "cuda"], "leave out --backend cuda", 2),
        (["--text", "{a}", "-o", "{a}"], "a.txt", 2),
    ],
    ids=["alone", "empty", "short", "memory", "backend", "the text"],
)
def test_what_cannot_be_done(
    folder: Path, tmp_path: Path, flags: list[str], reason: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"a": folder / "a.txt", "short": folder / "short.txt", "out": tmp_path / "out.gguf"}
    words = [flag.format(**names) for flag in flags]
    assert main(["fit", str(folder / "ck"), "--ctx", "512", "--memory", "2GiB", *words]) == code
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
