"""Standard output: one JSON object whatever the values and the stream's encoding; what happens when the reader has left."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.stdout import json_text, plain, write_json, write_text

NAME = os.fsdecode(b"caf\xe9.gguf")  # not UTF-8


@pytest.mark.parametrize(
    "encoding, written",
    [
        ("utf-8", '{"a": "日本é"}'),
        ("latin-1", r'{"a": "\u65e5\u672c\u00e9"}'),
        ("ascii", r'{"a": "\u65e5\u672c\u00e9"}'),
        (None, r'{"a": "\u65e5\u672c\u00e9"}'),
    ],
)
def test_characters_that_the_stream_lacks_are_escaped(encoding: str | None, written: str) -> None:
    assert json_text({"a": "日本é"}, encoding) == written


def test_names_that_are_not_utf_8_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    write_json({"path": Path(NAME)})
    assert raw.getvalue().endswith(b"}\n")
    assert json.loads(raw.getvalue())["path"] == NAME


def test_values_of_every_kind() -> None:
    values = {
        1: (math.nan, -math.inf, 0.5),
        "n": np.float32(0.25),
        "i": np.arange(3),
        "b": np.bool_(True),
        "none": None,
    }
    assert plain(values) == {"1": [None, None, 0.5], "n": 0.25, "i": [0, 1, 2], "b": True, "none": None}
    assert plain([np.array([[np.nan, 1]]), "x"]) == [[[None, 1.0]], "x"]


def test_indented_for_files() -> None:
    assert json_text({"a": [1]}, indent=1) == '{\n "a": [\n  1\n ]\n}'


def test_the_rest_is_dropped_when_the_reader_left_and_is_not_needed() -> None:
    code = "import sys; from yarn_edge.stdout import write_text as w; [w('x' * 100_000, need_reader=False) for _ in 'abc']; sys.exit(7)"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (7, b"")


def test_a_reader_that_left_is_told_to_who_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", out := os.fdopen(writing, "w"))
    with pytest.raises(BrokenPipeError):
        write_text("x")
    with pytest.raises(BrokenPipeError):
        out.close()
