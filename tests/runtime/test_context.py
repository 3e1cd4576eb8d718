"""What a context refuses before llama.cpp allocates anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime import kv_cache
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.kv_cache import KV_TYPES, kv_bytes
from yarn_edge.runtime.model import Model

from support import tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama")) as loaded:
        yield loaded


@pytest.mark.parametrize(
    "values, error",
    [
        ({"kv_type": "f8"}, "--kv-type 'f8' is unknown; known: f32, f16"),
        ({"n_ctx": -1}, "contexts of -1 tokens"),
        ({"n_batch": 0}, "in batches of 0"),
        ({"n_seq": 257}, "257 contexts"),
        ({"threads": 0}, "0 threads: llama.cpp takes 1 to"),
    ],
)
def test_settings_that_llama_cpp_cannot_take(values: dict[str, Any], error: str) -> None:
    with pytest.raises(YarnEdgeError, match=error):
        ContextSettings(**values)


def test_a_cache_larger_than_the_free_memory_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by whoever makes a Context without asking `yarn_edge.memory` first; all sequences count."""
    needed = kv_bytes(model.gguf, 2 * 512, "f32")
    assert needed is not None
    settings = ContextSettings(n_ctx=512, n_seq=2, kv_type="f32", threads=1)
    monkeypatch.setattr(kv_cache, "available_bytes", lambda: needed)
    with Context(model, settings) as context:
        assert context.n_ctx == 512
    monkeypatch.setattr(kv_cache, "available_bytes", lambda: needed - 1)
    with pytest.raises(
        YarnEdgeError, match=r"a context of 1024 tokens with a cache of type f32 needs .* GiB"
    ) as refusal:
        Context(model, settings)
    assert "\n" not in str(refusal.value)


def test_the_closed_form_is_for_plain_caches_only(model: Model) -> None:
    sizes = {kv_type: kv_bytes(model.gguf, 256, kv_type) for kv_type in KV_TYPES}
    assert sizes["f32"] == 2 * (sizes["f16"] or 0) > 0
    other = replace(model.gguf, metadata={**model.gguf.metadata, "general.architecture": "gemma3"})
    assert kv_bytes(other, 256, "f16") is None
