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

from support import tiny_families
from support.made_once import Shelf
from support.tiny_families import FAMILIES
from support.tiny_mistral3 import SPELLINGS, respelled, wrapped
from support.upstream_bytes import digest


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
    folder = respelled(wrapped(tmp_path / "ck"), spelling)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
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
        "text_config.model_type is 'mistral': inside Mistral3ForConditionalGeneration convert supports ministral3, mistral4": {
            **values,
            "text_config": {**values["text_config"], "model_type": "mistral"},
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
