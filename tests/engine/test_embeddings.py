"""Vectors of texts, against llama.cpp's own pooling, which needs the whole text in one graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from yarn_edge.engine import embeddings
from yarn_edge.engine.embeddings import SLICE, Embedder
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import tiny_gguf
from support.gguf_files import BYTE_TOKENIZER, random_tensors, write_gguf

SETTINGS = ContextSettings(n_ctx=512, threads=1)
TOKENS = [(7 * n) % 256 for n in range(2 * SLICE + 44)]
POOLINGS = {None: 1, 0: 1, 1: 1, 2: 2, 3: 3}  # the file's -> llama.cpp's


def tiny_model(folder: Path, pooling: int | None) -> Path:
    keys = {f"llama.{name}": value for name, value in tiny_gguf.model_keys("llama").items()}
    more = {} if pooling is None else {"llama.pooling_type": pooling}
    tensors = random_tensors(tiny_gguf.tensor_shapes("llama"))
    return write_gguf(folder / f"{pooling}.gguf", "llama", BYTE_TOKENIZER | keys | more, tensors)


@pytest.mark.parametrize("pooling, theirs", POOLINGS.items(), ids=["not said", "none", "mean", "first", "last"])
def test_vectors_are_llama_cpps(pooling: int | None, theirs: int, tmp_path: Path) -> None:
    import llama_cpp

    path = tiny_model(tmp_path, pooling)
    with Model(path) as model:
        made = Embedder(model, SETTINGS, 512)
        ours = [made.vector(tokens) for tokens in (TOKENS, TOKENS[:9], TOKENS)]
        with pytest.raises(YarnEdgeError, match="the text has 513 tokens, the context for embeddings holds 512"):
            made.vector([1] * 513)
        with pytest.raises(YarnEdgeError, match="an empty text has no embedding"):
            made.vector([])
        made.close()
    whole = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": 1, "n_threads_batch": 1}
    other = llama_cpp.Llama(str(path), embedding=True, pooling_type=theirs, verbose=False, **whole)
    try:
        for mine, tokens in zip(ours, (TOKENS, TOKENS[:9]), strict=False):
            batch = other._batch
            batch.reset()
            batch.add_sequence(tokens, 0, True)
            other._ctx.kv_cache_clear()
            other._ctx.decode(batch)
            data = llama_cpp.llama_get_embeddings_seq(other._ctx.ctx, 0)
            theirs_vector = np.array(data[: len(mine)], np.float64)
            assert mine == pytest.approx(
                theirs_vector / np.linalg.norm(theirs_vector), abs=2e-3
            )  # half-precision caches, other batches
    finally:
        other.close()
    assert np.array_equal(ours[0], ours[2])  # whatever was asked in between
    assert np.linalg.norm(ours[0]) == pytest.approx(1, abs=1e-12)


def test_no_memory_and_no_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Model(tiny_model(tmp_path, 4)) as model,
        pytest.raises(YarnEdgeError, match="pooling_type is 4: it makes no vectors"),
    ):
        Embedder(model, SETTINGS, 512).vector([1])
    with Model(tiny_model(tmp_path, None)) as model:
        needed: list[int] = []
        monkeypatch.setattr(
            embeddings, "_bytes_of", lambda _s, settings: needed.append(settings.n_ctx) or settings.n_ctx
        )
        monkeypatch.setattr(embeddings, "spare_bytes", lambda _free=None: 300)
        made = Embedder(model, SETTINGS, 2048)
        with pytest.raises(KeyboardInterrupt):
            made.vector([1], lambda: True)
        assert (needed, made.n_ctx) == ([2048, 1024, 512, 256], 256)
        made.close()
        monkeypatch.setattr(embeddings, "spare_bytes", lambda _free=None: 255)
        with pytest.raises(YarnEdgeError, match="no memory for embeddings: a context of 256 tokens"):
            Embedder(model, SETTINGS, 300).vector([1])
