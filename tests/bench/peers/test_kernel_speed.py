"""The race of the kernels: its results for kernels that are as good as ggml's, and for some that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yarn_edge.bench.peers import kernels as kernel_race
from yarn_edge.bench.peers.kernels import RACE, KernelCase, kernel_errors, kernel_rates
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.kernels.choose import Kernels
from yarn_edge.runtime.ggml_types import quantize_into, type_named

from support import tiny

CASES = [KernelCase(type_named(name), important) for name in ("Q4_K", "Q6_K") for important in (False, True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ck = tmp_path_factory.mktemp("kernel-speed") / "ck"
    tiny.write_checkpoint(ck, dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    return convert(ck, str(ck.parent / "model.gguf"), "BF16")[0]


def scaled(by: float) -> Any:
    """A kernel that makes ggml's blocks of weights that are `by` times as large."""

    def fast(x: Any, importance: Any, blocks_of_row: int, out: Any, plan: Any) -> int:
        kind = type_named({144: "Q4_K", 210: "Q6_K"}[plan.block_bytes])
        rows = np.ascontiguousarray(x.reshape(-1, 256 * blocks_of_row) * np.float32(by))
        quantize_into(kind, rows, out.reshape(len(rows), -1), importance if importance.size else None)
        return 0

    return fast


def test_errors_of_the_same_and_of_worse_blocks(model: Path) -> None:
    for row in kernel_errors(CASES, model, {"fast": Kernels(scaled(1)), "ggml": Kernels()}, 2):
        assert (row["same_blocks"], row["error_ratio"], row["worst_ratio"]) == (1, 1, 1)
        assert row["tensors"] > 10
    for row in kernel_errors(CASES, model, {"fast": Kernels(scaled(1.01)), "ggml": Kernels()}, 2):
        assert row["same_blocks"] < 0.5
        assert row["worst_ratio"] >= row["error_ratio"] > 1.001


def test_speeds() -> None:
    sample = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    for row in kernel_rates(CASES, sample, {"fast": Kernels(scaled(1)), "ggml": Kernels()}, 3):
        least, most = row["range"]["fast"]
        assert 0 < least <= row["million_per_s"]["fast"] <= most
        assert row["ratio"] == row["million_per_s"]["fast"] / row["million_per_s"]["ggml"]


@pytest.mark.parametrize("by, code", [(1, 0), (1.01, 1)])
def test_the_command(
    by: float, code: int, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_race, "choose_kernels", lambda _wanted, _work: Kernels(scaled(by)))
    words = [str(model), "--types", "q4_k", "--repeat", "1"]
    assert RACE.main([*words, "--json"]) == code
    results = json.loads(capsys.readouterr().out)
    assert [row["case"] for row in results["errors"]] == ["Q4_K", "Q4_K, importance"]
    assert [row["case"] for row in results["speed"]] == ["Q4_K", "Q4_K, importance"]
    assert RACE.main(words) == code
    assert "| Q4_K, importance |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, error", [(["--types", "Q8_0"], "'Q8_0' is none of"), (["--repeat", "0"], "0 is not from 1 to")]
)
def test_what_it_refuses(extra: list[str], error: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RACE.main([str(model), *extra]) == 2
    assert error in capsys.readouterr().err
