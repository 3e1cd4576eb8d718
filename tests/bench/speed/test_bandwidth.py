"""Ceilings: bytes of a token against sums written out here, and bandwidth without asking how fast this machine is."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.bench.speed import bandwidth, ceilings
from yarn_edge.bench.speed.bandwidth import Work, copy_bandwidth, last_level_cache_bytes, read_bandwidth
from yarn_edge.bench.speed.ceilings import Ceilings, bytes_per_token, weight_bytes_per_token
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.kv_cache import has_plain_cache

from support import tiny_gguf


def tiny(folder: Path, architecture: str) -> GGUFFile:
    return read_gguf(tiny_gguf.write(folder / f"{architecture}.gguf", architecture))


def sizes(architecture: str) -> dict[str, int]:
    """Bytes of the float32 tensors, by name."""
    return {name: 4 * math.prod(shape) for name, shape in tiny_gguf.tensor_shapes(architecture).items()}


def test_a_dense_model_reads_every_weight_and_one_row_of_its_embeddings(tmp_path: Path) -> None:
    file, all_of = tiny(tmp_path, "llama"), sizes("llama")
    weights = sum(all_of.values()) - all_of["token_embd.weight"] + 4 * tiny_gguf.EMBEDDING
    # keys and values, 4 layers, 2 heads of 16, two bytes each
    cache = 2 * tiny_gguf.N_LAYERS * 2 * 16 * 2
    assert bytes_per_token(file, 0, "f16") == weights
    assert bytes_per_token(file, 1000, "f16") == weights + 1000 * cache
    assert bytes_per_token(file, 1000, "q8_0") == weights + 1000 * cache * 34 // 64
    assert has_plain_cache(file)


def test_embeddings_that_are_the_output_matrix_are_read_whole(tmp_path: Path) -> None:
    file, all_of = tiny(tmp_path, "gemma2"), sizes("gemma2")
    assert "output.weight" not in all_of
    assert weight_bytes_per_token(file) == sum(all_of.values()) + 4 * tiny_gguf.EMBEDDING
    # its cache is of another form: a bound without it
    assert not has_plain_cache(file)
    assert bytes_per_token(file, 5000, "f16") == weight_bytes_per_token(file)


def test_experts_count_as_far_as_they_are_used(tmp_path: Path) -> None:
    file, all_of = tiny(tmp_path, "qwen3moe"), sizes("qwen3moe")
    experts = sum(n for name, n in all_of.items() if "_exps." in name)
    assert experts > 0
    used = sum(all_of.values()) - all_of["token_embd.weight"] + 4 * tiny_gguf.EMBEDDING - experts // 2  # 2 of 4
    assert weight_bytes_per_token(file) == used
    broken = replace(file, metadata={**file.metadata, "qwen3moe.expert_used_count": 9})
    with pytest.raises(YarnEdgeError, match="expert_used_count is 9 of 4"):
        weight_bytes_per_token(broken)


def test_layers_that_predict_further_tokens_take_no_part(tmp_path: Path) -> None:
    file = tiny(tmp_path, "llama")
    last = sum(n for name, n in sizes("llama").items() if name.startswith(f"blk.{tiny_gguf.N_LAYERS - 1}."))
    seen = replace(file, metadata={**file.metadata, "llama.nextn_predict_layers": 1})
    assert weight_bytes_per_token(seen) == weight_bytes_per_token(file) - last


@pytest.mark.parametrize("function", [read_bandwidth, copy_bandwidth])
def test_bandwidth_is_a_number(function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_array_bytes", lambda *_sizes: 1 << 22)
    for threads in (1, 3):
        found = function(threads, 0.01)  # type: ignore[operator]
        assert math.isfinite(found)
        assert found > 0


def test_a_pass_is_as_long_as_its_slowest_thread_and_begins_warm() -> None:
    """Threads wait for each other before every pass."""
    order: list[str] = []
    lock = threading.Lock()

    def work(name: str) -> Work:
        def add(what: str) -> None:
            with lock:
                order.append(f"{name} {what}")

        return Work(lambda: add("warm"), lambda: add("measure"))

    seconds = bandwidth._best_pass([work("a"), work("b")], 0.0)
    assert seconds > 0
    assert sorted(order[:2]) == ["a warm", "b warm"]  # pages are touched by all before any is measured
    assert order.count("a measure") == order.count("b measure") >= 1


def test_every_page_is_written_before_it_is_read() -> None:
    parts = bandwidth._parts(3, 8 * 1000)
    assert sum(len(part) for part in parts) == 1000
    for part in parts:
        bandwidth._filler(part)()
        assert np.all(part == -2)


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 1 << 28)
    with pytest.raises(YarnEdgeError, match="close other programs"):
        read_bandwidth(1)


def test_caches_of_the_last_level_are_added_up_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "CACHES", tmp_path)
    assert last_level_cache_bytes() is None
    for cpu, (shared, size) in enumerate([("0-1", "32768K"), ("0-1", "32768K"), ("2", "16M")]):
        for level, text, of in ((1, "32K", str(cpu)), (3, size, shared)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            folder.mkdir(parents=True)
            for name, value in (("level", str(level)), ("size", text), ("shared_cpu_list", of)):
                (folder / name).write_text(f"{value}\n")
    assert last_level_cache_bytes() == 48 << 20
    assert bandwidth._array_bytes(1) == 8 * 48 << 20
    (tmp_path / "cpu0" / "cache" / "index3" / "size").write_text("big\n")
    assert last_level_cache_bytes() is None


def test_ceilings_keep_the_best_and_know_where_memory_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([10e9, 8e9, 12e9])
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda _threads: next(speeds))
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda: 32 << 20)
    found = Ceilings()
    assert found.tok_per_s(10**9, 2) is None
    seen = []
    for _ in range(3):
        found.look(2)
        seen.append(found.tok_per_s(10**9, 2))
    assert seen == [10.0, 10.0, 12.0]
    assert found.tok_per_s(32 << 20, 2) is None  # a cache may hold it
