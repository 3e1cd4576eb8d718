"""Files of one model in turns: a row for each test and file, and ratios to the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yarn_edge.bench.peers.files import RACE

from support import tiny_gguf


def test_files_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tiny_gguf.write(tmp_path / name, "llama")) for name in ("a.gguf", "b.gguf")]
    assert RACE.main([*files, "--repeat", "6", "--threads", "1", "--depth", "0,8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    tests = [(test, depth) for depth in (0, 8) for test in ("generating 32", "reading 512")]
    assert [(row["test"], row["depth"], row["side"]) for row in rows] == [
        (*test, side) for test in tests for side in ("a.gguf", "b.gguf")
    ]
    for row in rows:
        assert row["tok_per_s"] > 0
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["ratio"] == 1.0 or row["side"] == "b.gguf"
    assert RACE.main([files[0], "--repeat", "1"]) == 0
    assert "speed of the first" in capsys.readouterr().out
