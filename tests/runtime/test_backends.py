"""verify --backend and what lies behind its numbers: nothing is replaced in silence, and the tables add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.evidence.phase_error import MODELS
from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.flags import BACKENDS
from yarn_edge.positions import error_budget as phase
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime import ggml, rope_kernel
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.kv_cache import KV_TYPES
from yarn_edge.verify.command import verify
from yarn_edge.verify.vocabulary import VOCABULARY_CHECKS

from support import tiny
from support.gguf_bytes import edit_key

ABSENT = [name for name in BACKENDS if not devices_of(name)]
PLACED = ("kernel", "live-graph", "logits")
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64}  # whole blocks of every cache type


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("backends") / "ck", **SHAPE)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    return convert(checkpoint, str(checkpoint.parent / "out.gguf"), "F32")[0]


def report(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main(["verify", *argv, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found | {"by_name": {c["name"]: c for c in found["checks"]}}


def test_the_devices_are_those_of_ggml() -> None:
    known = ggml.devices()
    assert [d.index for d in known] == list(range(len(known)))
    assert {d.name for d in devices_of("cpu")} == {d.name for d in known if d.kind == "cpu"} != set()
    claimed = [d for name in BACKENDS for d in devices_of(name)]
    assert len(claimed) == len({d.index for d in claimed})


@pytest.mark.parametrize("backend", ABSENT)
def test_a_backend_that_is_not_there_is_skipped_and_told(
    backend: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = report([str(model), "--backend", backend], capsys, code=1)
    assert told["ok"] is False
    assert list(told["by_name"]) == ["metadata", *(f"{what}:{backend}" for what in PLACED)]
    assert told["by_name"]["metadata"]["status"] == "pass"
    for what in PLACED:
        check = told["by_name"][f"{what}:{backend}"]
        assert (check["status"], check["value"], check["limit"]) == ("skip", None, None)
        assert check["detail"] == missing(backend)
        assert check["detail"].startswith(f"no {backend} device: ")
        assert all(f"{d.name} ({d.description})" in check["detail"] for d in ggml.devices())


def test_all_backends(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = report([str(model), "--backend", "all"], capsys)
    assert told["ok"] is True
    status = {name: check["status"] for name, check in told["by_name"].items()}
    assert {status[name] for name in ("metadata", "kernel", "live-graph")} == {"pass"}
    assert {status[f"{what}:{backend}"] for what in PLACED for backend in ABSENT} <= {"skip"}
    assert len(told["checks"]) == len(status)


def test_a_metadata_failure_counts_though_nothing_ran(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "capped.gguf"
    path.write_bytes(model.read_bytes())
    edit_key(path, "llama.context_length", 256)
    for backend in ("cpu", *ABSENT):
        assert main(["verify", str(path), "--backend", backend]) == 1


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU a second time, as a device of CUDA's library; which devices the kernel was asked to run on."""
    real_devices, real_rope, asked = ggml.devices, rope_kernel.rope, []
    cpu = next(d for d in real_devices() if d.kind == "cpu")

    def rope_on(x: Any, positions: Any, arguments: Any, device: ggml.Device | None = None, factors: Any = None) -> Any:
        asked.append("" if device is None else device.backend)
        return real_rope(x, positions, arguments, device, factors)

    monkeypatch.setattr(ggml, "devices", lambda: [*real_devices(), replace(cpu, backend="CUDA", description="a twin")])
    monkeypatch.setattr(rope_kernel, "rope", rope_on)
    return asked


def test_a_second_device_is_really_used(
    model: Path, checkpoint: Path, twin: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = report([str(model), "--against", str(checkpoint), "--backend", "cuda", "--tokens", "64"], capsys)
    assert told["ok"] is True
    assert list(told["by_name"]) == ["metadata", "kernel:cuda", "live-graph:cuda", *VOCABULARY_CHECKS, "logits:cuda"]
    assert {c["status"] for c in told["checks"]} == {"pass"}
    assert twin == ["CUDA"]


def test_each_backend_has_its_own_checks(model: Path, twin: list[str]) -> None:
    checks = verify(model, backend="all")
    names = [c.name for c in checks]
    assert len(names) == len(set(names)), names
    assert {"kernel", "kernel:cuda", "live-graph", "live-graph:cuda"} <= set(names)
    assert twin == ["CPU", "CUDA"]
    assert "a twin" in missing("vulkan")


def test_a_graph_that_runs_elsewhere_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that llama.cpp did not use: its live graph is no proof for it."""
    cpu = devices_of("cpu")[0]
    monkeypatch.setattr(ggml, "devices", lambda: [cpu, replace(cpu, backend="CUDA", name="CUDA0", kind="gpu")])
    checks = {c.name: c for c in verify(model, backend="cuda")}
    assert checks["live-graph:cuda"].status == "fail"
    assert "not on CUDA0" in checks["live-graph:cuda"].detail


def test_the_phase_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = report([str(model)], capsys)["by_name"]["kernel"]
    rows = kernel["data"]["phase"]
    assert kernel["data"]["device"] == "CPU"
    assert [set(row) for row in rows] == [{"up_to", "ggml", "transformers", "budget"}] * len(rows)
    assert [row["up_to"] for row in rows] == [511, 4095, 8191, 16383, 32767, 65535, 131071]
    for side in ("ggml", "transformers", "budget"):
        values = [row[side] for row in rows]
        assert values == sorted(values)
    for row in rows:
        assert 0 < row["ggml"] <= row["budget"]
        assert 0 < row["transformers"] <= row["budget"]
    assert main(["verify", str(model)]) == 0
    out = capsys.readouterr().out
    assert "kernel on CPU: worst phase error in radians up to a position" in out
    assert f"{131071:>10} {rows[-1]['ggml']:>10.1e}" in out


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_the_buckets_of_logits_add_up(
    kv_type: str, model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(model), "--against", str(checkpoint), "--tokens", "300", "--kv-type", kv_type]
    check = report(argv, capsys)["by_name"]["logits"]
    data, buckets = check["data"], check["data"]["buckets"]
    assert data["kv_type"] == kv_type
    assert f", {kv_type} cache" in check["detail"]
    assert data["n_tokens"] == 300
    assert [(b["start"], b["end"]) for b in buckets] == [(0, 128), (128, 256), (256, 300)]
    sizes = [b["end"] - b["start"] for b in buckets]
    assert sum(n * b["kl_mean"] for n, b in zip(sizes, buckets, strict=True)) / 300 == pytest.approx(check["value"])
    assert sum(n * b["top1"] for n, b in zip(sizes, buckets, strict=True)) / 300 == pytest.approx(data["top1"])
    assert max(b["kl_max"] for b in buckets) == data["kl_max"]
    assert check["value"] <= check["limit"]
    assert (check["limit"] == 1e-8) == (kv_type == "f32")


def test_people_see_which_cache_it_was(model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", str(model), "--against", str(checkpoint), "--tokens", "64", "--kv-type", "q8_0"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "over 64 tokens, q8_0 cache" in out
    assert "logits: KL divergence (nats) by position, q8_0 cache" in out


def test_a_quantized_cache_does_not_hide_wrong_positions(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(model.read_bytes())
    edit_key(path, "llama.rope.freq_base", 500.0)
    checks = {c.name: c for c in verify(path, checkpoint, n_tokens=64, kv_type="q8_0")}
    assert {checks[name].status for name in ("metadata", "live-graph")} == {"fail"}


def by_transformers(scaling: RopeScaling, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A e^(i angle) of transformers' own rotary embedding in float32."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {
        "rope_type": "yarn",
        "rope_theta": scaling.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
        "attention_factor": scaling.attention_factor,
    }
    config = LlamaConfig(
        hidden_size=scaling.dim,
        num_attention_heads=1,
        head_dim=scaling.dim,
        max_position_embeddings=scaling.extended_context,
        rope_parameters=parameters,
    )
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions.astype(np.int64))[None])
    return np.asarray((cos.double() + 1j * sin.double())[0, :, : scaling.dim // 2].numpy())


@pytest.mark.parametrize("name", MODELS)
def test_the_float32_of_the_table_is_that_of_transformers(name: str) -> None:
    """By position the worst pair's error is within 1.5 of the other's."""
    scaling = MODELS[name]
    positions = phase.sample_positions(131072, scaling.original_context)
    cos, sin = rope.cos_sin(scaling, positions)
    c, s = phase.float32_cos_sin(scaling, positions)
    ours = np.abs((c + 1j * s) - (cos + 1j * sin)).max(axis=1)
    theirs = np.abs(by_transformers(scaling, positions) - (cos + 1j * sin)).max(axis=1)
    for edge in phase.EDGES:
        inside = positions < edge
        assert 1 / 1.5 <= ours[inside].max() / theirs[inside].max() <= 1.5, edge
    far = positions >= 512
    assert 1 / 1.5 <= np.median(ours[far] / theirs[far]) <= 1.5
    assert (ours / scaling.attention_factor <= phase.budget(scaling, positions).max(axis=1)).all()
