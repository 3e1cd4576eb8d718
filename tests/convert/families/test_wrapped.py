"""Ministral 3 inside Mistral3ForConditionalGeneration: the language model is converted, under both spellings of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.gguf.read import read_gguf

from support import tiny, tiny_families
from support.made_once import Shelf
from support.tiny_families import FAMILIES
from support.upstream_bytes import digest

VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
# What stands before the language model's tensors: as save_pretrained writes it, and as transformers 5 has it in memory.
SPELLINGS = {
    "saved": {},
    "in memory": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
}


def wrapped(folder: Path, tied: bool = False) -> Path:
    """A Mistral 3 around the tiny Ministral 3, written by transformers."""
    import transformers

    inner = tiny_families.model("ministral3", tie_word_embeddings=tied)
    config = transformers.Mistral3Config(
        text_config=inner.config.to_dict(), vision_config=VISION, tie_word_embeddings=tied, image_token_index=3
    )
    outer = transformers.Mistral3ForConditionalGeneration(config)
    outer.model.language_model.load_state_dict(inner.model.state_dict())
    if not tied:
        outer.lm_head.load_state_dict(inner.lm_head.state_dict())
    outer.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bare(shelf: Shelf) -> Path:
    """The language model alone, as a GGUF."""

    def make(folder: Path) -> None:
        convert(tiny_families.write(folder / "ck", "ministral3"), str(folder / "bare.gguf"), "F32")

    return shelf.made_once("ministral3-alone", make) / "bare.gguf"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_language_model_is_converted(
    spelling: str, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = wrapped(tmp_path / "saved" / "ck")
    state = tiny_families.saved(folder)
    for old, new in SPELLINGS[spelling].items():
        state = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in state.items()}
    tiny_families.rewrite(tmp_path / "ck", state, json.loads((folder / "config.json").read_text()))
    path = convert(tmp_path / "ck", str(tmp_path / "out.gguf"), "F32")[0]
    told = capsys.readouterr().err
    assert "only the language model is converted; left out: " in told
    assert all(part in told for part in ("vision_tower (", "multi_modal_projector ("))
    assert digest(path) == digest(bare)
    ours, alone = read_gguf(path).metadata, read_gguf(bare).metadata
    keys = [key for key in alone if key.startswith("mistral3.")]
    assert {key: ours[key] for key in keys} == {key: alone[key] for key in keys}
    assert ours["mistral3.attention.temperature_scale"] == pytest.approx(0.1)


def test_tied_embeddings_are_the_wrappers_word(tmp_path: Path) -> None:
    path = convert(wrapped(tmp_path / "ck", tied=True), str(tmp_path / "out.gguf"), "F32")[0]
    assert "output.weight" not in read_gguf(path).tensors


def test_another_language_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wrapped(tmp_path / "ck")
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    cases = {
        "text_config.model_type is 'mistral4': inside Mistral3ForConditionalGeneration convert supports ministral3": {
            **values,
            "text_config": {**values["text_config"], "model_type": "mistral4"},
        },
        "text_config is missing: it describes the language model": {
            k: v for k, v in values.items() if k != "text_config"
        },
    }
    for message, changed in cases.items():
        (folder / "config.json").write_text(json.dumps(changed))
        assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
        assert message in capsys.readouterr().err


def test_a_tensor_outside_that_nobody_knows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wrapped(tmp_path / "ck")
    state = tiny_families.saved(folder) | {"audio_tower.weight": torch.zeros(3)}
    tiny_families.rewrite(folder, state, json.loads((folder / "config.json").read_text()))
    assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
    assert "tensor audio_tower.weight has no place in the GGUF" in capsys.readouterr().err
    assert FAMILIES["ministral3"][0] == "ministral3"
