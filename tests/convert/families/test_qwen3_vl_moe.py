"""Qwen3-VL's text part with experts, whose matrices are transposed in published checkpoints, and not where transformers 5 saved them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert import row_reader
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.gguf.read import read_gguf
from yarn_edge.verify.command import verify

from support import tiny_families, tiny_qwen3_vl
from support.made_once import Shelf
from support.tiny_families import ORIGINAL
from support.upstream_bytes import TYPES, digest

# By support.upstream_bytes, of a checkpoint as published.
UPSTREAM = ("8903c78a7911728e", "d281f393c7cf9c32")
YARN = {**tiny_qwen3_vl.PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LAYER = "model.language_model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def made(shelf: Shelf) -> Path:
    """A folder with two checkpoints: as published, and as transformers saves it."""

    def make(folder: Path) -> None:
        model = tiny_qwen3_vl.model(YARN, experts=True)
        model.config.text_config.max_position_embeddings = 4 * ORIGINAL
        tiny_qwen3_vl.write(folder / "saved", model)
        tiny_qwen3_vl.as_published(tiny_qwen3_vl.write(folder / "published", model))

    return shelf.made_once("qwen3-vl-moe", make)


def test_the_logits_are_transformers(made: Path, tmp_path: Path) -> None:
    path = convert(made / "published", str(tmp_path / "out.gguf"), "F32")[0]
    meta = read_gguf(path).metadata
    assert meta["qwen3vlmoe.rope.dimension_sections"].tolist() == [22, 21, 21, 0]
    assert (meta["qwen3vlmoe.expert_count"], meta["qwen3vlmoe.expert_used_count"]) == (4, 2)
    checks = {check.name: check for check in verify(path, made / "published", n_tokens=4 * ORIGINAL)}
    assert checks["logits"].data["n_tokens"] == 4 * ORIGINAL
    assert checks["logits"].value is not None
    assert checks["logits"].value < 1e-8
    assert {check.status for check in checks.values()} == {"pass"}


def test_both_layouts_are_one_model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [convert(made / name, str(tmp_path / f"{name}.gguf"), "F32")[0] for name in ("saved", "published")]
    monkeypatch.setattr(row_reader, "_BAND_BYTES", 1000)  # 2 to 5 of its rows
    paths.append(convert(made / "published", str(tmp_path / "bands.gguf"), "F32")[0])
    assert len({digest(path) for path in paths}) == 1
    assert read_gguf(paths[0]).tensors["blk.1.ffn_down_exps.weight"].shape == (48, 64, 4)


def test_the_tensors_are_those_of_upstreams_converter(tmp_path: Path) -> None:
    folder = tiny_qwen3_vl.write_bfloat16(tmp_path / "ck", experts=True)
    assert tuple(digest(p) for p in convert(folder, str(tmp_path / "{quant}.gguf"), ",".join(TYPES))) == UPSTREAM


def _text(**changes: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda _state, values: values["text_config"].update(changes)


def _missing(state: dict[str, torch.Tensor], _values: dict[str, Any]) -> None:
    del state[LAYER + "down_proj"]


def _wrong_shape(state: dict[str, torch.Tensor], _values: dict[str, Any]) -> None:
    state[LAYER + "down_proj"] = state[LAYER + "down_proj"][:, 1:]


def _too_many(state: dict[str, torch.Tensor], _values: dict[str, Any]) -> None:
    state[LAYER + "lost"] = torch.zeros(3)


REFUSED = {
    "missing": (_missing, "tensor model.layers.1.mlp.experts.down_proj is missing"),
    "shape": (_wrong_shape, "has the shape [4, 47, 64], but config.json implies [4, 48, 64]"),
    "too many": (_too_many, f"tensor {LAYER}lost has no place in the GGUF"),
    "a layout that the shape does not tell": (
        _text(moe_intermediate_size=32),
        "does not tell whether its matrices are transposed",
    ),
    "dense layers": (_text(mlp_only_layers=[0]), "text_config.mlp_only_layers is [0]: only [] can be converted"),
    "step": (_text(decoder_sparse_step=2), "text_config.decoder_sparse_step is 2: only 1 can be converted"),
    "bias": (_text(attention_bias=True), "llama.cpp has no place for the bias of o_proj"),
    "without experts": (
        _text(model_type="qwen3_vl_text"),
        "inside Qwen3VLMoeForConditionalGeneration convert supports qwen3_vl_moe_text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = REFUSED[case]
    state = tiny_families.saved(made / "published")
    values = json.loads((made / "published" / "config.json").read_text())
    change(state, values)
    tiny_families.rewrite(tmp_path / "ck", state, values)
    assert main(["convert", str(tmp_path / "ck"), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.gguf").exists()


def test_a_transposed_matrix_of_one_expert_is_what_is_read(made: Path, tmp_path: Path) -> None:
    """Against PyTorch's own transposition, expert by expert."""
    path = convert(made / "published", str(tmp_path / "out.gguf"), "F32")[0]
    state = tiny_families.saved(made / "published")
    import gguf

    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    gate, up = state[LAYER + "gate_up_proj"].transpose(1, 2).chunk(2, dim=1)
    down = state[LAYER + "down_proj"].transpose(1, 2)
    for name, expected in {"gate": gate, "up": up, "down": down}.items():
        assert np.array_equal(found[f"blk.1.ffn_{name}_exps.weight"], expected.numpy())
