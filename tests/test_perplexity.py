"""Perplexity by position, and the demo that shows it, on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.bench.perplexity import by_position, token_nll
from yarn_edge.cli import main
from yarn_edge.hf_reference import log_softmax, reference_logits
from yarn_edge.runtime import Model
from yarn_edge.sample_text import sample_text


def test_nll_equals_transformers(smol_f32: Path, smol_checkpoint: Path) -> None:
    with Model(smol_f32) as model:
        tokens = model.tokenize(sample_text(), add_special=False, parse_special=False)[:700]
        ours = token_nll(model, tokens, kv_type="f32")
        part = token_nll(model, tokens, kv_type="f32", score_from=600)
    truth = log_softmax(reference_logits(smol_checkpoint, tokens)[:-1])
    wanted = -truth[np.arange(699), tokens[1:]]
    # Flash attention, which perplexity uses for its speed, rounds to half precision on its way.
    np.testing.assert_allclose(ours, wanted, atol=2e-2)
    assert abs(ours.mean() - wanted.mean()) < 1e-3
    assert np.isnan(part[:599]).all()
    np.testing.assert_allclose(part[599:], ours[599:], atol=2e-2)


def test_buckets() -> None:
    nll = np.log(np.array([2.0, 2.0, 8.0, 8.0, 8.0]))  # of the tokens at positions 1 to 5
    buckets = by_position(nll, [0, 3, 6])
    assert [(b.start, b.end, b.n_tokens) for b in buckets] == [(0, 3, 2), (3, 6, 3)]
    assert [b.perplexity for b in buckets] == pytest.approx([2, 8])


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
