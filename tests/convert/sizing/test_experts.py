"""Experts: a dense model that is cut into experts has the dense one's gradients and moments, and gets a file of a size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.cli import main
from yarn_edge.convert.moments.gradients import Gradients, output_gradients
from yarn_edge.convert.moments.kept import read_moments
from yarn_edge.gguf.read import read_gguf
from yarn_edge.sample_text import sample_text

from support import tiny
from support.cut_experts import cut_into_experts

N, FFN = 2, 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tiny.write_checkpoint(folder / "dense", hidden_size=256, intermediate_size=FFN, num_hidden_layers=1)
    cut_into_experts(folder / "dense", folder / "ck", N)
    (folder / "a.txt").write_text(sample_text()[:6000], encoding="utf-8")
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gradients(folder: Path) -> dict[str, Gradients]:
    tokens = [list(range(5, 261)), list(range(20, 276))]
    return {name: output_gradients(folder / name, tokens) for name in ("dense", "ck")}


def test_the_streamed_pass_is_that_of_the_whole_model(folder: Path, gradients: dict[str, Gradients]) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    tokens, found = torch.tensor([list(range(5, 261)), list(range(20, 276))]), {}
    parts = {"gate_proj": model.model.layers[0].mlp.gate_proj, "q_proj": model.model.layers[0].self_attn.q_proj}
    parts["embedding"] = model.model.embed_tokens

    def watch(name: str, result: torch.Tensor) -> None:
        result.register_hook(lambda gradient: found.update({name: gradient}))

    for name, module in parts.items():
        module.register_forward_hook(lambda _m, _x, result, name=name: watch(name, result))
    logits, drawn = model(tokens).logits.flatten(0, 1), torch.Generator().manual_seed(0)
    labels = [torch.multinomial(part.softmax(-1), 1, generator=drawn)[:, 0] for part in logits.detach().split(256)]
    torch.nn.functional.cross_entropy(logits, torch.cat(labels), reduction="sum").backward()
    for name, part in (("gate_proj", "mlp"), ("q_proj", "self_attn")):
        wanted = found[name].flatten(0, 1).double().square().mean(0).numpy()
        np.testing.assert_allclose(gradients["dense"].rows[f"layers.0.{part}.{name}.weight"], wanted, rtol=1e-3)
    of_embeddings = found["embedding"].flatten(0, 1).double().numpy()
    wanted = of_embeddings.T @ of_embeddings / len(of_embeddings)
    np.testing.assert_allclose(gradients["dense"].embedding, wanted, rtol=1e-3, atol=1e-3 * wanted.max())


def test_gradients_of_experts_are_those_of_the_dense_model(gradients: dict[str, Gradients]) -> None:
    dense, cut = gradients["dense"].rows, gradients["ck"].rows
    both = cut["layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_allclose(both[:, : FFN // N].ravel(), dense["layers.0.mlp.gate_proj.weight"], rtol=1e-3)
    np.testing.assert_allclose(both[:, FFN // N :].ravel(), dense["layers.0.mlp.up_proj.weight"], rtol=1e-3)
    down = dense["layers.0.mlp.down_proj.weight"] / N**2  # each has the weight 1 / N
    np.testing.assert_allclose(cut["layers.0.mlp.experts.down_proj"], np.tile(down, (N, 1)), rtol=1e-3)


def test_a_file_of_a_size(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = str(tmp_path / "m.gguf")
    words = ["convert", str(folder / "ck"), "-o", str(tmp_path / "o.gguf"), "--size", "600KB", "--moments", kept]
    words += ["--calibrate", f"{folder / 'a.txt'},{folder / 'b.txt'}", "--calibrate-tokens", "1024"]
    assert main(words) == 0
    assert "error feedback in 8 of 8 tensors with K-quants, from 1024 tokens\n" in capsys.readouterr().err
    made = read_gguf(tmp_path / "o.gguf")
    assert 0.9 * 600_000 < (tmp_path / "o.gguf").stat().st_size <= 600_000
    assert made.tensors["blk.0.ffn_down_exps.weight"].shape == (FFN // N, 256, N)
    moments = read_moments(Path(kept), str(read_gguf(kept).metadata["yarn_edge.moments.model"]), None)
    first, second = (moments.sums[f"blk.0.ffn_gate_exps.weight:{expert}"] for expert in range(N))
    np.testing.assert_array_equal(first, second)  # all tokens reach both
    assert moments.input_name("blk.0.ffn_up_exps.weight", 256, 1) == "blk.0.ffn_gate_exps.weight:1"
    assert moments.input_name("token_embd.weight", 256) == "token_embd.weight"
    assert moments.gradients is not None
    unseen = replace(moments, gradients=replace(moments.gradients, tokens=255))
    assert unseen.input_name("token_embd.weight", 256) is None
    few = replace(moments, rows={**moments.rows, "blk.0.ffn_gate_exps.weight:1": 255})
    assert few.input_name("blk.0.ffn_up_exps.weight", 256, 1) is None
