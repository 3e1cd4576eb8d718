"""A cache whose K and V have different types: sizes by hand and by llama.cpp's own log, what can run, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from yarn_edge.attention.kernel_shapes import kernel_shapes, no_kernels
from yarn_edge.attention.policy import choose_attention
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.kv_cache import kv_bytes, kv_types, requested_kv_type, with_kv_parts
from yarn_edge.runtime.llama_api import captured_log
from yarn_edge.runtime.model import Model

from support import tiny_gguf

# Blocks of 32 (ggml-common.h): a scale of 2 bytes, a minimum of 2 more for _1, fifth bits of 4 for q5, then the levels.
BYTES_OF_32 = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}
KV_HEADS, HEAD_DIM, CELLS = 3, 64, 512  # SmolLM2-135M
LOGGED = re.compile(r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB")


@pytest.fixture(scope="module")
def model(smol_f32: Path) -> Iterator[Model]:
    with Model(smol_f32) as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("word", "k", "v"),
    [
        *((kind, kind, kind) for kind in BYTES_OF_32),
        ("q8_0/q4_0", "q8_0", "q4_0"),
        ("f16/q5_1", "f16", "q5_1"),
        ("iq4_nl/f32", "iq4_nl", "f32"),
    ],
)
def test_sizes_are_those_that_llama_cpp_logs(model: Model, word: str, k: str, v: str) -> None:
    half = model.gguf.required_int("block_count") * KV_HEADS * HEAD_DIM // 32 * CELLS
    assert kv_types(word) == (k, v)
    assert kv_bytes(model.gguf, CELLS, word) == half * (BYTES_OF_32[k] + BYTES_OF_32[v])
    with (
        captured_log() as log,
        Context(model, ContextSettings(n_ctx=CELLS, kv_type=word, threads=1, attention="flash")),
    ):
        pass
    found = LOGGED.search("".join(log))
    assert found is not None
    assert (found[1], found[3]) == (k, v)
    assert float(found[2]) == pytest.approx(half * BYTES_OF_32[k] / 2**20, abs=0.005)
    assert float(found[4]) == pytest.approx(half * BYTES_OF_32[v] / 2**20, abs=0.005)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ((None, None, None), None),
        (("q8_0", None, None), "q8_0"),
        ((None, "q8_0", None), "q8_0/f16"),
        ((None, None, "q8_0"), "f16/q8_0"),
        (("q4_0", "q8_0", None), "q8_0/q4_0"),
        (("q8_0/q4_0", None, "q8_0"), "q8_0"),
        (("f16/f16", None, None), "f16"),
    ],
)
def test_flags_become_one_word(flags: tuple[str | None, str | None, str | None], word: str | None) -> None:
    assert requested_kv_type(*flags) == word


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("q9", None, None), r"--kv-type 'q9' is unknown; known: f32, f16, .*iq4_nl, and two of them as K/V"),
        (("q8_0/", None, None), "--kv-type 'q8_0/' is unknown"),
        (("q8_0/q4_0/f16", None, None), "is unknown"),
        (("", None, None), "--kv-type '' is unknown"),
        (("f16", "q9", None), "--kv-k 'q9' is unknown; known: f32"),
        (("f16", None, ""), "--kv-v '' is unknown"),
        (("f16", None, "q8_0/q4_0"), "--kv-v 'q8_0/q4_0' is unknown"),
    ],
)
def test_unknown_types(flags: tuple[str, str | None, str | None], error: str) -> None:
    with pytest.raises(YarnEdgeError, match=error):
        with_kv_parts(*flags)


def test_equal_types_are_one_word_in_settings() -> None:
    assert ContextSettings(kv_type="q8_0/q8_0") == ContextSettings(kv_type="q8_0")
    with pytest.raises(YarnEdgeError, match="'f16/f8' is unknown"):
        ContextSettings(kv_type="f16/f8")


def test_plain_attention_needs_v_unquantized(model: Model) -> None:
    for word in ("q8_0", "f16/q8_0"):
        with pytest.raises(YarnEdgeError, match="plain attention needs V in one of f32, f16, bf16, not in q8_0"):
            Context(model, ContextSettings(n_ctx=512, kv_type=word, attention="plain"))
    chosen = {
        word: choose_attention(ContextSettings(n_ctx=512, kv_type=word, attention="ggml"), model.gguf, on_cpu=True)
        for word in ("q8_0/f16", "f16/q8_0", "bf16/f32")
    }
    assert {word: settings.attention for word, settings in chosen.items()} == {
        "q8_0/f16": "plain",
        "f16/q8_0": "ggml",
        "bf16/f32": "plain",
    }


def logits(model: Model, kv_type: str, attention: Attention) -> npt.NDArray[np.float32]:
    tokens = model.tokenize(
        "In the beginning God created the heaven and the earth.", add_special=True, parse_special=False
    )
    settings = ContextSettings(n_ctx=256, kv_type=kv_type, attention=attention, threads=1)
    with Context(model, settings) as context:
        context.evaluate(tokens, 0, "all")
        return context.logits()


def test_each_type_goes_to_its_own_part(model: Model) -> None:
    """Plain attention with K quantized is flash attention with the same cache. More bits in one part bring the other's error alone."""
    exact = logits(model, "f32", "plain")
    error = {
        word: float(np.abs(logits(model, word, "flash") - exact).mean())
        for word in ("q8_0/q4_0", "q4_0/q8_0", "q8_0", "q4_0")
    }
    assert error["q8_0"] < min(error["q8_0/q4_0"], error["q4_0/q8_0"])
    assert max(error["q8_0/q4_0"], error["q4_0/q8_0"]) < 1.2 * error["q4_0"]
    plain, flash = (logits(model, "q4_0/f16", kind) for kind in ("plain", "flash"))
    assert np.abs(plain - flash).mean() < 0.1 * np.abs(plain - exact).mean()


def test_keys_that_blocks_do_not_divide(tmp_path: Path) -> None:
    """llama.cpp refuses them for flash attention only; the others would read wrong rows."""
    with Model(tiny_gguf.write(tmp_path / "tiny.gguf", "llama")) as tiny:
        assert tiny_gguf.HEAD_DIM % 32
        plain = ContextSettings(n_ctx=256, kv_type="q8_0/f16", attention="plain")
        with pytest.raises(YarnEdgeError, match=rf"do not divide keys of {tiny_gguf.HEAD_DIM} floats: .*--kv-k"):
            Context(tiny, plain)
        usual = choose_attention(ContextSettings(n_ctx=256, kv_type="q8_0/f16"), tiny.gguf, on_cpu=True)
        assert usual.attention == "ggml"
        with pytest.raises(YarnEdgeError, match="does not divide"):
            Context(tiny, usual)


def test_kernels_take_each_part_by_its_type(model: Model) -> None:
    ((_heads, shape),) = kernel_shapes(model.gguf, "q8_0/q4_0")
    assert (shape.k_type, shape.v_type, shape.d_k, shape.d_v) == ("q8_0", "q4_0", HEAD_DIM, HEAD_DIM)
    assert no_kernels(model.gguf, "q8_0/bf16") is None
    assert "f32" in str(no_kernels(model.gguf, "f16/f32"))
    assert "no kernel for a cache of type iq4_nl/f16" in str(no_kernels(model.gguf, "iq4_nl/f16"))
