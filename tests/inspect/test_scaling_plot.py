"""inspect --plot: a picture of the right pairs, its colours explained, or one line of error and nothing half-written."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.inspect import plot as scaling_plot
from yarn_edge.inspect.plot import plot_scaling, wrong_pairs
from yarn_edge.llama_rules.planner import plain_llama_cpp
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.report.pictures import own_style

from support import tiny
from support.full_disk import FullDisk
from support.gguf_bytes import edit_key

A4 = 1.1386294361119891
OWN_BETAS = {**tiny.YARN["rope_scaling"], "beta_fast": 8, "beta_slow": 2}
PNG = b"\x89PNG\r\n\x1a\n"


def by_hand(
    base: float, dim: int, origin: int, factor: float, fast: float = 32, slow: float = 1, truncate: bool = True
) -> np.ndarray[Any, Any]:
    """YaRN's frequencies as the authors' code has them."""

    def pair(turns: float) -> float:
        return dim * math.log(origin / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    plain = base ** (-np.arange(0, dim, 2) / dim)
    return np.asarray(plain / factor * ramp + plain * (1 - ramp))


def n_different(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> int:
    return int((np.abs(a / b - 1) > 1e-6).sum())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with their own betas and a GGUF of each; heads of 64, so that the ramp has pairs."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for family in ("llama", "qwen2"):
        shape: dict[str, Any] = {"hidden_size": 256, "rope_scaling": OWN_BETAS}
        checkpoint = tiny.write_checkpoint(folder / family, family, **shape)
        found[f"{family} checkpoint"] = checkpoint
        found[f"{family} GGUF"] = convert(checkpoint, str(folder / f"{family}.gguf"), "Q8_0")[0]
    factor = {**tiny.YARN["rope_scaling"], "attention_factor": 1.35}
    own = tiny.write_checkpoint(folder / "own", rope_scaling=factor, hidden_size=256)
    found["own factor"] = convert(own, str(folder / "own.gguf"), "Q8_0")[0]
    found["lost factor"] = folder / "lost.gguf"
    found["lost factor"].write_bytes(found["own factor"].read_bytes())
    edit_key(found["lost factor"], "llama.rope.scaling.attn_factor", 1.0)
    return found


# The llama GGUF is baked: plain llama.cpp runs it as it is meant.
WRONG = n_different(by_hand(1e4, 64, 256, 4, 8, 2), by_hand(1e4, 64, 256, 4))
COUNTS = {"llama checkpoint": WRONG, "qwen2 checkpoint": WRONG, "qwen2 GGUF": WRONG, "llama GGUF": 0, "own factor": 0}


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(PNG)
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("model", COUNTS)
def test_a_picture_and_the_wrong_pairs(
    model: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.png"
    assert main(["inspect", str(models[model]), "--plot", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{out}: {COUNTS[model]} of 32 pairs would be wrong in plain llama.cpp\n"
    assert json.loads(captured.out)["model"] == str(models[model])
    width, height = size_of(out)
    assert 900 <= width <= 2000
    assert 500 <= height <= 1500
    assert 10_000 < out.stat().st_size < 300_000
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_lost_attention_factor_is_told(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(models["lost factor"]), "--plot", str(tmp_path / "p.png")]) == 0
    off = abs(A4 / 1.35 - 1)
    assert (
        f"0 of 32 pairs would be wrong in plain llama.cpp, and the attention factor would be {off:.2%} off"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", PNG), ("jpg", b"\xff\xd8")])
def test_other_suffixes(suffix: str, start: bytes, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / f"p.{suffix}"
    assert main(["inspect", str(models["qwen2 GGUF"]), "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(start)


ERRORS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown suffix": (lambda f: f / "p.gguf", "a picture's name ends with one of .*png.*svg"),
    "no suffix": (lambda f: f / "p", "a picture's name ends with one of"),
    "no such folder": (lambda f: f / "none" / "p.png", "No such file or directory"),
    "a file as folder": (lambda f: f / "a file" / "p.png", "Not a directory"),
    "a folder": (lambda f: f / "folder.png", "is not a picture that may be overwritten"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_line_and_nothing_left(
    case: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, message = ERRORS[case]
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["inspect", str(models["qwen2 GGUF"]), "--plot", str(where(tmp_path))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("yarn-edge: error: ")
    assert captured.err.count("\n") == 1
    assert str(where(tmp_path)) in captured.err
    assert re.search(message, captured.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_old_picture(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.png"
    out.write_bytes(b"the old one")
    monkeypatch.setattr("yarn_edge.writer.open_output", lambda path: FullDisk(path, "w"))
    assert main(["inspect", str(models["qwen2 GGUF"]), "--plot", str(out), "--force"]) == 2
    assert capsys.readouterr().err == f"yarn-edge: error: {out}: No space left on device\n"
    assert out.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_without_matplotlib(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["inspect", str(models["qwen2 GGUF"]), "--plot", str(tmp_path / "p.png")]) == 2
    assert capsys.readouterr().err == "yarn-edge: error: --plot needs matplotlib: pip install 'yarn-edge[plot]'\n"
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_runs_may_be_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A method that keys cannot say: no count, rather than "0 wrong"."""
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    folder = tiny.write_checkpoint(tmp_path / "ck", rope_scaling=llama3, max_position_embeddings=2048)
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "p.png")]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'p.png'}: it is not known what plain llama.cpp would run of this\n"


QWEN = RopeScaling("yarn", 1e6, 128, 32768, 4.0, beta_fast=8.0, beta_slow=4.0, attention_factor=A4)
GPT_OSS = RopeScaling("yarn", 150000.0, 64, 4096, 32.0, attention_factor=1.3465735902799727, truncate=False)
PLAIN = RopeScaling("none", 1e5, 64, 8192)
# scaling, what runs, how many pairs are wrong by hand, words of the picture
DRAWN: dict[str, tuple[RopeScaling, RopeScaling | None, int | None, list[str]]] = {
    "qwen2, own betas": (
        QWEN,
        plain_llama_cpp(QWEN, "qwen2"),
        n_different(by_hand(1e6, 128, 32768, 4, 8, 4), by_hand(1e6, 128, 32768, 4)),
        [
            "plain RoPE",
            "yarn, factor 4",
            "plain llama.cpp: 16 pairs wrong",
            "original context 32768",
            "ramp: share divided",
        ],
    ),
    "gpt-oss": (
        GPT_OSS,
        plain_llama_cpp(GPT_OSS, "gpt-oss"),
        n_different(by_hand(150000, 64, 4096, 32, truncate=False), by_hand(150000, 64, 4096, 32)),
        ["yarn, factor 32", "plain llama.cpp: 9 pairs wrong, frequencies up to 76.3% off"],
    ),
    "plain": (PLAIN, PLAIN, 0, ["plain RoPE", "original context 8192"]),
    "other dimensions": (
        GPT_OSS,
        PLAIN.with_overrides("test", dim=32),
        32,
        ["plain llama.cpp rotates 32 dimensions, not 64"],
    ),
    "unknown": (GPT_OSS, None, None, ["yarn, factor 32"]),
    "factors": (
        PLAIN.with_overrides("test", frequency_factors=(2.0,) * 32),
        PLAIN,
        32,
        ["frequency factors", "32 pairs wrong"],
    ),
}


@pytest.mark.parametrize("case", DRAWN)
def test_every_colour_is_explained_and_nothing_overlaps(case: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    wanted, runs, count, words = DRAWN[case]
    assert plot_scaling(tmp_path / "p.png", case, wanted, runs) == count
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    scaling_plot._draw(figure, case, wanted, runs, wrong_pairs(wanted, runs))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert all(any(word in line for line in told) for word in words), told
    drawn = sum(len(axes.lines) + len(axes.collections) for axes in figure.axes)
    assert drawn == len(told)
    frame, box = figure.bbox, legend.get_window_extent()
    inside = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(box.overlaps(axes) for axes in inside)
    for part in (box, *inside):
        assert part.x0 >= frame.x0 - 1
        assert part.x1 <= frame.x1 + 1
        assert part.y0 >= frame.y0 - 1
        assert part.y1 <= frame.y1 + 1


@pytest.mark.parametrize("title", ["a$x_2$b.gguf", "$\\frac{$", "漢字.gguf", "x" * 400, "two\nlines"])
def test_any_name_can_be_a_title(title: str, tmp_path: Path) -> None:
    plot_scaling(tmp_path / "p.png", title, QWEN, None)
    assert size_of(tmp_path / "p.png") == (1170, 715)


def test_wavelengths_are_written_as_numbers_of_tokens() -> None:
    from matplotlib.figure import Figure

    with own_style():  # in which a formula is text
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        scaling_plot._draw(figure, "t", QWEN, None, None)
        figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "16k" in labels
    assert all(re.fullmatch(r"[\d.]+[kM]?", label) for label in labels)
