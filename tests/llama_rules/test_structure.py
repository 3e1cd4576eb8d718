"""A config of another model than the GGUF's: its layers, experts, windows and other numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_positions
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.structure import other_structure
from yarn_edge.verify.checks import Check
from yarn_edge.verify.command import verify

from support import tiny_families

Config = dict[str, Any]
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(checkpoint, its GGUF) by family."""
    folder = tmp_path_factory.mktemp("structure")
    found = {}
    for name in ("mellum", "ministral3", "qwen3_5", "smollm3"):
        checkpoint = tiny_families.write(folder / name, name)
        found[name] = checkpoint, convert(checkpoint, str(folder / f"{name}.gguf"), "F32")[0]
    return found


def with_config(source: Path, folder: Path, changes: Config) -> Path:
    """A folder with the config of `source`, changed; a dict changes a block, ... removes a key."""
    values = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            values.pop(key, None)
        else:
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


OTHERS: dict[str, tuple[str, Config, str]] = {
    "pattern": ("mellum", {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]}, "makes layer 0 full_attention"),
    "no windows": ("mellum", {"layer_types": [FULL] * 4}, "makes layer 0 full_attention"),
    "the family's pattern": ("mellum", {"layer_types": ...}, "makes layer 0 full_attention"),
    "experts": ("mellum", {"num_local_experts": 16}, "num_local_experts is 16, mellum.expert_count of"),
    "experts used": ("mellum", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    "expert size": ("mellum", {"moe_intermediate_size": 96}, "moe_intermediate_size is 96"),
    "window": ("mellum", {"sliding_window": 16}, "sliding_window is 16"),
    "epsilon": ("mellum", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001"),
    "growing queries": (
        "ministral3",
        {"rope_parameters": {"llama_4_scaling_beta": 0.7}},
        "rope_parameters.llama_4_scaling_beta is 0.7",
    ),
    "linear layers": ("qwen3_5", {"layer_types": [LINEAR, LINEAR, FULL, FULL]}, "makes layer 2 full_attention"),
    "the family's interval": (
        "qwen3_5",
        {"layer_types": ..., "full_attention_interval": 2},
        "makes layer 1 full_attention, ",
    ),
    "heads of keys": ("qwen3_5", {"linear_num_key_heads": 3}, "qwen35.ssm.group_count"),
    "layers without rope": ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers has 0 for layer 0"),
    "width": ("smollm3", {"hidden_size": 128}, "hidden_size is 128"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_config(name: str, made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    family, changes, message = OTHERS[name]
    checkpoint, gguf = made[family]
    file = read_gguf(gguf)
    assert list(other_structure(file, read_config(checkpoint))) == []
    folder = with_config(checkpoint, tmp_path / "other", changes)
    (told,) = other_structure(file, read_config(folder))
    assert message in told
    assert told.endswith("this is another model's checkpoint")
    with pytest.raises(YarnEdgeError) as refusal:
        patch(gguf, tmp_path / "out.gguf", checkpoint=folder)
    assert str(refusal.value) == told
    assert not (tmp_path / "out.gguf").exists()


def test_verify_judges_it_with_the_metadata(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    class _Told(Exception):  # the other checks are not needed
        pass

    def first(check: Check) -> None:
        raise _Told(check.name, check.status, check.detail)

    checkpoint, gguf = made["mellum"]
    others = with_config(checkpoint, tmp_path / "other", {"num_local_experts": 16})
    for folder, status, message in ((checkpoint, "pass", "the keys say"), (others, "fail", "num_local_experts is 16")):
        with pytest.raises(_Told) as told:
            verify(gguf, folder, on_check=first)
        name, found, detail = told.value.args
        assert (name, found) == ("metadata", status)
        assert message in detail


@pytest.mark.parametrize("n_types", [3, 5])
def test_layer_types_of_another_length(n_types: int, made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    for family in ("mellum", "smollm3"):
        checkpoint, gguf = made[family]
        folder = with_config(checkpoint, tmp_path / family, {"layer_types": [SLIDING, *[FULL] * (n_types - 1)]})
        message = f"layer_types names {n_types} layers, but num_hidden_layers is 4"
        with pytest.raises(YarnEdgeError, match=message):
            read_positions(read_config(folder))
        with pytest.raises(YarnEdgeError, match=message):
            patch(gguf, tmp_path / "out.gguf", checkpoint=folder)


def test_latent_attention_has_one_head_of_keys(made: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, gguf = made["smollm3"]
    file = read_gguf(gguf)
    one = {**file.metadata, "smollm3.attention.head_count_kv": 1}
    (told,) = other_structure(replace(file, metadata=one), read_config(checkpoint))
    assert "num_key_value_heads is 2" in told
    latent = replace(file, metadata={**one, "smollm3.attention.key_length_mla": 24})
    assert list(other_structure(latent, read_config(checkpoint))) == []
