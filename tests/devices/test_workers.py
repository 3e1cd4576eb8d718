"""One model over two workers and the CPU: the same bits, the same proofs, one line when a worker ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.memory.placement import Wanted, place
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.layer_split import given_split
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.workers import connect, disconnect
from yarn_edge.split_flags import SplitRequest
from yarn_edge.verify.command import verify

from support import depth, tiny_gguf
from support.live_files import live_file
from support.tiny_gguf import N_LAYERS
from support.worker_processes import WorkerProcess, needs_rpc, worker_processes

pytestmark = needs_rpc()
SETTINGS = ContextSettings(n_ctx=256, n_batch=32, n_ubatch=16, threads=1, attention="flash")
TOKENS = list(range(5, 29))
SPLITS = ["cpu=1,rpc0=2,rpc1=1", "rpc1=1,rpc0=3", "rpc0=1"]
MEMORY = 64 << 20


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[str, ...]]:
    with worker_processes(2, "--memory", str(MEMORY)) as started:
        addresses = tuple(worker.address for worker in started)
        connect(addresses)
        yield addresses
        disconnect()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are for the workers, whatever else this build and machine have."""
    there = ggml.devices
    monkeypatch.setattr(ggml, "devices", lambda: [d for d in there() if d.backend in ("CPU", "RPC")])


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("workers") / "llama.gguf", "llama")


REALLY_PLACED = Model._place


def place_all(model: Model, params: Any) -> None:
    """`Model._place`, with every device of the split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "devices", property(lambda self: self.device.devices))
        REALLY_PLACED(model, params)


def logits(path: Path, split: str | None, **changes) -> np.ndarray:
    place = None if split is None else given_split(split, N_LAYERS, ggml.devices(), path)
    with Model(path, device=place) as model, open_context(model, replace(SETTINGS, **changes)) as context:
        context.evaluate(TOKENS, 0, "all")
        first = context.logits()
        context.evaluate([7], len(TOKENS), "last")
        return np.vstack([first, context.logits()])


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("attention", ["flash", "plain"])
def test_same_bits(llama_file: Path, split: str, attention: str) -> None:
    alone = logits(llama_file, None, attention=attention)
    assert np.array_equal(logits(llama_file, split, attention=attention), alone)


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("split", SPLITS)
def test_live_positions(tmp_path: Path, split: str) -> None:
    path = live_file(tmp_path / "qwen3.gguf", "qwen3")
    assert np.array_equal(logits(path, split), logits(path, None))
    plain = logits(path.with_suffix(".plain.gguf"), None)
    assert np.abs(logits(path, split) - plain).max() > 1e-3


@pytest.mark.parametrize("form", ["keys", "live"])
def test_verified_part_by_part(workers: tuple[str, ...], llama_file: Path, tmp_path: Path, form: str) -> None:
    path = llama_file if form == "keys" else live_file(tmp_path / "qwen3.gguf", "qwen3")
    checks = {c.name: c for c in verify(path, backend=SplitRequest(workers, SPLITS[0]), threads=1)}
    for name in ("kernel", "kernel:rpc0", "kernel:rpc1", "live-graph:split"):
        assert (checks[name].status, checks[name].value <= 1) == ("pass", True), checks[name].detail


def test_a_rotation_elsewhere_is_found(
    workers: tuple[str, ...], llama_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is not the model's."""
    monkeypatch.setattr(Model, "devices", property(lambda self: self.device.devices[:1]))
    monkeypatch.setattr(Model, "_place", place_all)
    checks = {c.name: c for c in verify(llama_file, backend=SplitRequest(workers, SPLITS[0]), threads=1)}
    assert checks["live-graph:split"].status == "fail"
    assert re.search(r"^ropes ran in RPC0\[.*\], RPC0\[.*\], not on CPU", checks["live-graph:split"].detail)


def test_planned_by_memory(workers: tuple[str, ...], llama_file: Path) -> None:
    placed = place(llama_file, Wanted(split=SplitRequest(workers), ctx=512))
    assert placed.device.name == "rpc0=2,rpc1=2"
    parts = {part.device: part for part in placed.choice.plan.parts}
    assert [parts[name].layers for name in ("CPU", "RPC0", "RPC1")] == [0, 2, 2]
    assert parts["RPC0"].kv_bytes == parts["RPC1"].kv_bytes > 0
    assert placed.budgets["RPC0"] <= MEMORY


def test_no_room(workers: tuple[str, ...], llama_file: Path) -> None:
    with pytest.raises(YarnEdgeError, match=r"does not fit into .* the longest are"):
        place(llama_file, Wanted(split=SplitRequest(workers, "rpc0=4"), ctx=1 << 20))


def test_fit_says_what_goes_where(
    workers: tuple[str, ...], llama_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", str(llama_file), "--rpc", ",".join(workers), "--ctx", "512"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [part["layers"] for part in told["choice"]["parts"]] == [0, 2, 2]
    assert "rpc0=2,rpc1=2" in told["commands"][0]
    assert main(words) == 0
    assert "llama.gguf with 512 tokens, split" in capsys.readouterr().out


def test_compare_with_one_machine(
    workers: tuple[str, ...], llama_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ["--rpc", ",".join(workers), "--layers-on", SPLITS[0]]
    words = [f"{llama_file}@backend=cpu", str(llama_file), *split, "--ctx", "64", "--max-tokens", "64", "--json"]
    assert main(["compare", *words, "--attention", "flash", "--threads", "1"]) == 0
    told = json.loads(capsys.readouterr().out)["models"][0]
    assert (told["kld_mean"], told["top1"]) == (0.0, 1.0)


def run(*words: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "yarn_edge", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("killed", ["while it answers", "frozen"])
def test_a_worker_ends_midway(llama_file: Path, killed: str) -> None:
    if killed == "frozen" and not depth.full:
        pytest.skip("takes 10 s: --full")
    one = WorkerProcess()
    split = ["--rpc", one.address, "--layers-on", "rpc0=4"]
    client = run("chat", str(llama_file), "--raw", "-p", "a", "--max-tokens", "100000", "--ctx", "262144", *split)
    client.stdout.read(1)  # it answers
    start = time.monotonic()
    one.process.kill() if killed == "while it answers" else one.process.send_signal(19)  # SIGSTOP
    _out, told = client.communicate(timeout=30)
    took = time.monotonic() - start
    one.end()
    assert client.returncode == 2
    assert took < (3 if killed == "while it answers" else 10)
    last = told.decode().splitlines()[-1]
    assert last.startswith(f"yarn-edge: error: worker {one.address} is lost: "), told.decode()
