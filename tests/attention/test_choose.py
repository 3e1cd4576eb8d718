"""Which attention runs: what was measured decides, what was kept is read again, and what is missing is told once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.attention import choose
from yarn_edge.attention.heads import HeadShape, head_shapes
from yarn_edge.attention.kernel_shapes import KERNEL_TYPES, no_kernels
from yarn_edge.attention.policy import choose_attention
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.context_settings import ContextSettings

from support import tiny_gguf

LONG = ContextSettings(n_ctx=8192, attention="auto")


def times(few: tuple[float, float, float], many: tuple[float, float, float]) -> choose.Times:
    """Seconds of ours, flash and plain."""
    return {
        "few": dict(zip(("fast", "flash", "plain"), few, strict=True)),
        "many": dict(zip(("fast", "flash", "plain"), many, strict=True)),
    }


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        ((1, 2, 3), (1, 2, 3), "fast"),
        ((1, 2, 3), (2, 1, 3), "fast-few"),
        ((2, 1, 3), (1, 2, 3), "fast-many"),
        ((3, 1, 2), (3, 1, 2), "ggml"),
        ((2, 3, 1), (2, 3, 1), "ggml"),  # plain is faster at both
        ((1, 3, 2), (2.1, 3, 1), "ggml"),  # plain loses less at reading than it gains
        ((1, 3, 2), (1.9, 3, 1), "fast"),
    ],
)
def test_the_fastest_wins(few: Any, many: Any, expected: str) -> None:
    assert choose.best_of([times(few, many)]) == expected


def test_a_cache_type_without_plain_attention() -> None:
    measured = times((1, 2, 0), (1, 2, 0))
    for phase in measured.values():
        del phase["plain"]
    assert choose.best_of([measured]) == "fast"


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    return read_gguf(tiny_gguf.write(tmp_path / "m.gguf", "llama"))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that were measured; the cache folder is empty."""
    pytest.importorskip("numba")
    kinds: list[str] = []

    def fake(kind: str, _heads: HeadShape, _queries: int) -> dict[str, float]:
        kinds.append(kind)
        return {"fast": 1.0, "flash": 2.0, "plain": 3.0}

    monkeypatch.setattr("yarn_edge.attention.trial.attention_times", fake)
    monkeypatch.setattr(choose, "user_cache_folder", lambda: tmp_path / "cache")
    choose._times.cache_clear()
    yield kinds
    choose._times.cache_clear()


def test_it_is_measured_once(file: GGUFFile, measured: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert choose.fastest_attention(LONG, file) == "fast"
        choose._times.cache_clear()  # as in another process
    assert measured == ["f16", "f16"]  # few and many
    assert json.loads((tmp_path / "cache" / "attention.json").read_text())["times"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"of": 1}', '{"of": [], "times": {}}', "\x00", '{"of": null, "times": null}']
)
def test_a_damaged_file_is_measured_again(file: GGUFFile, measured: list[str], tmp_path: Path, text: str) -> None:
    kept = tmp_path / "cache" / "attention.json"
    kept.parent.mkdir()
    kept.write_text(text)
    assert choose.fastest_attention(LONG, file) == "fast"
    assert len(measured) == 2


@pytest.mark.parametrize(
    "kept",
    [5, [], {"few": {}, "many": {}}, {"few": {}}, {"few": {"fast": "x"}, "many": {}}, {"few": None, "many": None}],
)
def test_a_damaged_entry_is_measured_again(file: GGUFFile, measured: list[str], tmp_path: Path, kept: Any) -> None:
    path = tmp_path / "cache" / "attention.json"
    assert choose.fastest_attention(LONG, file) == "fast"
    (key,) = (held := json.loads(path.read_text()))["times"]
    held["times"][key] = kept
    path.write_text(json.dumps(held))
    choose._times.cache_clear()
    assert choose.fastest_attention(LONG, file) == "fast"
    assert len(measured) == 4


def test_a_folder_that_cannot_be_written_costs_only_time(file: GGUFFile, measured: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert choose.fastest_attention(LONG, file) == "fast"
    assert len(measured) == 2


def test_short_contexts_and_other_caches_stay_with_ggml(file: GGUFFile, measured: list[str]) -> None:
    for other in (replace(LONG, n_ctx=2048), replace(LONG, kv_type="f32"), replace(LONG, kv_type="iq4_nl")):
        assert choose.fastest_attention(other, file) == "ggml"
    assert not measured


def test_without_numba_a_note_says_so_once(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choose, "why_not_compiled", lambda: "Numba is not installed (here)")
    choose._say_missing.cache_clear()
    for _ in range(2):
        assert choose_attention(LONG, file, on_cpu=True).attention == "plain"
    assert capsys.readouterr().err.count("Numba is not installed (here)") == 1


def test_on_a_gpu_nothing_changes(file: GGUFFile) -> None:
    assert choose_attention(LONG, file, on_cpu=False).attention == "ggml"


@pytest.mark.parametrize("attention", ["fast", "flash"])
def test_what_was_asked_for_is_kept(file: GGUFFile, attention: Any) -> None:
    asked = replace(LONG, attention=attention)
    assert choose_attention(asked, file, on_cpu=True) == asked


def test_the_heads_of_a_file(file: GGUFFile, tmp_path: Path) -> None:
    assert head_shapes(file) == [HeadShape(4, 2, 16, 16)]
    assert no_kernels(file, "f16") is None
    assert "heads of 16 and 16" in (no_kernels(file, "q8_0") or "")
    compressed = read_gguf(tiny_gguf.write(tmp_path / "mla.gguf", "deepseek2"))
    assert head_shapes(compressed) == []


def test_every_type_with_a_kernel_can_be_read() -> None:
    pytest.importorskip("numba")
    from yarn_edge.attention.cache_rows import CACHE_TYPES

    assert {name: kind.floats for name, kind in CACHE_TYPES.items()} == KERNEL_TYPES


@pytest.mark.usefixtures("measured")
def test_a_kernel_that_computes_wrongly_is_left_alone(
    file: GGUFFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(_shape: object) -> None:
        raise YarnEdgeError("the compiled attention kernel is wrong")

    monkeypatch.setattr(choose, "kernel_of", wrong)
    choose._say_missing.cache_clear()
    assert choose.fastest_attention(LONG, file) == "ggml"
    assert "the compiled attention kernel is wrong" in capsys.readouterr().err
