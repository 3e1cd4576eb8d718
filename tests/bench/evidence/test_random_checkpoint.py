"""Checkpoints of random weights and of holes: `convert` takes them, and a model of 60 GB is planned in little memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from yarn_edge.bench.evidence.random_checkpoint import SHAPES, write_random_checkpoint, write_sparse_checkpoint
from yarn_edge.bench.peers.turns import run_process
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.gguf.read import read_gguf

# The size that Qwen publishes for Qwen3-30B-A3B, less the rows that SmolLM2's vocabulary lacks in the embeddings and the head.
WEIGHTS_30B = 30_532_122_624 - 2 * (151936 - 49152) * 2048
PEAK_BYTES = 200 << 20  # 140 MB were measured; the weights have 60 GB


def test_random_experts_are_converted(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "ck", SHAPES["tiny-MoE"])
    (path,) = convert(folder, str(tmp_path / "out.gguf"), "Q4_0")
    file = read_gguf(path, vocabulary=False)
    assert file.metadata["general.architecture"] == "qwen3moe"
    assert sum(info.n_elements for info in file.tensors.values()) == SHAPES["tiny-MoE"].n_weights


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is sampled from /proc")
def test_a_checkpoint_of_60_gb_is_planned_in_little_memory(tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "ck", SHAPES["30B-A3B"])
    weights = (folder / "model.safetensors").stat()
    assert weights.st_blocks * 512 < 16 << 20 < 60e9 < weights.st_size
    flags = ["--quant", "Q4_K_M", "--kernels", "ggml", "--dry-run", "--json"]
    command = [sys.executable, "-m", "yarn_edge", "convert", folder, "-o", tmp_path / "out.gguf", *flags]
    run = run_process("convert", [str(word) for word in command])
    plan = json.loads(run.stdout)
    (file,) = plan["files"]
    assert plan["n_weights"] == WEIGHTS_30B
    experts = [tuple(t["ne"]) for t in file["tensors"] if "_exps" in t["name"]]
    assert sorted(set(experts)) == [(768, 2048, 128), (2048, 768, 128)]
    assert len(experts) == 3 * 48
    assert run.rss_bytes < PEAK_BYTES
