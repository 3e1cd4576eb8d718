"""Memory before loading, against real loads: the log of a real context, the peak of a real process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.bench.fit.accuracy import compare_memory
from yarn_edge.bench.fit.candidates import quant_of
from yarn_edge.convert.quantize import quantize
from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.choice import DoesNotFitError, choose_context
from yarn_edge.memory.plan import LEAST_CTX, Simulation
from yarn_edge.memory.weights import weights_in_memory
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.kv_cache import CTX_STEP
from yarn_edge.runtime.llama_api import captured_log
from yarn_edge.runtime.machine import resident_bytes
from yarn_edge.runtime.model import Model

from support import tiny_gguf
from support.gguf_files import BYTE_TOKENIZER, split, write_gguf
from support.tiny_runs import Ended, in_children

MIB = 2**20
ROUNDED = 0.0101 * MIB  # the log has two decimals of a MiB
PARTS = {
    "kv_bytes": r"(?:KV|RS) buffer size = +([\d.]+) MiB",
    "compute_bytes": r"compute buffer size = +([\d.]+) MiB",
    "output_bytes": r"output buffer size = +([\d.]+) MiB",
}


def logged(log: list[str], pattern: str) -> float:
    return sum(float(found) for line in log for found in re.findall(pattern, line)) * MIB


def differences(path: Path, n_ctx: int, kv_type: str) -> dict[str, float]:
    """Bytes by which simulation and real load differ, part by part, as the loads log them."""
    with Simulation(path) as simulation:
        settings = replace(simulation.settings(n_ctx, kv_type), n_outputs=0)
        plan = simulation.plan_of(settings)
    with captured_log() as loading, Model(path) as model:
        pass
    found = {"repacked_bytes": plan.repacked_bytes - logged(loading, r"CPU_REPACK model buffer size = +([\d.]+) MiB")}
    with Model(path) as model, captured_log() as log, Context(model, settings):
        pass
    for name, pattern in PARTS.items():
        found[name] = getattr(plan, name) - logged(log, pattern)
    # llama.cpp makes the output buffer for one token; it grows when the logits of a whole batch are asked for.
    found["output_bytes"] = plan.output_bytes / min(settings.n_batch, n_ctx) - logged(log, PARTS["output_bytes"])
    return found


def child(connection: Connection, _name: str, folder: Path, jobs: list[str]) -> None:
    for job in jobs:
        path = tiny_gguf.write(folder / f"{job}.gguf", job)
        try:
            found: Any = [differences(path, 1536, "f16")]
            if job not in ("mistral4", "deepseek2", "grok"):  # heads of 16 hold no blocks of 32
                found.append(differences(path, 512, "bf16"))
        except YarnEdgeError as error:
            found = str(error)
        connection.send((job, found))
    connection.close()


def test_every_architecture_simulates_what_a_real_context_takes(tmp_path: Path) -> None:
    found = dict(in_children(child, "", tmp_path, list(tiny_gguf.ARCHITECTURES)))
    assert found.keys() == tiny_gguf.ARCHITECTURES.keys()
    for name, answer in found.items():
        assert not isinstance(answer, (Ended, str)), (name, answer)
        for differing in answer:
            assert all(abs(n_bytes) <= ROUNDED for n_bytes in differing.values()), (name, differing)


def write_hybrid(path: Path) -> Path:
    """An LFM2 with two layers of short convolutions around one of attention."""
    numbers = {
        "context_length": 4096,
        "embedding_length": 2048,
        "block_count": 3,
        "feed_forward_length": 32,
        "vocab_size": 262,
        "attention.head_count": 64,
        "attention.head_count_kv": [0, 2, 0],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e4,
        "shortconv.l_cache": 9,
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (262, 2048), "token_embd_norm": (2048,)}
    for layer in range(3):
        own: dict[str, tuple[int, ...]] = {"attn_norm": (2048,), "ffn_norm": (2048,), "ffn_gate": (32, 2048)}
        own |= {"ffn_up": (32, 2048), "ffn_down": (2048, 32)}
        if layer == 1:
            own |= {"attn_q": (2048, 2048), "attn_k": (64, 2048), "attn_v": (64, 2048), "attn_output": (2048, 2048)}
            own |= {"attn_q_norm": (32,), "attn_k_norm": (32,)}
        else:
            own |= {"shortconv.conv": (2048, 9), "shortconv.in_proj": (6144, 2048), "shortconv.out_proj": (2048, 2048)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    keys = {f"lfm2.{name}": value for name, value in numbers.items()}
    zeros = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return write_gguf(path, "lfm2", BYTE_TOKENIZER | keys, zeros)


def test_recurrent_states_count(tmp_path: Path) -> None:
    path = write_hybrid(tmp_path / "hybrid.gguf")
    with Simulation(path) as simulation:
        plan, longer = simulation.plan(512), simulation.plan(1024)
    cache = 512 * 2 * 64 * 2  # keys and values of one layer in half precision
    assert longer.kv_bytes - plan.kv_bytes == pytest.approx(cache, abs=2 * ROUNDED)
    # The states of the convolutions do not grow: two layers of 8 * 2048 float32.
    assert plan.kv_bytes - cache == pytest.approx(2 * 8 * 2048 * 4, abs=2 * ROUNDED)
    assert all(abs(n_bytes) <= 2 * ROUNDED for n_bytes in differences(path, 512, "f16").values())


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory: pytest.TempPathFactory, whole_smol_quants: dict[str, Path]) -> Path:
    """A type that x86 with AVX2 and ARM repack, in a file whose embeddings are the output, too."""
    folder = tmp_path_factory.mktemp("q4_0")
    return quantize(whole_smol_quants["F16"], str(folder / "q4_0.gguf"), "Q4_0")[0]


@pytest.mark.parametrize(
    ("quant", "n_ctx", "kv_type"), [("F16", 512, "f16"), ("Q4_K_M", 5000, "q4_0"), ("Q8_0", 1024, "q8_0")]
)
def test_the_real_model_takes_what_was_simulated(
    smol_quants: dict[str, Path], quant: str, n_ctx: int, kv_type: str
) -> None:
    found = differences(smol_quants[quant], n_ctx, kv_type)
    assert all(abs(n_bytes) <= ROUNDED for n_bytes in found.values()), found


def test_a_file_that_is_repacked(q4_0: Path) -> None:
    found = differences(q4_0, 512, "f16")
    assert all(abs(n_bytes) <= ROUNDED for n_bytes in found.values()), found
    with captured_log() as log, Model(q4_0):
        pass
    with Simulation(q4_0) as simulation:
        mapped, copied = simulation.weights.mapped, simulation.weights.repacked
    assert mapped == pytest.approx(logged(log, r"CPU_Mapped model buffer size = +([\d.]+) MiB"), abs=2 * 4096 + ROUNDED)
    if logged(log, r"CPU_REPACK model buffer size = +([\d.]+) MiB"):  # this machine does
        assert copied > 30 * MIB


def test_shards_are_counted_together(tmp_path: Path) -> None:
    tiny = tiny_gguf.write(tmp_path / "whole.gguf", "llama")
    shards = split(tiny, tmp_path / "model.gguf", 8)
    assert len(shards) > 1
    with Simulation(tiny) as whole, Simulation(shards[0]) as parts:
        assert parts.weights.tensors == whole.weights.tensors == whole.file.weight_bytes
        assert parts.plan(1024).kv_bytes == whole.plan(1024).kv_bytes
        assert parts.weights.mapped >= whole.weights.mapped


@pytest.mark.parametrize(
    ("quant", "n_ctx", "kv_type"), [("Q8_0", 512, "f16"), ("Q4_K_M", 768, "q8_0"), ("F16", 512, "q4_0")]
)
def test_the_peak_of_a_real_process_is_predicted(
    smol_quants: dict[str, Path], quant: str, n_ctx: int, kv_type: str
) -> None:
    found = compare_memory(smol_quants[quant], n_ctx, kv_type)
    assert 0 <= found.error <= 0.05, found


@pytest.fixture(scope="module")
def simulation(whole_smol_quants: dict[str, Path]) -> Iterator[Simulation]:
    with Simulation(whole_smol_quants["Q4_K_M"]) as opened:
        yield opened


def test_nothing_is_allocated(simulation: Simulation) -> None:
    before = resident_bytes()
    plan = simulation.plan(2**17)
    assert plan.kv_bytes > 2**30
    assert resident_bytes() - before < 64 * MIB


@pytest.mark.parametrize("share", [0.02, 0.3, 0.731, 0.99])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_the_longest_context_fits_and_one_step_more_does_not(
    simulation: Simulation, kv_type: str, share: float
) -> None:
    limit = 32768
    low, high = (simulation.plan(n, kv_type).total_bytes for n in (LEAST_CTX, limit))
    budget = round(low + share * (high - low))
    longest = simulation.longest_context(budget, kv_type, limit)
    assert longest % CTX_STEP == 0
    assert simulation.plan(longest, kv_type).total_bytes <= budget
    assert simulation.plan(longest + CTX_STEP, kv_type).total_bytes > budget


def test_the_ends_of_the_longest_context(simulation: Simulation) -> None:
    enough = simulation.plan(1000).total_bytes
    assert simulation.longest_context(enough, "f16", 1000) == 1000
    assert simulation.longest_context(simulation.plan(LEAST_CTX).total_bytes - 1, "f16", 1000) == 0


def test_contexts_too_long_to_simulate(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = simulation.plan(65536)
    monkeypatch.setattr("yarn_edge.memory.plan.MOST_SIMULATED", 16384)
    extrapolated = simulation.plan(65536)
    assert extrapolated.kv_bytes == pytest.approx(truth.kv_bytes, abs=0.05 * MIB)
    assert extrapolated.total_bytes == pytest.approx(truth.total_bytes, rel=0.005)
    assert simulation.plan(2**31 - 1).kv_bytes > 2**44


def test_choosing_prefers_f16_then_q8_0_then_fewer_tokens(simulation: Simulation) -> None:
    limit = simulation.n_ctx_train
    f16, q8_0, q4_0 = (simulation.plan(limit, kv_type).total_bytes for kv_type in ("f16", "q8_0", "q4_0"))
    for wanted in (limit, None):
        first = choose_context(simulation, f16, wanted)
        assert (first.n_ctx, first.kv_type) == (limit, "f16")
        second = choose_context(simulation, f16 - 1, wanted)
        assert (second.n_ctx, second.kv_type) == (limit, "q8_0")
        assert "q8_0" in second.reason
    third = choose_context(simulation, q8_0 - 1, None)
    assert third.kv_type == "q8_0"
    assert third.n_ctx == limit - CTX_STEP
    assert third.plan.total_bytes <= q8_0 - 1
    assert str(third.n_ctx) in third.reason
    assert choose_context(simulation, q4_0, None, "q4_0").n_ctx == limit
    given = choose_context(simulation, q8_0, None, "f16")  # a type that was asked for is not exchanged
    assert given.kv_type == "f16"
    assert given.n_ctx < limit


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ("fast", "with our attention q8_0 generates about as fast"),
        ("flash", "llama.cpp's attention is slower with q8_0"),
    ],
)
def test_the_reason_says_what_q8_0_costs(
    simulation: Simulation, attention: Attention, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "attention", attention)
    limit = simulation.n_ctx_train
    f16, q8_0 = (simulation.plan(limit, kv_type).total_bytes for kv_type in ("f16", "q8_0"))
    assert choose_context(simulation, f16, None).reason.endswith("with a cache of type f16")
    for budget in (f16 - 1, q8_0 - 1):
        with_f16 = simulation.longest_context(budget, "f16", limit)
        assert choose_context(simulation, budget, None).reason.endswith(f" (f16: {with_f16}); {told}")
    assert told not in choose_context(simulation, q8_0, None, "q8_0").reason


def test_a_cache_type_that_was_asked_for_and_cannot_be(tmp_path: Path, simulation: Simulation) -> None:
    with (
        Simulation(tiny_gguf.write(tmp_path / "tiny.gguf", "llama")) as opened,
        pytest.raises(YarnEdgeError, match="does not divide"),
    ):
        choose_context(opened, 2**40, None, "q8_0")
    with pytest.raises(YarnEdgeError, match="'f8' is unknown"):
        choose_context(simulation, 2**40, None, "f8")
    with pytest.raises(DoesNotFitError, match=r"the longest are \d+ with f32, \d+ with q8_0, \d+ with q4_0"):
        choose_context(simulation, simulation.plan(8192, "f32").total_bytes - 1, 8192, "f32")


def test_a_context_that_was_asked_for_is_not_shortened(simulation: Simulation) -> None:
    budget = simulation.plan(8192, "q8_0").total_bytes - 1
    longest = {kv_type: simulation.longest_context(budget, kv_type, 8192) for kv_type in ("f16", "q8_0", "q4_0")}
    with pytest.raises(DoesNotFitError) as told:
        choose_context(simulation, budget, 8192)
    for kv_type, n_ctx in longest.items():
        assert f"{n_ctx} with {kv_type}" in str(told.value)


def test_where_nothing_fits_the_least_is_told(simulation: Simulation) -> None:
    with pytest.raises(DoesNotFitError, match=r"even 512 tokens with a cache of type q4_0 take [\d.]+ [MG]iB"):
        choose_context(simulation, 10 * MIB, None)


def test_heads_that_no_quantized_cache_can_hold(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", "llama")
    with Simulation(path) as simulation:
        assert "does not divide" in str(simulation.refusal("q8_0"))
        assert simulation.refusal("f16") is None
        with pytest.raises(YarnEdgeError, match="does not divide"):
            simulation.plan(512, "q8_0")
        choice = choose_context(simulation, simulation.plan(1024).total_bytes - 1, None)
        assert (choice.kv_type, choice.n_ctx) == ("f16", 768)


def test_outputs_beyond_what_is_reserved_are_refused(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", "llama")
    with Model(path) as model, Context(model, ContextSettings(n_ctx=512, n_outputs=1)) as context:
        context.evaluate([1, 2, 3], 0)
        assert context.logits().shape[0] == 1
        with pytest.raises(ValueError, match="memory is reserved for 1"):
            context.evaluate([4, 5], 3, outputs="all")


def test_the_quantization_is_named_by_the_file(smol_quants: dict[str, Path]) -> None:
    for name, path in smol_quants.items():
        with Simulation(path) as simulation:
            assert quant_of(simulation.file) == name
            assert weights_in_memory(simulation.file) == simulation.weights
