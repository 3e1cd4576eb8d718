"""The race of quantizers: the tokens that all sides read, files that are there or are made, and the size of an equal loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.bench.peers import quantized
from yarn_edge.bench.peers.quantized import RACE, SPARE, WINDOW, QuantizedSide, calibration_files, equal_bytes
from yarn_edge.bench.peers.turns import ProcessRun
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text


def test_the_size_of_an_equal_loss_lies_between_two_sizes() -> None:
    """Losses that halve with every 10 bytes are a line in log KL."""
    sizes = [(n, 2.0 ** -(n / 10)) for n in (100, 140, 120)]
    assert equal_bytes(sizes, 2.0**-12.5) == pytest.approx(125)
    assert equal_bytes(sizes, 2.0**-10) == pytest.approx(100)
    assert [equal_bytes(sizes, 2.0**-n) for n in (9.9, 14.1)] == [None, None]


def test_every_side_reads_the_same_tokens(tmp_path: Path) -> None:
    """Half of the tokens from each text, and windows that are long enough when they are tokenized by themselves."""
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, start in zip(texts, (0, 20000), strict=True):
        path.write_text(sample_text()[start : start + 30000], encoding="utf-8")
    whole, lines = calibration_files(package_gguf(), texts, 2 * WINDOW, tmp_path)
    with Model(package_gguf(), vocab_only=True) as model:

        def tokens(text: str) -> list[int]:
            return model.tokenize(text, add_special=False, parse_special=False)

        first = [tokens(path.read_text(encoding="utf-8")) for path in texts]
        windows = [json.loads(line)["text"] for line in lines.read_text(encoding="utf-8").splitlines()]
        assert [tokens(window)[:WINDOW] for window in windows] == [text[:WINDOW] for text in first]
        read = tokens(whole.read_text(encoding="utf-8"))
    assert read[: WINDOW - SPARE] == first[0][: WINDOW - SPARE]
    assert abs(len(read) - 2 * WINDOW) <= 2
    with pytest.raises(YarnEdgeError, match=r"a\.txt: has \d+ tokens: \d+ are needed"):
        calibration_files(package_gguf(), texts, 64 * WINDOW, tmp_path)


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    left = tmp_path / "left"
    write = f"import pathlib; p = pathlib.Path({str(left)!r}); p.mkdir(); (p / 'x.gguf').write_text('made')"
    side = QuantizedSide("side", tmp_path / "a.gguf", [[sys.executable, "-S", "-c", write]], left)
    took = side.make()
    assert took is not None
    assert took > 0
    assert side.file.read_text() == "made"
    assert side.make() is None
    with pytest.raises(YarnEdgeError, match=r"^other: there is no .*b\.gguf$"):
        QuantizedSide("other", tmp_path / "b.gguf").make()


def test_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Programs that write files of a known size, and a compare whose losses are theirs."""
    for name in ("llama-imatrix", "llama-quantize"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    sizes = {
        "llama-quantize-Q4_K_M": 1000,
        "yarn-edge-Q4_K_M": 1000,
        "yarn-edge-Q4_K_M-1000B": 1000,
        "auto-round-3": 990,
    }
    sizes |= {"yarn-edge-Q4_K_M-4bpw": 800, "base-BF16": 4000, "llama-imatrix": 10}
    losses = {
        "llama-quantize-Q4_K_M": 0.5,
        "yarn-edge-Q4_K_M": 0.4,
        "yarn-edge-Q4_K_M-1000B": 0.25,
        "auto-round-3-Q4_K_M": 0.6,
    }
    losses |= {"yarn-edge-Q4_K_M-4bpw": 1.0}

    def fake(_name: str, line: Sequence[str]) -> ProcessRun:
        words, printed = [Path(word) for word in line], ""
        if "compare" in line:
            first, *files = [word for word in words if word.suffix == ".gguf"]
            assert first.name == "base-BF16.gguf"
            figures = {
                "n_tokens": 2,
                "kld_stderr": 0.01,
                "top1": 0.5,
                "top1_stderr": 0.1,
                "ppl_ratio": 1.0,
                "ppl_ratio_stderr": 0.1,
            }
            printed = json.dumps({"models": [{"kld_mean": losses[file.stem], **figures} for file in files]})
        elif "--output_dir" in line:
            folder = next(word for word in words if word.name == "auto-round-3")
            folder.mkdir()
            (folder / "m.gguf").write_bytes(bytes(sizes["auto-round-3"]))
        else:
            made = [word for word in words if word.suffix == ".gguf" and not word.exists()]
            assert len(made) == 1
            made[0].write_bytes(bytes(sizes[made[0].stem]))
        return ProcessRun(2.0, 0, 0, printed, "")

    monkeypatch.setattr(quantized, "run_process", fake)
    monkeypatch.setattr(quantized, "calibration_files", lambda *_: (tmp_path / "c.txt", tmp_path / "c.jsonl"))
    line = [
        "ck",
        "--calibrate",
        "a,b",
        "--text",
        "t.txt",
        "--peer",
        str(tmp_path),
        "--auto-round",
        "ar",
        "--iters",
        "3",
    ]
    assert RACE.main([*line, "--sizes", "4bpw", "--folder", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(row["bytes"], row["texts"]["t"]["kld_mean"], row["seconds"]) for row in results["sides"]] == [
        (1000, 0.5, 4.0),
        (990, 0.6, 2.0),
        (1000, 0.4, 2.0),
        (1000, 0.25, 2.0),
        (800, 1.0, 2.0),
    ]
    assert results["equal_bytes"] == {"t": pytest.approx(0.9)}  # 0.5 lies in the middle of 1.0 and 0.25
    assert RACE.main([*line, "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| llama-quantize Q4_K_M, llama-imatrix | 0.00 |  | 0.5000 ± 0.0100 (1.00) | 50.0% |" in printed
    assert "t beyond --sizes" in printed
