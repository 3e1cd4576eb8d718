"""Several contexts at once: shared weights count once, each device has its own memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from yarn_edge.memory import together
from yarn_edge.memory.plan import FAST_BYTES, Simulation
from yarn_edge.memory.together import bytes_together, fit_together
from yarn_edge.runtime import ggml

from support import tiny_gguf

CPU = next(d for d in ggml.devices() if d.kind == "cpu")
GPU = replace(CPU, name="CUDA0", backend="CUDA", kind="gpu", description="a card", index=7)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")


@pytest.fixture
def simulation(path: Path) -> Iterator[Simulation]:
    with Simulation(path) as opened:
        yield opened


def test_contexts_of_one_model_share_its_weights(simulation: Simulation, path: Path) -> None:
    short, long = simulation.settings(512), simulation.settings(4096)
    plans = [simulation.plan_of(settings) for settings in (short, long)]
    alone = [bytes_together([(simulation, settings)])[None] for settings in (short, long)]
    assert alone == [plan.total_bytes - simulation.process_bytes for plan in plans]
    assert alone[1] - alone[0] > plans[1].kv_bytes - plans[0].kv_bytes
    weights = plans[1].weights_bytes + plans[1].repacked_bytes
    assert bytes_together([(simulation, short), (simulation, long)]) == {None: sum(alone) - weights}
    with Simulation(path) as another:
        assert bytes_together([(simulation, short), (another, short)])[None] > 2 * alone[0] - simulation.process_bytes


def test_the_code_of_our_kernels_counts_once(simulation: Simulation) -> None:
    fast = replace(simulation.settings(512), attention="fast")
    one, three = (bytes_together([(simulation, fast)] * n)[None] for n in (1, 3))
    plan = simulation.plan_of(fast)
    assert three == 3 * one - 2 * (plan.weights_bytes + plan.repacked_bytes + FAST_BYTES)
    plain = replace(fast, attention="plain", n_ubatch=32)
    mixed = bytes_together([(simulation, plain), (simulation, fast)])[None]
    alone = bytes_together([(simulation, plain)])[None]
    assert mixed == alone + one - plan.weights_bytes - plan.repacked_bytes


def test_each_device_has_its_own_memory(simulation: Simulation, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Simulation(path) as other:
        other.device = GPU
        contexts = [(simulation, simulation.settings(512)), (other, other.settings(512)), (other, other.settings(1024))]
        needed = bytes_together(contexts)
        assert needed.keys() == {None, GPU}
        both = sum(other.plan_of(settings).taken_bytes for _other, settings in contexts[1:])
        assert needed[GPU] == both - other.weights.on_device
        room = {"cpu": needed[None], "gpu": (needed[GPU], needed[GPU])}
        monkeypatch.setattr(together, "available_bytes", lambda: room["cpu"])
        monkeypatch.setattr(ggml, "device_memory", lambda _device: room["gpu"])
        assert fit_together(contexts)
        room["gpu"] = (needed[GPU] - 1, needed[GPU])
        assert not fit_together(contexts)
        room["gpu"] = (0, 0)  # not reported
        assert fit_together(contexts)
        room["cpu"] -= 1
        assert not fit_together(contexts)
