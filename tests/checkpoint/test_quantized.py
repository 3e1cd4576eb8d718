"""Quantized checkpoints: the method and the remedy, from config.json or from the tensors' names; and configs that were left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from yarn_edge.checkpoint.quantized import METHODS
from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.errors import YarnEdgeError

from support import tiny

Q = "model.layers.0.self_attn.q_proj"
INTEGERS = torch.zeros(8, 8, dtype=torch.int32)
BYTES = torch.zeros(8, 1, dtype=torch.uint8)
FLOATS = torch.ones(8)
EIGHT = torch.ones(8, 8).to(torch.float8_e4m3fn)
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
BNB = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
# config, tensors beside the others, and what the message must say
QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]] = {
    "gptq": (
        GPTQ,
        {"weight": INTEGERS},
        ["by GPTQ (", "quantization_config", "q_proj.weight has dtype I32", "original checkpoint"],
    ),
    "gptq without config": ({}, {"qweight": INTEGERS, "g_idx": INTEGERS[0]}, ["by GPTQ (", "q_proj.g_idx"]),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, {"weight": INTEGERS}, ["by AWQ ("]),
    "awq without config": ({}, {"qweight": INTEGERS, "qzeros": INTEGERS}, ["by GPTQ or AWQ ("]),
    "bitsandbytes, 4 bits": (
        BNB,
        {"weight": BYTES, "weight.absmax": FLOATS},
        ["by bitsandbytes (", "model.dequantize()"],
    ),
    "bitsandbytes, 8 bits, without config": ({}, {"weight": BYTES, "SCB": FLOATS}, ["by bitsandbytes (", "q_proj.SCB"]),
    "an old config of bitsandbytes": (
        {"quantization_config": {"load_in_8bit": True}},
        {"weight": BYTES},
        ["by bitsandbytes ("],
    ),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8"}},
        {"weight": FLOATS, "weight_scale_inv": FLOATS},
        ["by FP8 (", "FineGrainedFP8Config(dequantize=True)"],
    ),
    "compressed-tensors without config": (
        {},
        {"weight": EIGHT, "weight_scale": FLOATS},
        ["by compressed-tensors (", "CompressedTensorsConfig(dequantize=True)"],
    ),
    "modelopt": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        {"weight": EIGHT, "weight_scale": FLOATS[0], "input_scale": FLOATS[1]},
        ["by ModelOpt FP8 (", "original checkpoint"],
    ),
    "nvfp4 of modelopt": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        {"weight": BYTES, "weight_scale": EIGHT, "weight_scale_2": FLOATS[0]},
        ["by ModelOpt NVFP4 ("],
    ),
    "hqq": ({}, {"W_q": BYTES}, ["by HQQ ("]),
    "mlx": (
        {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}},
        {"weight": INTEGERS.view(torch.uint32), "scales": FLOATS, "biases": FLOATS},
        ["by MLX (", "mlx_lm.convert --dequantize"],
    ),
    "an unknown method": (
        {"quantization_config": {"quant_method": "new"}},
        {"weight": BYTES},
        ["is quantized (config.json", "U8"],
    ),
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], form: str = "safetensors") -> Path:
    (folder / "config.json").write_text(json.dumps(tiny.config(**config)))
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: values.clone() for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("case", QUANTIZED)
def test_the_method_and_the_remedy_are_named(case: str, form: str, tmp_path: Path) -> None:
    config, tensors, words = QUANTIZED[case]
    named = {"model.norm.weight": FLOATS, **{f"{Q}.{name}": values for name, values in tensors.items()}}
    write(tmp_path, config, named, form)
    with pytest.raises(YarnEdgeError) as error:
        open_checkpoint(tmp_path)
    message = str(error.value).replace("dtype int32", "dtype I32").replace("dtype uint8", "dtype U8")
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("config", [GPTQ, BNB, {"quantization_config": {"quant_method": "compressed-tensors"}}])
def test_a_config_left_over_beside_floats_is_noted(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, config, {f"{Q}.weight": torch.ones(4, 4)}))
    assert checkpoint.tensors[f"{Q}.weight"].float32().tolist() == torch.ones(4, 4).tolist()
    (note,) = checkpoint.notes
    assert "is a leftover: ignored" in note


@pytest.mark.parametrize(
    "block, words",
    [
        ({"quant_method": "bitnet"}, "computes with quantized values"),
        ({"quant_method": "new"}, "names no known method"),
        ({"bits": 4}, "names no known method"),
        ("gptq", "names no known method"),
    ],
)
def test_floats_that_the_model_may_not_compute_with_are_refused(block: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path, {"quantization_config": block}, {f"{Q}.weight": torch.ones(4, 4)})
    with pytest.raises(YarnEdgeError, match=f"config.json: quantization_config .*{words}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_other_types_without_a_sign_of_quantization(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, {}, {f"{Q}.weight": torch.ones(4, 4).to(dtype)})
    with pytest.raises(
        YarnEdgeError, match=f"tensor {Q}.weight has dtype .*; supported: F32, F16, BF16: save the model"
    ):
        open_checkpoint(tmp_path)


def test_every_method_of_transformers_has_a_row() -> None:
    known = {key for row in METHODS for key in row.keys}
    assert set(AUTO_QUANTIZATION_CONFIG_MAPPING) - known == {"gguf"}
