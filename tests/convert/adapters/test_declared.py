"""adapter_config.json held against the adapter's file, numbers that float32 does not hold, and what is told of a merge."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from yarn_edge.cli import main
from yarn_edge.convert.adapter_file import adapter_job
from yarn_edge.convert.adapters.requests import AdaptedCheckpoint
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.outputs import OutputOptions
from yarn_edge.convert.source_model import open_source_model
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.verify.command import verify

from support import adapters, tiny
from support.adapters import pair
from support.made_once import Shelf

Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
GOOD = pair(Q, 64, 64)
LENGTHS = {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(64)}
WHOLE = {f"base_model.model.{Q}.weight": torch.ones(64, 64)}
HUGE = {name: tensor * 1e30 for name, tensor in GOOD.items()}


@pytest.fixture(scope="session")
def base(shelf: Shelf) -> Path:
    return shelf.made_once("adapter-base", lambda folder: adapters.write_base(folder / "base") and None) / "base"


@pytest.fixture(scope="session")
def merged(base: Path, shelf: Shelf) -> Path:
    """An adapter `lora`, merged into m.gguf by us and into the folder `merged` by its formula, in float32."""

    def make(folder: Path) -> None:
        lora = adapters.write(folder / "lora", GOOD)
        convert(AdaptedCheckpoint.of(base, f"{lora}=0.5"), str(folder / "m.gguf"), "F32")
        shutil.copytree(base, folder / "merged")
        tensors = adapters.load_file(base / "model.safetensors")
        a, b = GOOD.values()
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"] + b @ a  # 0.5 * alpha / r = 1
        save_file(tensors, folder / "merged" / "model.safetensors", {"format": "pt"})

    return shelf.made_once("merged-adapter", make)


# tensors, config, and what the message says
REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "DoRA without lengths": (GOOD, {"use_dora": True}, f"use_dora is true, .* no lora_magnitude_vector of {Q}"),
    "lengths without DoRA": (GOOD | LENGTHS, {}, f"use_dora is absent or false, .* lora_magnitude_vector of {Q}"),
    "a module to save": (GOOD, {"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, and nothing of it"),
    "tokens": (GOOD, {"trainable_token_indices": [5]}, "trainable_token_indices names embed_tokens, and nothing"),
    "a target": (GOOD, {"target_modules": ["q_proj", "v_proj"]}, "target_modules names v_proj, and nothing of it"),
    "all biases": (GOOD, {"bias": "all"}, r"bias is all, which means .*\.bias, and nothing of it"),
    "the pairs' biases": (GOOD, {"bias": "lora_only"}, f"bias is lora_only, which means {Q}.bias"),
    "another layer": (GOOD, {"layers_to_transform": [1]}, rf"layers_to_transform is \[1\], .* a pair of {Q}"),
    "an excluded module": (GOOD, {"exclude_modules": ["q_proj"]}, f"exclude_modules is .* a pair of {Q}"),
    "whole, and a pair": (GOOD | WHOLE, {}, f"adds to a weight that .*{Q}.weight of the same adapter replaces"),
    "a huge alpha": (GOOD, {"lora_alpha": 1e39}, r"adapter_config.json: lora_alpha is 1e\+39, .* finite"),
    "an integer beyond doubles": (GOOD, {"lora_alpha": 10**400}, "lora_alpha is .* not a finite number"),
    "a huge scale": (GOOD, {"lora_alpha": 3e38, "r": 4, "rank_pattern": {"x": 1}}, "lora_alpha and the weight 8"),
    "a whole tensor": (
        {name: tensor * torch.inf for name, tensor in WHOLE.items()},
        {},
        f"a: tensor .*{Q}.weight: merged with it, {Q}.weight has values that are not finite",
    ),
    "a huge product": (
        HUGE,
        {},
        rf"a: tensor .*{Q}.lora_A.* merged with it, {Q}.weight has values that are not finite",
    ),
}


def read_merged(base: Path, adapter: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's would reach the user
        model = open_source_model(AdaptedCheckpoint.of(base, adapter))
        model.checkpoint.tensors[f"{Q}.weight"].float32()


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(case: str, base: Path, tmp_path: Path) -> None:
    found, config, message = REFUSED[case]
    folder = adapters.write(tmp_path / "a", found, **config)
    with pytest.raises(YarnEdgeError, match=message):
        read_merged(base, f"{folder}={8 if case == 'a huge scale' else 1}")


# What the base does not have, or PEFT leaves out, need not be in the file.
ALLOWED: dict[str, dict[str, Any]] = {
    "targets of other models": {"target_modules": ["q_proj", "query_key_value"]},
    "a target that is excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "modules of other models": {"modules_to_save": ["classifier"]},
    "this layer": {"layers_to_transform": 0},
    "layers beside a regular expression": {"target_modules": ".*q_proj", "layers_to_transform": [1]},
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_means_nothing_here_is_no_contradiction(case: str, base: Path, tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", GOOD, **ALLOWED[case])
    assert [*open_source_model(AdaptedCheckpoint.of(base, folder)).adapted.changes] == [f"{Q}.weight"]  # type: ignore[union-attr]


def test_no_biases_are_missed_where_the_base_has_none(tmp_path: Path) -> None:
    plain = tiny.write_checkpoint(tmp_path / "base")
    folder = adapters.write(tmp_path / "a", GOOD, bias="all")
    assert open_source_model(AdaptedCheckpoint.of(plain, folder)).adapted is not None


def test_a_weight_beyond_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(YarnEdgeError, match=r"1e40.* is more than float32 holds"):
        AdaptedCheckpoint.of(None, f"{tmp_path / 'a'}=1e40")


def test_numbers_of_a_gguf_adapter_that_overflow(base: Path, tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", HUGE)
    out = tmp_path / "lora.gguf"
    job = adapter_job(AdaptedCheckpoint.of(base, f"{folder}=1e10"), OutputOptions(str(out), "F32"))
    with pytest.raises(YarnEdgeError, match=rf"a=1e\+10: {Q}.weight has values that are not finite"):
        job.write()
    assert not out.exists()


def test_further_files_of_weights(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapters.write(tmp_path / "a", GOOD)
    file = folder / "adapter_model.safetensors"
    shutil.copy(file, folder / "adapter_model.bin")
    open_source_model(AdaptedCheckpoint.of(base, folder))
    assert "adapter_model.bin is left out, as peft does" in capsys.readouterr().err
    shutil.copy(file, folder / "adapter_model-00002-of-00002.safetensors")
    with pytest.raises(YarnEdgeError, match="has adapter_model-00002-of-00002"):
        open_source_model(AdaptedCheckpoint.of(base, folder))


TOLD: dict[str, tuple[dict[str, Any], int, str]] = {
    "alpha 0": ({"lora_alpha": 0}, 1, "a changes nothing: its alpha is 0"),
    "twice": ({}, 2, "a is given 2 times, and is added as often"),
    "all-linear": (
        {"target_modules": "all-linear"},
        1,
        "all-linear, and the file has nothing for down_proj, gate_proj, k_proj, o_proj, up_proj, v_proj",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_is_told(case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, times, message = TOLD[case]
    folder = adapters.write(tmp_path / "a", GOOD, **config)
    open_source_model(AdaptedCheckpoint.of(base, *[folder] * times))
    assert message in capsys.readouterr().err


def test_what_was_merged_is_told_and_written(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each adapter, and a key with their names; a file without adapters has no such key."""
    one = adapters.write(tmp_path / "one", GOOD | LENGTHS, use_dora=True, use_rslora=True)
    other = adapters.write(tmp_path / "other", pair(V, 32, 64) | pair(V.replace("0", "1"), 32, 64), lora_alpha=6)
    out = str(tmp_path / "m.gguf")
    command = ["convert", str(base), "-o", out, "--quant", "F32", "--force"]
    assert main([*command, "--adapter", str(one), "--adapter", f"{other}=0.5"]) == 0
    told = capsys.readouterr().err
    assert "merged one: 1 module, r 4, alpha 8, rsLoRA, DoRA, weight 1\n" in told
    assert "merged other: 2 modules, r 4, alpha 6, weight 0.5\n" in told
    assert read_gguf(out).metadata["yarn_edge.adapters"] == "one, other=0.5"
    assert main(command) == 0
    assert "yarn_edge.adapters" not in read_gguf(out).metadata


def test_the_base_is_no_truth_for_a_merged_file(base: Path, merged: Path) -> None:
    """Its logits are skipped with the reason; those of the merged checkpoint are compared."""
    found = {check.name: check for check in verify(merged / "m.gguf", base, n_tokens=32)}
    assert {check.status for check in found.values()} == {"pass", "skip"}
    assert found["logits"].status == "skip"
    assert "has adapters merged in (lora=0.5): " in found["logits"].detail
    assert "base is without them" in found["logits"].detail
    assert all(check.status == "pass" for check in verify(merged / "m.gguf", merged / "merged", n_tokens=32))
    config = json.loads((merged / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 2
