"""What a measurement shows: tables whose columns stand in line, JSON that is JSON, files whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver, report_text
from yarn_edge.report.report import Chart, HeatMap, Line, Report, Table
from yarn_edge.report.tables import shortened, table_text

from support.full_disk import FullDisk

NAN, INF = math.nan, math.inf
PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = '<script>alert("x")</script>&amp;\x1b[31m\u202e\n<img src=http://evil.example/x>'
CHART = Chart("Perplexity", "context (tokens)", "perplexity", (Line("YaRN", (1024, 2048), (20.0, 19.0)),))
HEAT = HeatMap("Found", "context", "depth", ("2k", "4k"), ("0 %",), ((1.0, NAN),))
TABLE = Table(
    "Divergence",
    ("model", "KL (nats)", "tokens"),
    (("a.gguf", 0.04123456, 12288), ("much-longer-name.gguf", 1.5, 7), ("b", None, None)),
    note="one pass",
)
REPORT = Report("Measured", ("The first sentence.", "The second."), (TABLE,), (CHART, HEAT))


def parsed(*words: str, **more: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_output_flags(parser)
    args = parser.parse_args(words)
    vars(args).update(command_line="yarn-edge compare a b", **more)
    return args


# Text


def test_a_table_stands_in_line() -> None:
    assert table_text(TABLE).splitlines() == [
        "Divergence",
        "model                  KL (nats)  tokens",
        "a.gguf                  0.041235   12288",
        "much-longer-name.gguf     1.5000       7",
        "b                              -       -",
        "one pass",
    ]


def test_wide_characters_take_two_places() -> None:
    table = Table("", ("name", "n"), (("日本語", 1), ("abcdef", 22)))
    assert table_text(table).splitlines() == ["name     n", "日本語   1", "abcdef  22"]


def test_the_summary_stands_last() -> None:
    text = report_text(REPORT)
    assert text.startswith("Divergence\n")
    assert text.endswith("one pass\n\nThe first sentence.\nThe second.\n")


CELLS: dict[str, tuple[tuple[Any, ...], int, list[str]]] = {
    "no more decimals than needed": ((4.0, 8.0, 1.5), 5, ["4.0", "8.0", "1.5"]),
    "whole": ((4.0, 8.0), 5, ["4", "8"]),
    "significant digits": ((18.73456, 5.123456, 100.0), 5, ["18.735", "5.1235", "100.00"]),
    "rounded up to another digit": ((9.99996, 1.23456), 5, ["10.000", "1.2346"]),
    "never 1.2e+03": ((123456.7, 1234.56), 3, ["123457", "1235"]),
    "tiny": ((6.4e-10, 0.00123), 3, ["6.4e-10", "0.00123"]),
    "missing": ((None, NAN, INF, -INF, 0.0, -0.0), 5, ["-", "-", "inf", "-inf", "0", "0"]),
    "whole numbers keep all digits": ((1234567, None), 3, ["1234567", "-"]),
    "NumPy's": ((np.float32(0.5), np.int64(3), np.float64(2.25)), 3, ["0.50", "3", "2.25"]),
    "negative": ((-1.25, 10.0), 3, ["-1.25", "10.0"]),
}


@pytest.mark.parametrize("case", CELLS)
def test_numbers(case: str) -> None:
    cells, digits, shown = CELLS[case]
    table = Table("", ("v",), tuple((cell,) for cell in cells), digits=digits)
    lines = table_text(table).splitlines()
    assert [line.strip() for line in lines[1:]] == shown
    assert len({len(line) for line in lines}) == 1  # to the right


def test_a_column_with_words_stands_left() -> None:
    table = Table("", ("v", "w"), (("a", 1.5), (2, 10.0)))
    assert table_text(table).splitlines() == ["v     w", "a   1.5", "2  10.0"]


def test_hostile_cells_keep_to_their_line() -> None:
    table = Table(HOSTILE, (HOSTILE, "n"), (("x" * 10_000 + ".gguf", 1),), note=HOSTILE)
    lines = table_text(table).splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 120 for line in lines)
    assert lines[2].endswith("xxx.gguf  1")  # the end of a name tells it from others


@pytest.mark.parametrize("limit", [5, 6])
def test_shortened(limit: int) -> None:
    assert shortened("abcdefghij", limit) == {5: "ab…ij", 6: "ab…hij"}[limit]
    assert shortened("abcde", limit) == "abcde"


def test_a_row_of_another_length_is_a_bug() -> None:
    with pytest.raises(ValueError, match="a different number of cells"):
        table_text(Table("t", ("a", "b"), ((1, 2), (3,))))


# JSON


def test_json_is_one_object_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    data = {
        "ppl": NAN,
        "rows": ({"x": INF, "n": np.int64(3)}, [np.float32(0.5), np.float64("nan")]),
        "array": np.array([[1.0, np.nan]]),
        "path": Path("a") / "b",
        "name": "日本\n",
        8192: True,
        "none": None,
    }
    deliver(parsed("--json"), data, REPORT)
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    assert out.count("\n") == 1
    assert "日本" in out

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(out, parse_constant=refuse)
    assert set(found.pop("environment")) >= {"date", "CPU", "yarn-edge"}
    assert found == {
        "ppl": None,
        "rows": [{"x": None, "n": 3}, [0.5, None]],
        "array": [[1.0, None]],
        "path": str(Path("a") / "b"),
        "name": "日本\n",
        "8192": True,
        "none": None,
        "command": "yarn-edge compare a b",
    }


# The files


def test_text_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, page = tmp_path / "p.png", tmp_path / "r.html"
    args = parsed("--plot", str(plot), "--report", str(page))
    check_outputs(args)
    deliver(args, {}, REPORT)
    captured = capsys.readouterr()
    assert captured.out == report_text(REPORT)
    assert captured.err == f"{plot}: the picture\n{page}: the report\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "r.html"]
    assert plot.read_bytes().startswith(PNG)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


REFUSED: dict[str, tuple[list[str], str]] = {
    "picture is no .png": (["--plot", "p.svg"], "--plot .*p.svg: the name must end in .png"),
    "page is no .html": (["--report", "r.png"], "--report .*r.png: the name must end in .html or .htm"),
    "both one file": (["--plot", "x.png", "--report", "x.png"], "--plot and --report both name .*x.png"),
    "both one file by a link": (["--plot", "x.png", "--report", "link.html"], "--plot and --report both name"),
    "exists": (["--plot", "old.png"], "old.png: exists already; --force overwrites it"),
    "page exists": (["--report", "other.htm"], "other.htm: exists already; --force overwrites it"),
    "the text that is read": (["--report", "old.html", "--force"], "old.html: is one of the files that are read"),
    "no such folder": (["--plot", "none/p.png"], "none: no such folder"),
    "a folder": (["--report", "folder.html"], "is a folder"),
    "empty": (["--plot", ""], "the name must end in .png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_work(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for name in ("old.png", "old.html", "other.htm"):
        Path(name).write_text("mine")
    Path("folder.html").mkdir()
    Path("link.html").symlink_to("x.png")
    with pytest.raises(YarnEdgeError, match=message):
        check_outputs(parsed(*words, text="old.html"))


@pytest.mark.parametrize(
    "words", [[], ["--json"], ["--plot", "P.PNG", "--report", "r.htm"], ["--plot", "old.png", "--force"]]
)
def test_accepted(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.png").write_text("mine")
    check_outputs(parsed(*words))
    assert Path("old.png").read_text() == "mine"


@pytest.mark.parametrize("flag, name", [("--plot", "p.png"), ("--report", "r.html")])
def test_without_matplotlib(flag: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(YarnEdgeError) as told:
        check_outputs(parsed(flag, str(tmp_path / name)))
    assert str(told.value) == f"{flag} needs matplotlib: pip install 'yarn-edge[plot]'"


def test_a_file_that_appeared_meanwhile_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parsed("--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html"))
    check_outputs(args)
    for name in ("p.png", "r.html"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(YarnEdgeError, match=r"p\.png: exists already"):
        deliver(args, {}, REPORT)
    captured = capsys.readouterr()
    assert captured.out == report_text(REPORT)  # what was measured is told all the same
    assert "r.html: exists already" in captured.err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"p.png": "mine", "r.html": "mine"}


def test_force_overwrites_what_a_link_stands_for(tmp_path: Path) -> None:
    for name in ("p.png", "r.html"):
        (tmp_path / "elsewhere" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / name).write_text("old")
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    args = parsed("--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html"), "--force")
    check_outputs(args)
    deliver(args, {}, REPORT)
    assert (tmp_path / "p.png").is_symlink()
    assert (tmp_path / "r.html").is_symlink()
    assert (tmp_path / "elsewhere" / "p.png").read_bytes().startswith(PNG)
    assert (tmp_path / "elsewhere" / "r.html").read_text().startswith("<!doctype")


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot, page = tmp_path / "p.png", tmp_path / "r.html"
    for path in (plot, page):
        path.write_text("old")

    monkeypatch.setattr("yarn_edge.writer.open_output", lambda path: FullDisk(path, "w"))
    with pytest.raises(YarnEdgeError, match=r"p\.png: No space left on device"):
        deliver(parsed("--plot", str(plot), "--report", str(page), "--force"), {}, REPORT)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"p.png": b"old", "r.html": b"old"}


def test_a_picture_that_fails_does_not_take_the_page_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "yarn_edge.writer.open_output",
        lambda path: FullDisk(path, "w") if path.name.startswith("p.png") else io.FileIO(path, "w"),
    )
    with pytest.raises(YarnEdgeError, match="No space left"):
        deliver(parsed("--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html")), {}, REPORT)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@contextlib.contextmanager
def closed_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """stdout into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer, "w", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        yield
    with contextlib.suppress(BrokenPipeError):
        out.close()


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_files_are_written_though_the_reader_left(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parsed("--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html"), *words)
    with closed_pipe(monkeypatch), pytest.raises(BrokenPipeError):
        deliver(args, {}, REPORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "r.html"]


def test_a_failed_file_is_told_though_the_reader_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.png").write_text("mine")
    with closed_pipe(monkeypatch), pytest.raises(YarnEdgeError, match="exists already"):
        deliver(parsed("--plot", str(tmp_path / "p.png")), {}, REPORT)


def test_a_report_without_pictures(tmp_path: Path) -> None:
    bare = dataclasses.replace(REPORT, pictures=())
    with pytest.raises(YarnEdgeError, match="no picture to draw"):
        deliver(parsed("--plot", str(tmp_path / "p.png"), "--report", str(tmp_path / "r.html")), {}, bare)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert "<img" not in (tmp_path / "r.html").read_text(encoding="utf-8")
