"""The demo, on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yarn_edge.cli import main


def test_the_demo_from_checkpoint_to_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    words = [
        "demo",
        "-o",
        str(folder),
        "--tokens",
        "512",
        "--numbers",
        str(tmp_path / "numbers.json"),
        "--plot",
        str(tmp_path / "curve.png"),
        "--quiet",
    ]
    assert main(words) == 0
    out = capfd.readouterr().out
    for shown in (
        "$ yarn-edge convert",
        "$ yarn-edge verify",
        "pass  logits",
        "tokens at position",
        "$ yarn-edge chat",
        "Done in",
    ):
        assert shown in out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert set(numbers["perplexity"]) == {"YaRN", "plain RoPE"}
    assert sorted(p.name for p in folder.iterdir()) == ["smollm2-135m-yarn4", "smollm2-135m-yarn4.Q4_K_M.gguf"]
    assert main(["demo", "-o", str(folder), "--tokens", "512"]) == 2
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "holds an earlier demo already; --force" in capfd.readouterr().err
