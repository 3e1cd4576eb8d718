"""The proof of calibrated files: KL as transformers and `compare` give it, on tokens that calibrated nothing, kept in the file; else nothing
is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.cli import main
from yarn_edge.convert import proving
from yarn_edge.convert.imatrix.matrix import write_imatrix
from yarn_edge.convert.moments.collect import CalibrationSettings, _windows, collect_moments
from yarn_edge.convert.moments.proof import held_out_tokens, kl_of, n_scored, proof_windows
from yarn_edge.convert.proving import CalibrationProof, ProvedLoss
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.text_file import read_text

from support import tiny

KEY = "yarn_edge.calibration.kl_"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proof")
    tiny.write_checkpoint(folder / "ck", hidden_size=256, intermediate_size=512)
    assert main(["convert", str(folder / "ck"), "-o", str(folder / "f32.gguf"), "--quant", "F32", "--quiet"]) == 0
    (folder / "a.txt").write_text(" ".join(map(str, range(1500))), encoding="utf-8")
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300, encoding="utf-8")
    (folder / "short.txt").write_text("in the beginning was the word " * 12, encoding="utf-8")
    return folder


def texts_of(folder: Path, *names: str) -> dict[str, str]:
    return {name: read_text(folder / name) for name in names}


@pytest.mark.parametrize(
    ("n_tokens", "n_texts", "held"),
    [(100_000, 1, 2048), (100_000, 2, 1024), (4096, 2, 512), (1024, 1, 128), (1023, 1, 0), (100_000, 17, 0)],
)
def test_how_much_is_held_out(n_tokens: int, n_texts: int, held: int) -> None:
    assert held_out_tokens(n_tokens, n_texts) == held


def test_what_is_held_out_does_not_calibrate(folder: Path) -> None:
    texts = texts_of(folder, "a.txt")
    with Model(folder / "f32.gguf") as model:
        tokens = model.tokenize(texts["a.txt"], add_special=False, parse_special=False)
        cut = _windows(model, CalibrationSettings(texts, tokens=1 << 20, window=256))
    held = proof_windows(folder / "f32.gguf", texts)["held_out"]
    n = len(tokens) // 8
    assert [t for w in held for t in w] == tokens[-n:][: len(held) * len(held[0])]
    assert len(held[0]) == min(n, 1024)
    rest = [t for w in cut for t in w]
    assert rest == tokens[: len(rest)]  # numbers do not repeat
    assert len(tokens) - n - 256 < len(rest) <= len(tokens) - n


def test_kl_is_that_of_transformers(folder: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "ck", dtype=torch.float32).eval()
    windows = [list(range(5, 105)), list(range(280, 5, -1))]

    def log_p() -> list[Any]:
        with torch.inference_mode():
            return [model(torch.tensor([w])).logits[0].double().log_softmax(-1) for w in windows]

    before = log_p()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.3)
    model.save_pretrained(tmp_path / "ck")
    tiny.write_tokenizer(tmp_path / "ck")
    other = tmp_path / "other.gguf"
    assert main(["convert", str(tmp_path / "ck"), "-o", str(other), "--quant", "F32", "--quiet"]) == 0
    source = folder / "f32.gguf"
    itself, found = kl_of(source, [source, other], windows, tmp_path, None)
    assert max(float(np.abs(kl).max()) for kl in itself) < 1e-12
    for window, p, q, kl in zip(windows, before, log_p(), found, strict=True):
        wanted = (p.exp() * (p - q)).sum(-1)[len(window) // 2 : -1].numpy()
        assert len(kl) == len(wanted) == n_scored(window)
        np.testing.assert_allclose(kl, wanted, rtol=0.02)


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """A file calibrated with a.txt and b.txt."""
    out = folder / "out.gguf"
    words = ["quantize", str(folder / "f32.gguf"), "-o", str(out), "--calibrate-tokens", "1024", "--quiet"]
    assert main([*words, "--calibrate", f"{folder / 'a.txt'},{folder / 'b.txt'}"]) == 0
    return out


def test_the_figures_are_those_of_compare(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(folder / "f32.gguf"), str(out), "--protocol", "llama.cpp", "--ctx", "1024"]
    assert main([*words, "--max-tokens", "2048", "--keep-base", "memory", "--json", "--quiet"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["kld_mean"] == pytest.approx(read_gguf(out).metadata[KEY + "other_kind"], rel=1e-6)


def test_the_importance_matrix_is_that_of_the_same_reading(folder: Path, out: Path, tmp_path: Path) -> None:
    source, other = folder / "f32.gguf", tmp_path / "other.gguf"
    texts = texts_of(folder, "a.txt", "b.txt")
    moments = collect_moments(source, CalibrationSettings(texts, 1024), tmp_path)
    write_imatrix(moments.importance(), tmp_path / "im")
    words = ["quantize", str(source), "-o", str(other), "--imatrix", str(tmp_path / "im"), "--kernels", "fast"]
    assert main([*words, "--quiet"]) == 0
    windows = proof_windows(source, texts)
    every = [
        window for of_kind in windows.values() for window in of_kind
    ]  # together, as in the proof: in a context of one size
    (found,) = kl_of(source, [other], every, tmp_path, None)
    first = 0
    for kind, of_kind in windows.items():
        mean = np.concatenate(found[first : first + len(of_kind)]).mean()
        first += len(of_kind)
        assert mean == pytest.approx(read_gguf(out).metadata[f"{KEY}imatrix_{kind}"], rel=1e-6)


def test_inspect_tells_the_figures(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = read_gguf(out).metadata
    assert main(["inspect", str(out)]) == 0
    assert f"kl_held_out {kept[KEY + 'held_out']:.6g}; " in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["calibration"]
    assert told["kl_imatrix_other_kind"] == kept[KEY + "imatrix_other_kind"] > 0
    assert told["texts"] == "a.txt, b.txt"


def test_texts_that_are_too_short_or_bundled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "f32.gguf"
    texts = {**texts_of(folder, "short.txt"), "bible.txt": sample_text()}
    both = CalibrationProof.of(source, texts, folder, None)
    told = capsys.readouterr().err
    assert "note: short.txt: its " in told
    assert "note: bible.txt contains the bundled text" in told
    assert "bible.txt: its" not in told
    assert set(both.keys()) == {KEY + k for k in ("held_out", "other_kind", "imatrix_held_out", "imatrix_other_kind")}
    alone = CalibrationProof.of(source, texts_of(folder, "short.txt"), folder, None)
    assert set(alone.keys()) == {KEY + "other_kind", KEY + "imatrix_other_kind"}
    assert "contains the bundled text" not in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "worse"), [(0.01, True), (0.001, False), (-0.01, False)])
def test_a_warning_needs_two_standard_errors(shift: float, worse: bool) -> None:
    random = np.random.default_rng(0)
    imatrix = [random.random(512), random.random(512)]
    noise = np.repeat(random.standard_normal((2, 8)), 64, axis=1) * 0.01  # of blocks: a standard error of 0.0025
    loss = ProvedLoss.of([kl + shift + n for kl, n in zip(imatrix, noise, strict=True)], imatrix)
    assert loss.apart.stderr == pytest.approx(noise[:, ::64].std(ddof=1) / 4, rel=1e-6)
    assert loss.is_worse is worse


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError("disk")], ids=["Ctrl-C", "memory", "disk"])
def test_a_proof_that_ends_early_gives_no_name(
    error: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> None:
        raise error

    monkeypatch.setattr(proving, "kl_of", fail)
    words = ["quantize", str(folder / "f32.gguf"), "-o", str(tmp_path / "out.gguf"), "--calibrate-tokens", "1024"]
    assert main([*words, "--calibrate", str(folder / "b.txt"), "--quiet"]) != 0
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == (error is KeyboardInterrupt)  # the folder with which the next run goes on
    assert all(name.endswith(".partial") for name in left)


def test_a_file_that_is_worse_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worse(_source: Path, files: list[Path], windows: list[list[int]], *_others: Any) -> Any:
        return [[np.full(n_scored(w), 0.3 - 0.1 * i) for w in windows] for i in range(len(files))]

    monkeypatch.setattr(proving, "kl_of", worse)
    words = ["quantize", str(folder / "f32.gguf"), "-o", str(tmp_path / "out.gguf"), "--calibrate-tokens", "1024"]
    assert main([*words, "--calibrate", str(folder / "b.txt"), "--json"]) == 0
    captured = capsys.readouterr()
    told = captured.err
    assert (
        "Q4_K_M: KL to the source in nats: held-out text 0.3000 ± 0.0000 (importance matrix: 0.2000 ± 0.0000), bundled"
        in told
    )
    for text in ("held-out", "bundled"):
        assert f"warning: Q4_K_M: on the {text} text worse than with the importance matrix, by 0.1000 ± 0.0000" in told
    figures = json.loads(captured.out)["files"][0]["calibration"]
    assert figures["held_out"]["kl"] == pytest.approx(0.3)
    assert figures["other_kind"]["kl_imatrix"] == pytest.approx(0.2)
    assert read_gguf(tmp_path / "out.gguf").metadata[KEY + "imatrix_held_out"] == pytest.approx(0.2)
