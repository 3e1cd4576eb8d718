"""Where a conversation runs: what was asked for or a refusal, else a GPU that holds enough, else the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory import placement
from yarn_edge.memory.choice import DoesNotFitError
from yarn_edge.memory.placement import Wanted, budget_bytes, device_places, place
from yarn_edge.memory.plan import MemoryPlan, Simulation
from yarn_edge.runtime import ggml
from yarn_edge.runtime.model import Model
from yarn_edge.split_flags import SplitRequest

from support import tiny_gguf

CPU = next(d for d in ggml.devices() if d.kind == "cpu")
GPU = replace(CPU, name="CUDA0", backend="CUDA", kind="gpu", description="a card", index=7)
MIB, GIB = 2**20, 2**30


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with 4 GiB, of which 3 are free."""
    monkeypatch.setattr(ggml, "devices", lambda: [GPU, CPU])
    monkeypatch.setattr(ggml, "device_memory", lambda device: (3 * GIB, 4 * GIB) if device is GPU else (0, 0))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 1 GiB, 32768 tokens, with 64 KiB of f16 cache a token, everywhere."""

    class Simulated(Simulation):
        def __init__(self, path: str | Path, *, device: ggml.Device | None = None, **_more: Any) -> None:
            self.device, self.n_ctx_train, self.model = device, 32768, object()  # type: ignore[assignment]
            self.threads, self.attention = 2, "ggml"
            self.file = type("File", (), {"path": path, "architecture": "x", "metadata": {}})  # type: ignore[assignment]

        def plan(self, n_ctx: int, kv_type: str = "f16", **_more: Any) -> MemoryPlan:
            kv = n_ctx * {"f16": 65536, "q8_0": 34816, "q4_0": 18432}[kv_type]
            taken = GIB + kv
            return MemoryPlan(n_ctx, kv_type, GIB, 0, kv, 0, 0, 0, None if self.device is None else taken)

        def close(self) -> None: ...

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None: ...

    monkeypatch.setattr(placement, "Simulation", Simulated)


@pytest.mark.usefixtures("with_gpu")
def test_places_are_gpus_then_the_cpu() -> None:
    assert device_places(None) == [GPU, None]
    assert device_places("cuda") == [GPU]
    assert device_places("cpu") == [None]
    with pytest.raises(YarnEdgeError, match="no metal device"):
        device_places("metal")


def test_a_split_with_all_layers_on_the_cpu_is_none(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", "llama")
    with pytest.raises(YarnEdgeError, match=r"^--layers-on cpu=4 puts all layers on the CPU: use --backend cpu"):
        place(path, Wanted(split=SplitRequest((), "cpu=4")))


def test_a_device_that_does_not_tell_its_memory_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "devices", lambda: [GPU, CPU])
    monkeypatch.setattr(ggml, "device_memory", lambda _device: (0, 0))
    assert device_places(None) == [None]
    assert device_places("cuda") == [GPU]


@pytest.mark.usefixtures("with_gpu")
def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yarn_edge.runtime.machine.available_bytes", lambda: 20 * GIB)
    assert budget_bytes(None, None, None) == 19 * GIB
    assert budget_bytes(GPU, None, None) == 3 * GIB - 3 * GIB // 8
    assert budget_bytes(None, None, 5 * GIB) == 5 * GIB
    assert budget_bytes(GPU, None, 5 * GIB) == 3 * GIB - 3 * GIB // 8  # --memory alone is of the machine
    assert budget_bytes(GPU, "cuda", 5 * GIB) == 5 * GIB


CASES = {
    "the GPU, as much as it holds with q8_0": (Wanted(), "CUDA0", 32768, "q8_0"),
    "what was asked for": (Wanted(ctx=16384), "CUDA0", 16384, "f16"),
    "the CPU, asked for": (Wanted("cpu"), None, 32768, "f16"),
    "too much for the GPU": (Wanted(ctx=32768, kv_type="f16"), None, 32768, "f16"),
    "a prompt": (Wanted(needed_ctx=lambda _model: 3000), "CUDA0", 3000, "f16"),
    "a prompt beyond the model": (Wanted(needed_ctx=lambda _model: 40000), "CUDA0", 32768, "q8_0"),
    "a cache that was asked for": (Wanted(kv_type="q4_0"), "CUDA0", 32768, "q4_0"),
}


@pytest.mark.usefixtures("with_gpu", "simulated")
@pytest.mark.parametrize("wanted, device, n_ctx, kv_type", CASES.values(), ids=CASES)
def test_choices(wanted: Wanted, device: str | None, n_ctx: int, kv_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yarn_edge.runtime.machine.available_bytes", lambda: 20 * GIB)
    found = place(Path("m.gguf"), wanted)
    assert (found.device.name if found.device else None) == device
    assert (found.choice.n_ctx, found.choice.kv_type) == (n_ctx, kv_type)


@pytest.mark.usefixtures("with_gpu", "simulated")
def test_a_gpu_with_room_for_little_is_passed_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ggml, "device_memory", lambda _device: (GIB + 400 * MIB, 4 * GIB))
    found = place(Path("m.gguf"), Wanted(memory_bytes=20 * GIB))
    assert found.device is None
    assert "not on CUDA0: all 32768 tokens" in capsys.readouterr().err
    with pytest.raises(DoesNotFitError, match="the longest are"):
        place(Path("m.gguf"), Wanted(backend="cuda", ctx=32768))
    assert place(Path("m.gguf"), Wanted(backend="cuda")).choice.n_ctx < 8192  # asked for, it is taken for what it is


def test_what_a_prompt_takes_is_asked_of_the_vocabulary(smol_quants: dict[str, Path]) -> None:
    def needed(model: Model) -> int:
        return len(model.tokenize("seven words are in this short text", add_special=False, parse_special=False)) + 993

    found = place(smol_quants["Q8_0"], Wanted(backend="cpu", needed_ctx=needed))
    assert found.device is None
    assert found.choice.n_ctx == 1000
    assert found.choice.plan.total_bytes > smol_quants["Q8_0"].stat().st_size
