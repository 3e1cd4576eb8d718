"""Vulkan, on whichever device there is (a software one counts): proofs, live positions and split layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.graph.opening import open_context
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.devices import devices_of
from yarn_edge.runtime.layer_split import given_split
from yarn_edge.runtime.model import Model
from yarn_edge.split_flags import SplitRequest
from yarn_edge.verify.command import verify

from support import tiny_gguf
from support.live_files import live_file
from support.tiny_gguf import N_LAYERS

pytestmark = pytest.mark.skipif(
    not devices_of("vulkan"),
    reason="no Vulkan device: make engine-test BACKENDS=vulkan, with a driver such as lavapipe",
)
SETTINGS = ContextSettings(n_ctx=256, n_batch=32, n_ubatch=16, kv_type="f32", threads=1, attention="plain")
TOKENS = list(range(5, 29))
SPLITS = ["vulkan0=4", "cpu=2,vulkan0=2"]


def distributions(path: Path, split: str | None) -> np.ndarray:
    place = None if split is None else given_split(split, N_LAYERS, ggml.devices(), path)
    with Model(path, device=place) as model, open_context(model, replace(SETTINGS)) as context:
        context.evaluate(TOKENS, 0, "all")
        logits = context.logits().astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("form", ["keys", "live"])
@pytest.mark.parametrize("split", SPLITS)
def test_vulkan_runs_the_same_positions(tmp_path: Path, split: str, form: str) -> None:
    path = tmp_path / "model.gguf"
    if form == "keys":
        tiny_gguf.write(path, "llama")
    else:
        live_file(path, "qwen3")
    here, there = distributions(path, None), distributions(path, split)
    assert (np.exp(here) * (here - there)).sum(axis=1).max() < 1e-5  # kernels of its own
    checks = {c.name: c for c in verify(path, backend=SplitRequest((), split), threads=1)}
    assert checks["kernel:vulkan0"].status == checks["live-graph:split"].status == "pass"
