"""`--lora`: what is no adapter of a model is refused before llama.cpp sees it, and every command that runs a model takes one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.header import pack_key, write_arrays
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.lora import LoraFile
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text

from support import tiny_gguf

WEIGHT = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "m.gguf", "llama")


def write(path: Path, base: Path, tensors: dict[str, Any] | None = None, **keys: Any) -> Path:
    """An adapter of q in the first layer. keys: "__" stands for a dot; None leaves one out."""
    width, rows = read_gguf(base).tensors[WEIGHT].shape
    rng = np.random.default_rng(0)
    values = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    arrays = {
        f"{WEIGHT}.lora_a": rng.standard_normal((4, width)).astype(np.float32),
        f"{WEIGHT}.lora_b": rng.standard_normal((rows, 4)).astype(np.float32),
        **(tensors or {}),
    }
    entries = [pack_key(key, value) for key, value in values.items() if value is not None]
    write_arrays(path, entries, {name: array for name, array in arrays.items() if array is not None})
    return path


ONES = np.ones((4, 3), np.float32)
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a model": ({}, {"general__type": "model"}, "is not a LoRA adapter as GGUF"),
    "a control vector": ({}, {"adapter__type": "cvec"}, "is not a LoRA adapter as GGUF"),
    "another architecture": ({}, {"general__architecture": "qwen2"}, "is an adapter of qwen2, but m.gguf is llama"),
    "an alpha that is no float": ({}, {"adapter__lora__alpha": 8}, "reads a float32 there"),
    "an alpha that is not finite": ({}, {"adapter__lora__alpha": float("inf")}, "alpha.*must be a finite number"),
    "aLoRA": ({}, {"adapter__alora__invocation_tokens": [1, 2]}, "acts only after certain tokens"),
    "half a pair": ({f"{WEIGHT}.lora_b": None}, {}, "attn_q.weight.lora_b is missing"),
    "another size": ({f"{WEIGHT}.lora_a": ONES}, {}, "has other sizes than in m.gguf"),
    "another tensor": ({"x.weight.lora_a": ONES, "x.weight.lora_b": ONES}, {}, "x.weight is not in m.gguf"),
    "a norm": (
        {f"output_norm.weight.{name}": np.ones((1, 1), np.float32) for name in ("lora_a", "lora_b")},
        {},
        "is a norm, to which llama.cpp adds nothing",
    ),
    "another ending": ({"output_norm.weight": np.ones(4, np.float32)}, {}, "is neither .lora_a nor .lora_b"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_adapter_of_the_model(case: str, tiny_model: Path, tmp_path: Path) -> None:
    tensors, keys, message = BROKEN[case]
    path = write(tmp_path / "a.gguf", tiny_model, tensors, **keys)
    with Model(tiny_model) as model, pytest.raises(YarnEdgeError, match=message):
        model.add_loras([LoraFile.parse(str(path))])


COMMANDS: dict[str, list[str]] = {
    "chat": ["-p", "Hello", "--raw", "--max-tokens", "2", "--ctx", "64"],
    "perplexity": ["--text", "TEXT", "--ctx", "32", "--json"],
    "compare": ["MODEL", "--text", "TEXT", "--ctx", "32", "--json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_with_it(
    command: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    text = tmp_path / "t.txt"
    text.write_text(sample_text()[:300])
    stand = {"MODEL": str(tiny_model), "TEXT": str(text)}
    words = [stand.get(word, word) for word in COMMANDS[command]]
    lora = write(tmp_path / "a.gguf", tiny_model)
    assert main([command, str(tiny_model), *words, "--lora", f"{lora}=0.5"]) == 0
    told = capsys.readouterr()
    assert "m.gguf + a.gguf=0.5" in told.out + told.err
    if command == "compare":
        assert json.loads(told.out)["models"][0]["kld_mean"] > 1e-9
    assert main([command, str(tiny_model), *words, "--lora", f"{lora}=much"]) == 2
    assert "'much' is not a scale" in capsys.readouterr().err


def test_scores_are_kept_by_adapter(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(sample_text()[:300])
    lora, saved = write(tmp_path / "a.gguf", tiny_model), str(tmp_path / "s.npz")
    run = ["perplexity", str(tiny_model), "--text", str(tmp_path / "t.txt"), "--ctx", "32", "--save", saved]
    assert main(run) == 0
    assert main([*run, "--resume", "--lora", str(lora)]) == 2
    assert "the model" in capsys.readouterr().err


def test_one_that_changes_nothing_is_told(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_gguf(tiny_model).tensors[WEIGHT].shape[1]
    zero = write(tmp_path / "zero.gguf", tiny_model, {f"{WEIGHT}.lora_b": np.zeros((rows, 4), np.float32)})
    with Model(tiny_model) as model:
        model.add_loras([LoraFile.parse(str(zero)), LoraFile.parse(f"{write(tmp_path / 'a.gguf', tiny_model)}=0")])
        assert [file.gguf.path.name for file in model.loras.files] == ["zero.gguf"]
    told = capsys.readouterr().err
    assert "zero.gguf changes nothing: its products are 0" in told
    assert "a.gguf changes nothing: its scale is 0" in told
