"""Moments that are kept: the same files come of them, of a run that was ended as well; what is damaged or another model's is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.cli import main
from yarn_edge.convert.imatrix.matrix import read_imatrix
from yarn_edge.convert.moments.sums import GrowingSums, SumsPlace, sums_floats
from yarn_edge.convert.one_pass import _Worker
from yarn_edge.convert.sizing import sensitivity
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.sample_text import sample_text

from support import tiny

WORDS = ["--calibrate-tokens", "1024", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, texts, its moments, and the file that `convert --size` makes with them."""
    folder = tmp_path_factory.mktemp("kept")
    tiny.write_checkpoint(folder / "ck", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    (folder / "a.txt").write_text(sample_text()[:6000], encoding="utf-8")
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300, encoding="utf-8")
    words = [*sized(folder, folder / "made.gguf"), "--moments", str(folder / "moments.gguf")]
    assert main(words) == 0
    return folder


def calibrated(folder: Path) -> list[str]:
    return ["--calibrate", f"{folder / 'a.txt'},{folder / 'b.txt'}", *WORDS]


def sized(folder: Path, out: Path) -> list[str]:
    return ["convert", str(folder / "ck"), "-o", str(out), "--size", "500KB", *calibrated(folder)]


def test_the_same_file_comes_of_them(folder: Path, tmp_path: Path) -> None:
    kept = ["--moments", str(folder / "moments.gguf"), "--quiet"]
    assert main([*sized(folder, tmp_path / "o.gguf"), *kept]) == 0
    assert (tmp_path / "o.gguf").read_bytes() == (folder / "made.gguf").read_bytes()
    assert main(["convert", str(folder / "ck"), "-o", str(tmp_path / "p.gguf"), "--size", "500KB", *kept]) == 0
    metadata = read_gguf(tmp_path / "p.gguf").metadata  # without texts, the bundled one is all that can be measured on
    assert metadata["yarn_edge.calibration.texts"] == "a.txt, b.txt"


def test_they_are_an_importance_matrix_and_serve_the_gguf_too(folder: Path, tmp_path: Path) -> None:
    f32, kept = str(tmp_path / "f32.gguf"), str(folder / "moments.gguf")
    assert main(["convert", str(folder / "ck"), "-o", f32, "--quant", "F32", "--quiet"]) == 0
    matrix = read_imatrix(kept)
    of_layers = {n for n, t in read_gguf(f32).tensors.items() if n[:4] == "blk." and len(t.shape) > 1}
    assert set(matrix.entries) == {*of_layers, "output.weight"}
    assert {int(entry.counts[0]) for entry in matrix.entries.values()} == {1024}
    assert main(["quantize", f32, "-o", str(tmp_path / "a.gguf"), "--moments", kept, "--quiet"]) == 0
    assert read_gguf(tmp_path / "a.gguf").metadata["yarn_edge.calibration.tokens"] == 1024
    assert main(["quantize", f32, "-o", str(tmp_path / "b.gguf"), "--imatrix", kept, "--quiet"]) == 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--moments", "{gone}"], "does not exist: pass --calibrate TEXT,TEXT to make it"),
        (["--moments", "{kept}", "--calibrate", "{a}"], "was made from other texts"),
        (["--moments", "{a}"], "not a GGUF"),
        (["--moments", "{made}"], "has no moments"),
        (["--moments", "{kept}", "--pure", "--imatrix", "{kept}"], "leave out --imatrix"),
        (["--moments", "{kept}", "--plot", "p.png"], "--plot draws the plan of --size"),
    ],
    ids=["missing", "other texts", "a text", "a model", "imatrix", "plot"],
)
def test_what_is_refused(
    folder: Path, tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"gone": tmp_path / "gone", "kept": folder / "moments.gguf", "a": folder / "a.txt"}
    words = [flag.format(**names, made=folder / "made.gguf") for flag in flags]
    assert main(["convert", str(folder / "ck"), "-o", str(tmp_path / "o.gguf"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, intermediate_size=256, num_hidden_layers=1, rope_theta=5e5)
    words = ["convert", str(tmp_path / "ck"), "-o", str(tmp_path / "o.gguf")]
    assert main([*words, "--moments", str(folder / "moments.gguf")]) == 2
    assert "are those of another model" in capsys.readouterr().err


def test_damaged_files_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "moments.gguf").read_bytes()
    place = next(t for t in read_gguf(folder / "moments.gguf").tensors.values() if t.name == "moments.0")
    nan = np.float32(np.nan).tobytes()
    damaged = {
        "ends early": whole[: len(whole) // 2],
        "not finite": whole[: place.offset] + nan + whole[place.offset + 4 :],
        "widths": whole.replace(b'"places": [["blk.0.attn_q.weight", 256]', b'"places": [["blk.0.attn_q.weight", 255]'),
        "no JSON": whole.replace(b'{"rows": {', b'{"rows"; {'),
        "no tokens": whole.replace(b'"blk.0.attn_q.weight": 1024', b'"blk.0.attn_q.weight":    0'),
        "no input": whole.replace(b'"blk.0.attn_q.weight": 1024', b'"blk.0.attn_Q.weight": 1024'),
    }
    for what, data in damaged.items():
        assert data != whole, what
        (tmp_path / "m.gguf").write_bytes(data)
        words = ["convert", str(folder / "ck"), "-o", str(tmp_path / "o.gguf"), "--moments", str(tmp_path / "m.gguf")]
        assert main(words) == 2, what
        told = capsys.readouterr().err
        assert "m.gguf: " in told.splitlines()[-1], what
        assert "Traceback" not in told, what
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], what


@pytest.mark.parametrize(("where", "call"), [("reading", 7), ("sensitivities", 4), ("quantization", 16)])
def test_an_ended_run_is_gone_on_with(
    folder: Path, tmp_path: Path, where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of a window, of the sensitivities, of the output: the same file comes of it."""
    owner, name = {
        "reading": (GrowingSums, "add"),
        "sensitivities": (sensitivity, "nats_of"),
        "quantization": (_Worker, "make"),
    }[where]
    usual, calls = getattr(owner, name), list[int]()

    def counted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(owner, name, counted)
    words = [*sized(folder, tmp_path / "o.gguf"), "--threads", "1"]
    assert main(words) == 130
    assert not (tmp_path / "o.gguf").exists()
    assert len(list(tmp_path.iterdir())) == 1
    before = len(calls)
    assert main(words) == 0
    assert (tmp_path / "o.gguf").read_bytes() == (folder / "made.gguf").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["o.gguf"]
    monkeypatch.undo()
    again = len(calls) - before
    assert (
        again == {"reading": 5, "sensitivities": 6, "quantization": 9 + 12}[where]
    )  # 12: with the importance matrix, for the proof


@pytest.mark.skipif(
    "not config.getoption('--full')", reason="a process of its own; the tests above end runs at every stage"
)
@pytest.mark.parametrize("file", ["progress.npz", "gradients.npz", "costs.json"])
def test_a_killed_run_is_gone_on_with(
    folder: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sized(folder, tmp_path / "o.gguf")
    run = subprocess.Popen([sys.executable, "-m", "yarn_edge", *words])
    while run.poll() is None and not list(tmp_path.glob(f"*.partial/{file}")):
        time.sleep(0.002)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    capsys.readouterr()
    assert main([word for word in words if word != "--quiet"]) == 0
    assert "going on from there" in capsys.readouterr().err or file != "gradients.npz"
    assert (tmp_path / "o.gguf").read_bytes() == (folder / "made.gguf").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["o.gguf"]


def test_sums_go_on_where_a_window_ended(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 40, 700)).astype(np.float32)
    sums = GrowingSums(tmp_path / "sums")
    np.testing.assert_allclose(sums.add("a", x[0]), np.square(x[0]).sum(0), rtol=1e-5)
    sums.add("b", x[0])
    places = sums.finish()
    sums.add("a", x[1])
    sums.close()  # in the midst of the second window
    again = GrowingSums(tmp_path / "sums", places, 1)
    again.add("a", x[2])
    again.finish()
    again.add("a", x[1])
    found = again.stored()
    np.testing.assert_allclose(found["a"], x[0].T @ x[0] + x[2].T @ x[2], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["b"], x[0].T @ x[0], rtol=1e-4, atol=1e-3)
    again.close()


def test_sums_that_end_early(tmp_path: Path) -> None:
    (tmp_path / "sums").write_bytes(bytes(4 * sums_floats(300) - 4))
    with pytest.raises(YarnEdgeError, match="ends before its moments do"):
        SumsPlace(tmp_path / "sums", 0, 300).numbers(0, sums_floats(300))
