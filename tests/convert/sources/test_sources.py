"""Checkpoints whose weights are quantized, converted: the same files as of the floats; and those that are refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from yarn_edge.checkpoint.quantized import METHODS
from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.sources.methods import READERS
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.command import inspect_model
from yarn_edge.verify.transformers_reference import check_reference, reference_logits

from support import tiny
from support.quantized_weights import KINDS, compressed, state_of

PLAIN = tiny.tensors(tiny.config())
Q = "model.layers.0.self_attn.q_proj"
State = dict[str, torch.Tensor]


def write(folder: Path, state: State, block: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny.config(**({"quantization_config": block} if block else {}))))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return folder


def data(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq-4-desc_act"])
def test_the_files_are_those_of_the_floats(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, floats = state_of(kind, PLAIN)
    state[f"{Q}.k_scale"] = torch.tensor(1.0)
    name = str(tmp_path / "{}-{{quant}}.gguf")
    folders = [
        write(tmp_path / "q", state, KINDS[kind].config),
        write(tmp_path / "f", {n: v.float() for n, v in floats.items()}, None),
    ]
    for folder in folders:
        tiny.write_tokenizer(folder)
    made = convert(folders[0], name.format("q"), "F32,Q8_0")
    told = capsys.readouterr().err
    same = convert(folders[1], name.format("f"), "F32,Q8_0")
    assert [data(path) for path in made] == [data(path) for path in same]
    what = {"fp8-blocks": "FP8 (blocks of 40 x 24)", "gptq-4-desc_act": "GPTQ (4 bits, groups of 32)"}[kind]
    assert read_gguf(made[1]).metadata["yarn_edge.source_quantization"] == what
    assert "yarn_edge.source_quantization" not in read_gguf(same[1]).metadata
    assert f"note: 14 weights are quantized by {what}: dequantized while they are read" in told
    assert "1 scales of activations or of the KV cache are left out" in told
    assert ("What few bits lost stays lost" in told) == (kind != "fp8-blocks")


def test_experts_of_one_tensor_have_scales_of_their_own(tmp_path: Path) -> None:
    codes = torch.arange(3 * 5 * 7).reshape(3, 5, 7).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    block = {"quant_method": "fp8", "weight_block_size": [4, 3]}
    write(tmp_path, {name: codes, f"{name}_scale_inv": scales}, block)
    (tensor,) = open_checkpoint(tmp_path).tensors.values()
    each = scales.repeat_interleave(4, 1).repeat_interleave(3, 2)[:, :5, :7]
    assert torch.from_numpy(tensor.float32()).equal(codes.float() * each)


LISTS = {
    "fp8-blocks": {"modules_to_not_convert": ["model.layers.1.mlp", "lm_head"]},
    "awq": {"modules_to_not_convert": ["layers.1.mlp"]},
    "ct-int4": {"ignore": ["re:.*layers\\.1\\.mlp.*", "lm_head"]},
    "gptq-4": {"dynamic": {"-:.*layers\\.1\\.mlp": {}}},
    "bnb-nf4": {"llm_int8_skip_modules": ["model.layers.1.mlp.up_proj", "gate_proj", "down_proj"]},
}


@pytest.mark.parametrize("kind", LISTS)
def test_what_is_not_quantized_must_be_listed(kind: str, tmp_path: Path) -> None:
    state, _floats = state_of(
        kind, PLAIN, ("layers.1.mlp",) if kind != "bnb-nf4" else ("layers.1.mlp.up_proj", "gate", "down")
    )
    checkpoint = open_checkpoint(write(tmp_path, state, KINDS[kind].config | LISTS[kind]))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.from_numpy(checkpoint.tensors[name].float32()).equal(PLAIN[name])
    write(tmp_path, state, KINDS[kind].config)
    with pytest.raises(
        YarnEdgeError, match=r"tensor .*mlp\.\w+\.weight is not quantized, but .*layers\.0\.mlp.* does not say so"
    ):
        open_checkpoint(tmp_path)
    write(tmp_path, state_of(kind, PLAIN)[0], KINDS[kind].config | LISTS[kind])
    with pytest.raises(YarnEdgeError, match=r"tensor .*mlp\.\w+\.weight is quantized, but quantization_config lists"):
        open_checkpoint(tmp_path)


def edited(end: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[State], None]:
    def change(state: State) -> None:
        name = f"{Q}.{end}"
        new = edit(state.pop(name))
        if new is not None:
            state[name] = new

    return change


def added(**tensors: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.update({f"{Q}.{end}": value for end, value in tensors.items()})


GONE: Callable[[torch.Tensor], None] = lambda _value: None  # noqa: E731
CUT: Callable[[torch.Tensor], torch.Tensor] = lambda value: value[:-1]  # noqa: E731
NOTHING = added()
JSON = "weight.quant_state.bitsandbytes__nf4"
# kind, changes of quantization_config, change of the tensors, what the message must say
REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[State], None], str]] = {
    "no scale": (
        "fp8-blocks",
        {},
        edited("weight_scale_inv", GONE),
        "q_proj.weight_scale_inv is missing: .*without it",
    ),
    "a cut scale": ("fp8-blocks", {}, edited("weight_scale_inv", CUT), r"has the shape \[1, 3\], expected \[2, 3\]"),
    "other blocks": ("fp8-blocks", {"weight_block_size": [128, 128]}, NOTHING, r"has the shape .* expected \[1, 1\]"),
    "no block": ("fp8-blocks", {"weight_block_size": [0, 128]}, NOTHING, "weight_block_size .*whole numbers above 0"),
    "fp4 experts": ("fp8-blocks", {"expert_dtype": "fp4"}, NOTHING, "expert_dtype is 'fp4', which cannot be"),
    "float8_e5m2": ("fp8-blocks", {"fmt": "e5m2"}, NOTHING, "fmt is 'e5m2'"),
    "whole numbers as scales": (
        "fp8-blocks",
        {},
        edited("weight_scale_inv", torch.Tensor.int),
        "has dtype I32, expected F32",
    ),
    "a weight twice": ("gptq-4", {}, added(weight=PLAIN[f"{Q}.weight"]), "q_proj.weight is there beside .*qweight"),
    "marlin": ("gptq-4", {"checkpoint_format": "marlin"}, NOTHING, "checkpoint_format is 'marlin', which is not read"),
    "bits": ("gptq-4", {"bits": 5}, NOTHING, "bits is 5"),
    "other bits": ("gptq-4", {"bits": 8}, NOTHING, r"scales has the shape \[2, 64\], expected \[1, 64\]"),
    "bits of a module": ("gptq-4", {"dynamic": {"+:.*down_proj": {"bits": 8}}}, NOTHING, "dynamic quantizes"),
    "a group too far": ("gptq-4", {}, edited("g_idx", lambda v: v + 1), "g_idx names group 2, but there are 2"),
    "zero points of -1": (
        "gptq-4",
        {},
        edited("qzeros", lambda v: v | 15),
        "zero points of -1, which programs read diff",
    ),
    "gemv": ("awq", {"version": "gemv"}, NOTHING, "version is 'gemv', which is not read"),
    "no zero points": ("awq", {}, edited("qzeros", GONE), "q_proj.qzeros is missing"),
    "nvfp4": (
        "ct-int4",
        {"format": "nvfp4-pack-quantized"},
        NOTHING,
        "format is 'nvfp4-pack-quantized', which is not read",
    ),
    "sparse": ("ct-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, NOTHING, "sparsity_config.format is"),
    "rotated": ("ct-int4", {"transform_config": {"config_groups": {"R1": {}}}}, NOTHING, "rotates weights"),
    "another shape": ("ct-int4", {}, edited("weight_shape", lambda v: v + 8), "q_proj.weight_packed has the shape"),
    "groups": (
        "ct-int4",
        {"config_groups": compressed("", 4, "int", "group", group_size=16)["config_groups"]},
        NOTHING,
        r"weight_scale has the shape \[64, 2\], expected \[64, 4\]",
    ),
    "no targets": (
        "ct-int4",
        {"config_groups": {"g": {"targets": ["re:.*mlp"], "weights": {"num_bits": 4, "group_size": 32}}}},
        NOTHING,
        "q_proj.weight is quantized, but no targets of quantization_config.config_groups",
    ),
    "no groups": ("ct-int4", {"config_groups": None}, NOTHING, "config_groups is missing"),
    "no JSON": ("bnb-nf4", {}, edited(JSON, CUT), "is not a JSON object"),
    "no absmax": ("bnb-nf4", {}, edited("weight.absmax", GONE), "q_proj.weight.absmax is missing"),
    "half a weight": ("bnb-nf4", {}, edited("weight", CUT), "has 2047 bytes, expected half of 64 x 64 weights"),
    "a GPU's layout": (
        "bnb-int8",
        {},
        edited("weight_format", lambda v: v + 1),
        "is not 0, a layout of one kind of GPU",
    ),
    "a scale of nothing": (
        "ct-fp8-channel",
        {},
        added(weight_global_scale=torch.ones(1)),
        "weight_global_scale belongs to a quantized weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_dequantized_is_refused(case: str, tmp_path: Path) -> None:
    kind, changes, change, words = REFUSED[case]
    state, _floats = state_of(kind, {f"{Q}.weight": PLAIN[f"{Q}.weight"]})
    change(state)
    write(tmp_path, state, KINDS[kind].config | changes)
    with pytest.raises(YarnEdgeError, match=words) as error:
        open_checkpoint(tmp_path).tensors[f"{Q}.weight"].float32()
    assert "\n" not in str(error.value)


def test_every_reader_has_a_row_that_says_so() -> None:
    assert {key for row in METHODS if row.dequantized for key in row.keys} >= set(READERS)
    assert all(set(READERS) & set(row.keys) for row in METHODS if row.dequantized)


@pytest.mark.parametrize(
    "block, words",
    [
        (KINDS["gptq-4"].config, "quantized by GPTQ (bits 4, group_size 32): convert dequantizes them"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "by ModelOpt FP8 (quant_algo 'FP8'): convert does not read them: take the",
        ),
        ({"quant_method": "new"}, "quantization_config names no known method"),
    ],
)
def test_inspect_says_what_it_is(block: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(quantization_config=block)))
    (note,) = [text for text in inspect_model(tmp_path)["notes"] if "quantiz" in text]
    assert words in note


def test_verify_says_that_its_reference_takes_floats(tmp_path: Path) -> None:
    write(tmp_path, state_of("fp8-blocks", PLAIN)[0], KINDS["fp8-blocks"].config)
    for run in (lambda: check_reference(tmp_path), lambda: reference_logits(tmp_path, [1, 2])):
        with pytest.raises(
            YarnEdgeError, match=r"weights are quantized by FP8 .*_scale_inv.*, and the reference takes floats"
        ):
            run()
