"""`--calibrate`: the moments are those of what transformers' layers are given, and the files say what they were made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.cli import main
from yarn_edge.convert.moments.collect import CalibrationSettings, collect_moments
from yarn_edge.convert.moments.proof import held_out_tokens
from yarn_edge.gguf.read import read_gguf
from yarn_edge.sample_text import sample_text

from support import tiny

WIDTH = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    tiny.write_checkpoint(folder / "ck", hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    assert main(["convert", str(folder / "ck"), "-o", str(folder / "f32.gguf"), "--quant", "F32", "--quiet"]) == 0
    (folder / "a.txt").write_text(sample_text()[:6000], encoding="utf-8")
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300, encoding="utf-8")
    return folder


def test_moments_are_those_of_transformers_layers(folder: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    texts = {name: (folder / name).read_text(encoding="utf-8") for name in ("a.txt", "b.txt")}
    settings = CalibrationSettings(texts, tokens=1024, window=256)
    moments = collect_moments(folder / "f32.gguf", settings, tmp_path)
    assert moments.tokens == 1024
    assert moments.input_of["blk.1.attn_v.weight"] == moments.input_of["blk.1.attn_q.weight"]
    # q, k and v share an input, and so do gate and up; and that of the output matrix.
    assert len(moments.sums) == 2 * 4 + 1
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "ck", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ck")
    matrices = {"blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj, "output.weight": model.lm_head}
    found: dict[str, list[np.ndarray]] = {name: [] for name in matrices}
    for name, module in matrices.items():
        module.register_forward_pre_hook(lambda _m, x, of=found[name]: of.append(x[0].double().flatten(0, -2).numpy()))
    for text in settings.texts.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for i in range(2):
            start = i * ((len(ids) - held_out_tokens(len(ids), 2)) // 256) // 2 * 256
            with torch.inference_mode():
                model(torch.tensor([ids[start : start + 256]]), use_cache=False)
    for name, inputs in found.items():
        x = np.concatenate(inputs)
        assert len(x) == moments.rows[name] == 1024
        wanted = x.T @ x
        apart = np.linalg.norm(moments.sums[name] - wanted) / np.linalg.norm(wanted)
        assert apart < 1e-3  # the cache is in half precision


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_both_commands(folder: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"quantize": folder / "f32.gguf", "convert": folder / "ck"}[command]
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    texts = f"{folder / 'a.txt'},{folder / 'b.txt'}"
    words = [command, str(source), "-o"]
    assert main([*words, str(out), "--calibrate", texts, "--calibrate-tokens", "1024"]) == 0
    told = capsys.readouterr().err
    assert "error feedback in 15 of 16 tensors with K-quants, from 1024 tokens" in told
    assert "warning: one text" not in told
    assert "whole.gguf:" not in told
    assert main([*words, str(plain), "--kernels", "fast"]) == 0
    made, usual = read_gguf(out), read_gguf(plain)
    assert made.metadata["yarn_edge.quantizer"].endswith(", error feedback")
    assert made.metadata["yarn_edge.calibration.texts"] == "a.txt, b.txt"
    assert made.metadata["yarn_edge.calibration.tokens"] == 1024
    assert "quantize.imatrix.file" not in made.metadata
    assert not any("calibration" in key for key in usual.metadata)
    assert {n: t.type_name for n, t in made.tensors.items()} == {n: t.type_name for n, t in usual.tensors.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "plain.gguf"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--calibrate-tokens", "2048"], "pass --calibrate TEXT as well"),
        (["--calibrate", ","], "--calibrate is empty"),
        (["--calibrate", "{a}", "--imatrix", "{a}"], "leave out --imatrix"),
        (["--calibrate", "{a}", "--kernels", "ggml"], "leave out --kernels ggml"),
        (["--calibrate", "{missing}"], "No such file"),
        (["--calibrate", "{short}"], "has 9 characters: calibration needs at least 256 tokens of each text"),
        (["--calibrate", "{words}"], "calibration needs at least 256 of each text"),
        (["--calibrate", "{a}", "--quant", "Q8_0"], "--calibrate changes K-quants, and Q8_0 has none here"),
    ],
    ids=["tokens", "empty", "imatrix", "kernels", "missing", "short", "words", "no K-quants"],
)
def test_what_cannot_be_done(
    folder: Path, tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "words.txt").write_text("the quick brown fox " * 20)
    names = {name: tmp_path / f"{name}.txt" for name in ("missing", "short", "words")} | {"a": folder / "a.txt"}
    words = [flag.format(**names) for flag in flags]
    assert main(["quantize", str(folder / "f32.gguf"), "-o", str(tmp_path / "o.gguf"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt", "words.txt"]
