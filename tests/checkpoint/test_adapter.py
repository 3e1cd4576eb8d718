"""Adapters: named as such, with the remedy, wherever they lie; never left out of a GGUF in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from yarn_edge.checkpoint.config_file import find_adapter, read_config
from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.errors import YarnEdgeError

from support import tiny

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "target_modules": ["q_proj"]}
# files of an adapter (None: not JSON), and what the message must say
ADAPTERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lora": (
        {"adapter_config.json": LORA, "adapter_model.safetensors": None},
        ["a LORA adapter of org/base", "(adapter_config.json, adapter_model.safetensors)", "merge_and_unload"],
    ),
    "bin": ({"adapter_config.json": LORA, "adapter_model.bin": None}, ["adapter_model.bin", "merge_and_unload"]),
    "shards": (
        {
            "adapter_config.json": LORA,
            "adapter_model-00001-of-00002.safetensors": None,
            "adapter_model-00002-of-00002.safetensors": None,
            "adapter_model.safetensors.index.json": {},
        },
        ["adapter_model-00002-of-00002.safetensors"],
    ),
    "its config alone": ({"adapter_config.json": LORA}, ["a LORA adapter of org/base (adapter_config.json)"]),
    "its weights alone": ({"adapter_model.safetensors": None}, ["an adapter (adapter_model.safetensors)"]),
    "dora": ({"adapter_config.json": LORA | {"use_dora": True}}, ["a LORA adapter with DoRA of org/base"]),
    "ia3": ({"adapter_config.json": {"peft_type": "IA3"}}, ["an IA3 adapter (", "merge_and_unload"]),
    "prompt tuning": (
        {"adapter_config.json": {"peft_type": "PROMPT_TUNING"}, "adapter_model.safetensors": None},
        ["a PROMPT_TUNING adapter", "cannot be merged"],
    ),
    "what LoRA did not train": ({"non_lora_trainables.bin": None}, ["non_lora_trainables.bin"]),
    "mlx": (
        {"adapter_config.json": {"fine_tune_type": "lora", "model": "org/base"}, "adapters.safetensors": None},
        ["a lora adapter of org/base", "mlx_lm.fuse"],
    ),
    "a strange config": (
        {"adapter_config.json": {"peft_type": ["LORA"], "base_model_name_or_path": 3}},
        ["an adapter ("],
    ),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("weights") / "ck")


def add_files(folder: Path, files: dict[str, Any]) -> None:
    for name, values in files.items():
        (folder / name).write_text("x" if values is None else json.dumps(values))


def message(error: pytest.ExceptionInfo[YarnEdgeError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_beside_weights_is_refused(case: str, weights: Path, tmp_path: Path) -> None:
    files, words = ADAPTERS[case]
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert find_adapter(tmp_path) is None
    add_files(tmp_path, files)
    with pytest.raises(YarnEdgeError) as error:
        open_checkpoint(tmp_path)
    assert [word for word in [*words, str(tmp_path), "remove these files"] if word not in message(error)] == []


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_alone_is_called_one(case: str, tmp_path: Path) -> None:
    files, words = ADAPTERS[case]
    add_files(tmp_path, files)
    with pytest.raises(YarnEdgeError) as error:
        read_config(tmp_path)
    assert [word for word in [*words, "no model (no config.json)"] if word not in message(error)] == []


@pytest.mark.parametrize(
    "inner, shown",
    {
        "checkpoint-500/adapter_config.json": "checkpoint-500",
        "checkpoint-500/config.json": "checkpoint-500",
        "snapshots/0123abc/config.json": "snapshots/0123abc",
    }.items(),
)
def test_a_folder_of_checkpoints_names_them(inner: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / inner).parent.mkdir(parents=True)
    (tmp_path / inner).write_text("{}")
    with pytest.raises(YarnEdgeError, match=f"has no config.json.*there is one in {shown}: pass such a folder"):
        read_config(tmp_path)


def test_an_adapter_of_a_trainers_checkpoint_is_not_the_models(weights: Path, tmp_path: Path) -> None:
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "checkpoint-500").mkdir()
    add_files(tmp_path / "checkpoint-500", ADAPTERS["lora"][0])
    assert open_checkpoint(tmp_path).tensors.keys() == open_checkpoint(weights).tensors.keys()


Q = "model.layers.0.self_attn.q_proj"
# The tensor in place of Q's weight, and another one.
UNMERGED = {
    "lora": (f"{Q}.base_layer.weight", f"{Q}.lora_A.default.weight"),
    "lora of a PeftModel": (f"base_model.model.{Q}.weight", f"base_model.model.{Q}.lora_B.weight"),
    "trained as a whole": (f"{Q}.original_module.weight", f"{Q}.modules_to_save.default.weight"),
    "ia3": (f"{Q}.base_layer.weight", f"{Q}.ia3_l.default"),
    "dora": (f"{Q}.weight", f"{Q}.lora_magnitude_vector.default.weight"),
    "loha": (f"{Q}.weight", f"{Q}.hada_w1_a.default"),
}


@pytest.mark.parametrize("case", UNMERGED)
def test_an_adapter_inside_the_weights_is_named(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()))
    names = UNMERGED[case]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(YarnEdgeError) as error:
        open_checkpoint(tmp_path)
    assert "adapter that was not merged" in message(error)
    assert "merge_and_unload" in message(error)
    assert any(name in message(error) for name in names)
