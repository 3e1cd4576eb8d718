"""gpt-oss as published: its MXFP4 experts are kept bit for bit, whatever type is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert import one_pass
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.quantize import quantize
from yarn_edge.convert.recipe import QuantOptions
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.runtime.model import Model
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import tiny_families, tiny_mxfp4
from support.llama_quantize import assert_same_file, upstream
from support.made_once import Shelf
from support.upstream_bytes import TYPES, digest

# By support.upstream_bytes, with llama.cpp as vendored by llama-cpp-python 0.3.36.
UPSTREAM = ("d2d6a364b884b654", "17f6f31efd647340")
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(224)]
EXPERTS = [f"blk.{i}.ffn_{kind}_exps.weight" for i in range(4) for kind in ("gate", "up", "down")]
MXFP4_MOE = 38  # llama.h
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(shelf: Shelf) -> Path:
    return shelf.made_once("gpt-oss-mxfp4", lambda place: tiny_mxfp4.write(place / "ck")) / "ck"


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_bytes_are_those_of_upstreams_converter(folder: Path, tmp_path: Path) -> None:
    paths = convert(folder, str(tmp_path / "{quant}.gguf"), ",".join(TYPES))
    assert tuple(digest(path) for path in paths) == UPSTREAM
    assert [read_gguf(path).metadata["general.file_type"] for path in paths] == [MXFP4_MOE, 7]


def test_in_every_file_and_in_small_slices(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gate and up take turns on disk, so that a slice of one is two ranges there."""
    whole = tensors_of(convert(folder, str(tmp_path / "o.gguf"), "F16")[0])
    monkeypatch.setattr(one_pass, "SLICE_WEIGHTS", 7 * 64)
    capsys.readouterr()
    paths = convert(folder, str(tmp_path / "{quant}.gguf"), "F32,Q4_K_M,Q2_K,IQ4_NL")
    said = capsys.readouterr().err
    assert "note: 8 tensors are MXFP4: every file has them as they are" in said
    assert "rows of 96" not in said  # only experts have them
    for path in paths:
        found = tensors_of(path)
        assert all(found[name].tensor_type.name == "MXFP4" for name in EXPERTS)
        assert all(np.array_equal(found[name].data, whole[name].data) for name in EXPERTS)
    assert tensors_of(paths[1])["blk.0.attn_q.weight"].tensor_type.name == "Q5_0"


def test_no_flag_changes_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(folder), "-o", str(tmp_path / "o.gguf"), "--quant", "Q8_0"]
    assert main([*command, "--tensor-type", "ffn_.*_exps=q8_0"]) == 0
    assert "--tensor-type 'ffn_.*_exps' changes no tensor's type" in capsys.readouterr().err
    assert digest(tmp_path / "o.gguf") == UPSTREAM[1]


def test_the_values_are_transformers(folder: Path, tmp_path: Path) -> None:
    """As floats: with MXFP4 ggml also rounds what it multiplies them with, to 8 bits."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = convert(folder, str(tmp_path / "kept.gguf"), "F32")[0]
    floats = quantize(path, str(tmp_path / "floats.gguf"), "F32", allow_requantize=True)[0]
    saved, found = tiny_families.saved(folder), tensors_of(floats)
    for layer in range(4):
        both, down = (
            convert_moe_packed_tensors(
                saved[tiny_mxfp4.BLOCKS.format(layer, name)],
                saved[tiny_mxfp4.BLOCKS.format(layer, name).replace("_blocks", "_scales")],
                dtype=torch.float32,
            ).swapaxes(1, 2)
            for name in ("gate_up", "down")
        )
        for name, values in (("gate", both[:, ::2]), ("up", both[:, 1::2]), ("down", down)):
            assert np.array_equal(found[f"blk.{layer}.ffn_{name}_exps.weight"].data, values.numpy())
    with (
        Model(floats) as model,
        open_context(model, ContextSettings(256, 224, kv_type="f32", attention="plain")) as context,
    ):
        context.evaluate(TOKENS, 0, "all")
        ours = context.logits()
    assert divergence(reference_logits(folder, TOKENS, streamed=True), ours).kl_mean < 1e-7


def test_verify_reads_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    path = convert(folder, str(tmp_path / "o.gguf"), "F32")[0]
    assert main(["verify", str(path), "--against", str(folder), "--tokens", "64"]) == 0


def test_a_gguf_with_mxfp4_is_quantized_as_llama_cpp_does(folder: Path, tmp_path: Path) -> None:
    path = convert(folder, str(tmp_path / "kept.gguf"), "BF16")[0]
    with pytest.raises(YarnEdgeError, match=r"are quantized already \(MXFP4\).*pass --allow-requantize"):
        quantize(path, str(tmp_path / "no.gguf"), "Q4_K_M")
    for quant in ("Q4_K_M", "MXFP4_MOE"):
        ours = quantize(path, str(tmp_path / f"{quant}.gguf"), quant, allow_requantize=quant == "Q4_K_M")[0]
        assert_same_file(ours, upstream(path, tmp_path / "theirs.gguf", quant, allow_requantize=True))
        kinds = {tensors_of(ours)[name].tensor_type.name for name in EXPERTS}
        assert kinds == ({"Q5_0", "Q8_0"} if quant == "Q4_K_M" else {"MXFP4"})
    options = QuantOptions(tensor_types=(("_exps", type_named("MXFP4")),))
    kept = tensors_of(quantize(path, str(tmp_path / "kept-{quant}.gguf"), "Q4_K_M", options=options)[0])
    assert {kept[name].tensor_type.name for name in EXPERTS} == {"MXFP4"}


GATE, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def without_scales(state: State, _values: dict[str, Any]) -> None:
    del state[GATE + "_scales"]


def scales_as_floats(state: State, _values: dict[str, Any]) -> None:
    state[GATE + "_scales"] = state[GATE + "_scales"].float()


def other_shape(state: State, _values: dict[str, Any]) -> None:
    state[GATE + "_scales"] = state[GATE + "_scales"][:, :-1]


def wider(state: State, _values: dict[str, Any]) -> None:
    for end in ("_blocks", "_scales"):
        state[DOWN + end] = torch.cat([state[DOWN + end]] * 2, 2)


def infinite(state: State, _values: dict[str, Any]) -> None:
    state[DOWN + "_scales"][2, 5, 1] = 255


def undeclared(_state: State, values: dict[str, Any]) -> None:
    del values["quantization_config"]


def elsewhere(state: State, _values: dict[str, Any]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    del state[name + ".weight"]
    state |= {f"{name}.weight{end}": state[GATE + end].clone() for end in ("_blocks", "_scales")}


REFUSED: dict[str, tuple[Callable[[State, dict[str, Any]], None], str]] = {
    "one half": (without_scales, f"{GATE}_blocks is one half of MXFP4 weights, and {GATE}_scales is missing"),
    "floats": (scales_as_floats, f"{GATE}_blocks is one half of MXFP4 weights, and {GATE}_scales is not U8"),
    "another shape": (
        other_shape,
        f"{GATE}_blocks has the shape [4, 192, 2, 16] and {GATE}_scales [4, 191, 2]: MXFP4 has",
    ),
    "wider rows": (wider, f"tensor {DOWN}_blocks has the shape [4, 64, 192], but config.json implies [4, 64, 96]"),
    "not finite": (infinite, "has MXFP4 blocks whose scale is not finite: the file is damaged"),
    "not in the config": (undeclared, "is quantized by MXFP4 (tensor "),
    "not of experts": (elsewhere, "is quantized by MXFP4 (config.json: quantization_config; tensor "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_pair_is_refused(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[case]
    state, values = tiny_families.saved(folder), json.loads((folder / "config.json").read_text())
    change(state, values)
    tiny_families.rewrite(tmp_path / "ck", state, values)
    assert main(["convert", str(tmp_path / "ck"), "-o", str(tmp_path / "x.gguf"), "--quant", "Q8_0", "--quiet"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note:", "warning:"))]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "x.gguf").exists()


# openai/gpt-oss-20b, config.json.
PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": tiny_mxfp4.CONFIG,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def test_the_published_config_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    declared = shown["declared"]
    assert (declared["factor"], declared["original_context"], declared["extended_context"]) == (32.0, 4096, 131072)
    assert (declared["truncate"], declared["rope_theta"], declared["dim"]) == (False, 150000.0, 64)
    assert (shown["plans"][""]["form"], shown["findings"]) == ("live", [])
