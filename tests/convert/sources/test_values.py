"""Quantized weights as floats: bit for bit what their library, or a plain reading of its definition, makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.convert.sources import gptq

from support import tiny
from support.quantized_weights import KINDS, RECORDED, SHAPE, digest, rng_of

MODULE = "model.layers.0.mlp.up_proj"
LIBRARIES = json.loads(RECORDED.read_text())


def write(folder: Path, kind: str, form: str = "safetensors") -> torch.Tensor:
    """A checkpoint of one quantized weight. Returns its floats by the definition."""
    pieces, floats = KINDS[kind].make(SHAPE, rng_of(kind))
    (folder / "config.json").write_text(json.dumps(tiny.config(quantization_config=KINDS[kind].config)))
    state = {f"{MODULE}.{end}": piece for end, piece in pieces.items()}
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return floats


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_definition_and_of_its_library(kind: str, tmp_path: Path) -> None:
    floats = write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    (tensor,) = checkpoint.tensors.values()
    assert (tensor.name, tensor.shape) == (f"{MODULE}.weight", SHAPE)
    made = torch.from_numpy(tensor.float32())
    assert made.equal(floats.float())
    assert digest(made) == LIBRARIES.get(kind, digest(floats))
    slices = [tensor.bits(start, start + 7) for start in range(0, SHAPE[0], 7)]
    np.testing.assert_array_equal(np.concatenate(slices), made.numpy())


def test_the_libraries_that_run_here_were_asked() -> None:
    without = {kind for kind in KINDS if kind.startswith(("gptq", "awq")) or "g_idx" in kind}
    assert set(LIBRARIES) == set(KINDS) - without


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq-4-desc_act", "bnb-nf4-double"])
def test_the_format_of_torch(kind: str, tmp_path: Path) -> None:
    floats = write(tmp_path, kind, "bin")
    (tensor,) = open_checkpoint(tmp_path).tensors.values()
    assert torch.from_numpy(tensor.float32()).equal(floats.float())


@pytest.mark.parametrize("kind", ["gptq-4-desc_act", "gptq-3", "awq"])
def test_a_matrix_in_several_panels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "PANEL_BYTES", 1)
    floats = write(tmp_path, kind)
    (tensor,) = open_checkpoint(tmp_path).tensors.values()
    for start, stop in ((0, 96), (30, 70), (95, 96), (1, 2)):
        np.testing.assert_array_equal(tensor.bits(start, stop), floats[start:stop].float().numpy())
