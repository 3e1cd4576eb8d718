"""Our attention in llama.cpp's graph: every architecture next to ggml's plain attention, beside live positions, beside a tap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.attention import compiled as attention_code
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.callback import GraphCallback
from yarn_edge.graph.fast_attention import FastAttention
from yarn_edge.graph.live_rope import LiveRopes
from yarn_edge.graph.opening import open_context
from yarn_edge.graph.tap import GraphTap
from yarn_edge.llama_rules.description import canonical_keys
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml import TensorStruct, op_number
from yarn_edge.runtime.kv_cache import KV_TYPES
from yarn_edge.runtime.model import Model

from support import depth, tiny_gguf

SETTINGS = ContextSettings(n_ctx=256, n_batch=64, n_ubatch=64, threads=2, attention="fast")
TOKENS = list(range(5, 65))
# Half-precision values of the cache are the same for both; what is left is the order of float32 sums.
CLOSE = 2e-4
LEFT_TO_GGML = {"gemma2"}
COMPRESSED = {"deepseek2", "mistral4"}  # MLA
WITHOUT_FLASH = {"grok"}  # llama.cpp forces it off


def evaluated(context: Context) -> np.ndarray:
    """Logits of a document, of tokens one by one, and of a few at once."""
    found = []
    context.evaluate(TOKENS[:40], 0, "all")
    found.append(context.logits())
    for at in range(40, 50):
        context.evaluate([TOKENS[at]], at)
        found.append(context.logits())
    context.evaluate(TOKENS[50:], 50, "all")
    return np.concatenate([*found, context.logits()])


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("architecture", sorted(tiny_gguf.ARCHITECTURES))
def test_every_architecture(tmp_path: Path, architecture: str) -> None:
    """Taken over: the same logits as plain attention but for rounding. Left to ggml: still an answer."""
    path = tiny_gguf.write(tmp_path / "m.gguf", architecture)
    with Model(path) as model:
        try:
            edit = FastAttention(model, SETTINGS)
        except YarnEdgeError as error:
            if "no fast attention" not in str(error) or architecture not in COMPRESSED:
                raise
            return
        with Context(model, SETTINGS, hook=GraphCallback([edit])) as context:
            found = evaluated(context)
        with open_context(model, replace(SETTINGS, attention="plain")) as context:
            expected = evaluated(context)
        if architecture in LEFT_TO_GGML:
            assert edit.left > 0
            assert edit.calls == 0
            return
        assert edit.left == 0
        assert (edit.calls >= edit.taken > 0) is (architecture not in WITHOUT_FLASH)
        assert divergence(expected, found) < CLOSE


def test_a_real_model(smol_f32: Path) -> None:
    """F32 weights: the divergence from plain attention is rounding, hundreds of times smaller than flash attention's."""
    kl = {}
    with Model(smol_f32) as model:
        settings = replace(SETTINGS, n_ctx=1024, n_batch=256, n_ubatch=256)
        text = np.random.default_rng(0).integers(0, model.n_vocab, 600).tolist()
        logits = {}
        for attention in ("plain", "fast", "flash"):
            with open_context(model, replace(settings, attention=attention)) as context:
                context.evaluate(text[:512], 0, "none")
                context.evaluate(text[512:528], 512, "all")
                found = [context.logits()]
                for at in range(528, 540):
                    context.evaluate([text[at]], at)
                    found.append(context.logits())
                logits[attention] = np.concatenate(found)
        kl = {name: divergence(logits["plain"], logits[name]) for name in ("fast", "flash")}
    assert kl["fast"] < 1e-6
    assert kl["fast"] < kl["flash"] / 100


@pytest.mark.parametrize("kind", [kind for kind in KV_TYPES if kind not in ("f32", "iq4_nl", "f16", "bf16")])
def test_a_cache_of_each_type(smol_f32: Path, kind: str) -> None:
    """Next to ggml's flash attention, which reads the same quantized cache with half-precision sums."""
    if kind != "q8_0" and not depth.full:
        pytest.skip("--full: each type is a kernel to compile")
    with Model(smol_f32) as model:
        tokens = np.random.default_rng(1).integers(0, model.n_vocab, 120).tolist()
        logits = []
        for attention in ("fast", "flash"):
            with open_context(model, replace(SETTINGS, kv_type=kind, attention=attention)) as context:
                context.evaluate(tokens[:100], 0, "none")
                context.evaluate(tokens[100:], 100, "all")
                logits.append(context.logits())
    assert divergence(*logits) < 0.01


def test_sequences_side_by_side_answer_as_alone(smol_f32: Path) -> None:
    """Bit for bit, as far as attention goes: the last layer's products are ggml's."""
    with Model(smol_f32) as model:
        settings = replace(SETTINGS, n_seq=3, n_ctx=256, n_batch=192, n_ubatch=192)
        edit = FastAttention(model, settings)
        random = np.random.default_rng(2)
        sequences = [random.integers(0, model.n_vocab, 48).tolist() for _ in range(3)]
        with Context(model, settings, hook=GraphCallback([edit])) as context:
            context.evaluate_side_by_side(sequences)
            together = context.logits()
        assert edit.left == 0
        with open_context(model, replace(settings, attention="plain")) as context:
            context.evaluate_side_by_side(sequences)
            assert divergence(context.logits(), together) < 1e-6


def test_beside_live_positions(tmp_path: Path) -> None:
    """Both edits run in one compiled callback."""
    scaling = RopeScaling(
        "yarn",
        10000.0,
        tiny_gguf.HEAD_DIM,
        256,
        4.0,
        attention_factor=yarn_attention_factor(4.0),
        truncate=False,
        beta_fast=8.0,
    )
    plain = tiny_gguf.write(tmp_path / "plain.gguf", "qwen3")
    plan = plan_rope(scaling, "qwen3")
    assert plan.form == "live"
    path = tmp_path / "live.gguf"
    keys = {**plan.keys, **canonical_keys(scaling, plan.form, None), "qwen3.context_length": scaling.extended_context}
    edit_gguf_files(read_gguf(plain), [path], set_keys=keys, flush=False)
    with Model(path) as model:
        live = model.positions.explicit_arguments.live
        assert live is not None
        edits = [LiveRopes(model, live), FastAttention(model, SETTINGS)]
        hook = GraphCallback(edits)
        assert not hook.in_python
        with Context(model, SETTINGS, hook=hook) as context:
            found = evaluated(context)
        with open_context(model, replace(SETTINGS, attention="plain")) as context:
            assert divergence(evaluated(context), found) < CLOSE
        assert edits[1].calls > 0


class Counter(GraphTap):
    """Counts the nodes of one operation."""

    def __init__(self, op: int) -> None:
        self.op, self.seen = op, 0

    def see(self, address: int, asking: bool) -> bool:
        self.seen += asking and TensorStruct.from_address(address).op == self.op
        return False


def test_beside_a_tap(smol_f32: Path) -> None:
    """A tap sees the graph as it is computed: with our operation in place of ggml's."""
    with Model(smol_f32) as model:
        tap = Counter(op_number(b"CUSTOM"))
        with open_context(model, SETTINGS, tap=tap) as context:
            context.evaluate([1, 2, 3], 0)
        assert tap.seen == model.n_layer


@pytest.mark.parametrize(("few", "many"), [(True, False), (False, True)])
def test_only_some_of_it(smol_f32: Path, few: bool, many: bool) -> None:
    with Model(smol_f32) as model:
        edit = FastAttention(model, SETTINGS, few=few, many=many)
        with Context(model, SETTINGS, hook=GraphCallback([edit])) as context:
            for tokens, ours in (([1], few), (list(range(1, 40)), many)):
                before = edit.calls
                context.evaluate(tokens, 0 if len(tokens) == 1 else 1)
                assert (edit.calls > before) is ours


def test_what_cannot_be_fast_says_so(smol_f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(smol_f32) as model:
        for kind, words in (("f32", "rounds a cache of type f32"), ("iq4_nl", "no kernel for a cache of type iq4_nl")):
            with pytest.raises(YarnEdgeError, match=words):
                open_context(model, replace(SETTINGS, kv_type=kind))
        monkeypatch.setattr("yarn_edge.graph.fast_attention.why_not_compiled", lambda: "Numba is not installed")
        with pytest.raises(YarnEdgeError, match="no fast attention: Numba is not installed"):
            open_context(model, SETTINGS)
    monkeypatch.undo()
    monkeypatch.setattr("yarn_edge.attention.choose.why_not_compiled", lambda: "Numba is not installed")
    assert attention_code.why_not_compiled() is None


def test_nodes_that_no_kernel_knows_are_left_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gemma2 has a soft cap."""
    with Model(tiny_gguf.write(tmp_path / "m.gguf", "gemma2")) as model, open_context(model, SETTINGS) as context:
        context.evaluate(TOKENS[:10], 0)
        context.evaluate([1], 10)
    told = capsys.readouterr().err
    assert told.count("ggml computes some of this model's attention") == 1
