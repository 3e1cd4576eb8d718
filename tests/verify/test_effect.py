"""`verify --effect`: both perplexities are those of files made with and without the scaling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import Check
from yarn_edge.verify.effect import check_effect

from support import tiny

TEXT = "in the beginning was the word 1234 and the quick brown fox. " * 60
N = 512


def sharp(folder: Path, **config: object) -> Path:
    """A tiny checkpoint whose attention is not flat, so that positions matter."""
    tiny.write_checkpoint(folder, **config)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if "q_proj" in name or "k_proj" in name:
            tensor *= 7
    tiny.write_weights(folder, state)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(the same weights with YaRN baked in, without it, a text)."""
    folder = tmp_path_factory.mktemp("effect")
    own = {**tiny.YARN["rope_scaling"], "attention_factor": 1.35, "beta_fast": 8.0, "beta_slow": 2.0}  # type: ignore[dict-item]
    scaled, plain = sharp(folder / "scaled", rope_scaling=own), sharp(folder / "plain", rope_scaling=None)
    text = folder / "text.txt"
    text.write_text(TEXT)
    files = [convert(ck, str(folder / f"{ck.name}.gguf"), "F32")[0] for ck in (scaled, plain)]
    return files[0], files[1], text


def perplexity(path: Path, n: int = N) -> float:
    with Model(path) as model:
        tokens = model.tokenize(TEXT, add_special=model.add_bos, parse_special=False)[:n]
        with open_context(model, ContextSettings(n_ctx=n, n_batch=n)) as context:
            context.evaluate(tokens, 0, "all")
            logits = context.logits().astype(np.float64)[:-1]
    top = logits.max(axis=1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return math.exp(-float(log_p[np.arange(n - 1), tokens[1:]].mean()))


def test_the_two_perplexities_are_those_of_two_files(pair: tuple[Path, Path, Path]) -> None:
    scaled, plain, text = pair
    check = check_effect(scaled, text, N)
    apart = perplexity(scaled) / perplexity(plain)
    assert abs(apart - 1) > 1e-3  # the scaling matters to these weights
    assert check.value == pytest.approx(apart, rel=2e-4)
    assert check.data["n_tokens"] == N - 1
    assert "beyond the original context" in check.detail


def test_a_file_without_scaling_is_skipped(pair: tuple[Path, Path, Path]) -> None:
    _scaled, plain, text = pair
    assert check_effect(plain, text) == Check("effect", "skip", None, None, "the file has no scaling")


def test_the_command(pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled, plain, text = pair
    main(["verify", str(plain), "--effect", str(text), "--json"])
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert names[-1] == "effect"
    assert main(["verify", str(scaled), "--effect-ctx", "512"]) == 2
    assert "--effect-ctx needs --effect TEXT" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert main(["verify", str(scaled), "--effect", str(short), "--json"]) == 2
    assert "too few to measure an effect: give at least 256" in capsys.readouterr().err
