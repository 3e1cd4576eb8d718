"""Qwen 3.5 inside its multimodal class, with a block that predicts further tokens: the language model alone is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.gguf.read import read_gguf
from yarn_edge.verify.command import verify

from support import tiny_families
from support.made_once import Shelf
from support.upstream_bytes import digest

CLASSES = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "qwen3_5"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
}
AXES = {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}
# What the text_config of Qwen's own repositories has besides.
PUBLISHED = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
}


def wrapped(folder: Path, name: str) -> Path:
    """The tiny language model as it stands in Qwen's repositories, with a vision tower and a block for prediction."""
    plain = tiny_families.write(folder.parent / f"plain-{name}", name)
    text = json.loads((plain / "config.json").read_text())
    text["rope_parameters"] |= AXES
    state = {
        key if key == "lm_head.weight" else key.replace("model.", "model.language_model.", 1): value
        for key, value in tiny_families.saved(plain).items()
    }
    state |= {key: torch.zeros(4) for key in ("mtp.norm.weight", "mtp.layers.0.input_layernorm.weight")}
    state["model.visual.pos_embed.weight"] = torch.zeros(4, 4)
    kind, model_type = CLASSES[name]
    values = {"architectures": [kind], "model_type": model_type, "tie_word_embeddings": False}
    tiny_families.rewrite(folder, state, values | {"text_config": text | PUBLISHED})
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_the_language_model_is_converted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wrapped(tmp_path / "ck", name)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    told = capsys.readouterr().err
    assert "note: only the language model is converted; left out: visual (1 tensors)" in told
    assert "note: left out: 2 tensors of layers that predict further tokens" in told
    alone = convert(tmp_path / f"plain-{name}", str(tmp_path / "alone.gguf"), "F32")[0]
    assert digest(path) == digest(alone)
    checks = {check.name: check for check in verify(path, folder, n_tokens=256)}
    assert {check.status for check in checks.values()} == {"pass"}
    assert checks["logits"].value is not None
    assert checks["logits"].value < 1e-7
    for model in (path, folder):
        capsys.readouterr()
        assert main(["inspect", str(model), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["findings"] == []


def test_what_the_gguf_says_of_its_layers(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.made_once("family-qwen3_5", lambda made: tiny_families.write(made / "ck", "qwen3_5")) / "ck"
    meta = read_gguf(convert(folder, str(tmp_path / "out.gguf"), "F16")[0]).metadata
    wanted: dict[str, Any] = {
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 6,
        "ssm.inner_size": 96,
        "full_attention_interval": 4,
        "rope.dimension_count": 8,
    }
    assert {key: meta[f"qwen35.{key}"] for key in wanted} == wanted
    assert meta["qwen35.attention.recurrent_layers"].tolist() == [True, True, True, False]
    assert meta["qwen35.rope.dimension_sections"].tolist() == [2, 1, 1, 0]


def test_layers_in_another_order_are_exact(tmp_path: Path) -> None:
    types = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    folder = tiny_families.write(tmp_path / "ck", "qwen3_5", layer_types=types)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert "qwen35.full_attention_interval" not in read_gguf(path).metadata
    checks = {check.name: check for check in verify(path, folder, n_tokens=256)}
    assert {check.status for check in checks.values()} == {"pass"}
    assert checks["logits"].value is not None
    assert checks["logits"].value < 1e-7
