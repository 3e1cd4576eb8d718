"""What trainers write, by trainer: read as it ran, or refused with the remedy. transformers, given the plain form, is the truth.

The configs are facts about LLaMA-Factory, axolotl, Unsloth, NeMo RL, TRL and published fine-tunes; two are made here, by what these
trainers do to a config of the installed transformers.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.checkpoint.trained_length import MAX_BYTES, trained_length
from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides
from yarn_edge.inspect.command import inspect_checkpoint
from yarn_edge.positions import rope

from support import tiny

ORIGINAL = "original_max_position_embeddings"
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
QWEN2 = {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28}
QWEN3 = {"model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}
NOUS = {"auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"}}
SMALL = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}


def set_afterwards(**scaling: Any) -> dict[str, Any]:
    """config.json after a trainer has set rope_scaling on a loaded config, as LLaMA-Factory and axolotl do, in transformers 5."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, max_position_embeddings=8192
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.rope_scaling = scaling
    values: dict[str, Any] = json.loads(config.to_json_string())
    assert values["rope_parameters"]["rope_theta"] is None
    return values


def yarn(factor: float, original: int, theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, ORIGINAL: original, "rope_theta": theta, **more}


# trainer -> (its config.json, the same in transformers' plain form, the context that it reaches)
READ: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "LLaMA-Factory, YaRN": (
        QWEN2
        | {
            "max_position_embeddings": 131072.0,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768},
        },
        yarn(4.0, 32768, 1e6),
        131072,
    ),
    "LLaMA-Factory, the factor rounded up": (
        LLAMA
        | {
            "max_position_embeddings": 24576.0,
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "yarn", "factor": 3.0, ORIGINAL: 8192},
        },
        yarn(3.0, 8192, 5e5),
        24576,
    ),
    "LLaMA-Factory, Llama 3": (
        LLAMA
        | {
            "max_position_embeddings": 65536.0,
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                ORIGINAL: 8192.0,
            },
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            ORIGINAL: 8192,
            "rope_theta": 5e5,
        },
        65536,
    ),
    "axolotl, transformers 4": (
        LLAMA
        | {
            "max_position_embeddings": 16384,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 2.0, ORIGINAL: 8192},
        },
        yarn(2.0, 8192, 5e5),
        16384,
    ),
    "axolotl, the context left as it was": (
        LLAMA
        | {
            "max_position_embeddings": 8192,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 2.0, ORIGINAL: 8192},
        },
        yarn(2.0, 8192, 5e5),
        16384,
    ),
    "Unsloth, a longer max_seq_length": (
        LLAMA
        | {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        16384,
    ),
    "Unsloth, YaRN extended once more": (
        QWEN3
        | {
            "max_position_embeddings": 262144,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        },
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        262144,
    ),
    "NeMo RL": (
        QWEN3
        | {
            "max_position_embeddings": 65536,
            "rope_parameters": yarn(
                1.6, 40960, 1e6, truncate=True, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0
            ),
        },
        yarn(1.6, 40960, 1e6),
        65536,
    ),
    "TRL, saved by transformers 5": (
        QWEN2 | {"max_position_embeddings": 131072, "rope_parameters": yarn(4.0, 32768, 1e6, type="yarn")},
        yarn(4.0, 32768, 1e6),
        131072,
    ),
    "a config changed after the model was loaded": (
        LLAMA
        | {
            "max_position_embeddings": 32768,
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 4, ORIGINAL: 8192},
        },
        yarn(4.0, 8192, 5e5),
        32768,
    ),
    "Model-Optimizer, exported with factor 32": (
        LLAMA
        | {
            "max_position_embeddings": 131072,
            "rope_parameters": yarn(32.0, 4096, 1.5e5, beta_fast=32.0, beta_slow=1.0),
        },
        yarn(32.0, 4096, 1.5e5),
        131072,
    ),
    "Yarn-Llama-2-7b-64k": (
        LLAMA
        | NOUS
        | {
            "max_position_embeddings": 65536,
            "rope_theta": 1e4,
            "rope_scaling": {"type": "yarn", "factor": 16.0, ORIGINAL: 4096, "finetuned": True},
        },
        yarn(16.0, 4096, 1e4),
        65536,
    ),
    "LongLoRA, by flags": (
        LLAMA | {"max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        32768,
    ),
    "DeepSeek-R1-0528-Qwen3-8B": (
        QWEN3
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1000000,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768, "attn_factor": 0.8782488562869419},
        },
        yarn(4.0, 32768, 1e6),
        131072,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_read_as_it_ran(case: str) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    written, plain, reaches = READ[case]
    ours = read_scaling(ConfigFile("config.json", copy.deepcopy(written)))
    assert ours.extended_context == reaches
    heads = {key: value for key, value in written.items() if key in ("hidden_size", "num_attention_heads", "head_dim")}
    config = CONFIG_MAPPING[written["model_type"]].from_dict(
        {**heads, "max_position_embeddings": reaches, "rope_parameters": copy.deepcopy(plain)}
    )
    inv_freq, a = ROPE_INIT_FUNCTIONS[plain["rope_type"]](config, "cpu")
    np.testing.assert_allclose(rope.inv_freq(ours), inv_freq.double().numpy(), rtol=2.0**-24 * (8 + 2 * ours.factor))
    assert ours.attention_factor == pytest.approx(a, rel=1e-6)


# trainer -> (its config.json, what the refusal says, the flags that it names, the factor that is then read)
REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any], float]] = {
    "LLaMA-Factory, transformers 5": (
        set_afterwards(rope_type="yarn", factor=4.0, **{ORIGINAL: 8192}),
        r"rope_theta is null, which transformers fails on; without the key it is 10000 .* or pass --rope-theta",
        {"rope_theta": 5e5},
        4.0,
    ),
    "axolotl, transformers 5": (
        set_afterwards(type="yarn", factor=2.0, **{ORIGINAL: 8192}),
        r"rope_theta is null, .* or pass --rope-theta",
        {"rope_theta": 5e5},
        2.0,
    ),
    "a multiplier meant by its makers": (
        QWEN3
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768, "extrapolation_factor": 0.5},
        },
        r"--yarn-ext-factor",
        {"ext_factor": 1.0},
        4.0,
    ),
    "LLaMA-Factory, the context beyond the factor": (
        QWEN2
        | {
            "max_position_embeddings": 65536.0,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 1.5, ORIGINAL: 32768},
        },
        r"max_position_embeddings is 65536, .* pass --yarn-factor and --yarn-orig-ctx",
        {"factor": 2.0, "original_context": 32768},
        2.0,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_remedy_which_works(case: str) -> None:
    written, message, flags, factor = REFUSED[case]
    config = ConfigFile("config.json", written)
    with pytest.raises(YarnEdgeError, match=message):
        read_positions(config)
    got = read_scaling(config, ScalingOverrides(**flags))
    assert {name: getattr(got, name) for name in flags} | {"factor": got.factor} == flags | {"factor": factor}


def test_dynamic_scaling_of_llama_factory_needs_a_length() -> None:
    values = QWEN2 | {"max_position_embeddings": 32768.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    config = ConfigFile("config.json", values)
    assert not read_scaling(config).is_static
    frozen = read_scaling(config, ScalingOverrides(freeze_at=65536))
    assert frozen.factor == pytest.approx(4.0 * 65536 / 32768 - 3.0)


CARD = "# model\n\n<details>\n\n```yaml\nbase_model: org/base\nsequence_len: 8192\n```\n\nmax_seq_length: 99\n"
# file -> (its text, what it says)
SAYS: dict[str, tuple[str, str, int | None]] = {
    "axolotl's card": ("README.md", CARD, 8192),
    "LLaMA-Factory": ("training_args.yaml", "stage: sft\ncutoff_len: 4096  # tokens\r\n", 4096),
    "its board": ("llamaboard_config.yaml", "top.rope_scaling: none\ntrain.cutoff_len: 2048\n", 2048),
    "NeMo RL": ("config.yml", "policy:\n  max_total_sequence_length: 65536\n", 65536),
    "prose in a card": ("README.md", "cutoff_len: 4096\n", None),
    "two lengths": ("a.yaml", "cutoff_len: 4096\nsequence_len: 8192\n", None),
    "an expression": ("a.yaml", "cutoff_len: ${len}\n", None),
    "a comment": ("a.yaml", "# cutoff_len: 4096\n", None),
    "zero": ("a.yaml", "cutoff_len: 0\n", None),
    "beyond any context": ("a.yaml", "cutoff_len: 9999999999\n", None),
    "another file": ("training_args.bin", "cutoff_len: 4096\n", None),
    "not a text": ("a.yaml", "cutoff_len: 4096\n\udcff", None),
    "too large": ("a.yaml", "cutoff_len: 4096\n" + "#" * MAX_BYTES, None),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_the_files_beside_the_config_say_of_the_length(case: str, tmp_path: Path) -> None:
    name, text, tokens = SAYS[case]
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    found = trained_length(tmp_path)
    assert (None if found is None else found.tokens) == tokens


def test_a_pipe_beside_the_config_is_left_alone(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.yaml")
    assert trained_length(tmp_path) is None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was never extended."""
    folder = tmp_path_factory.mktemp("trainers") / "base"
    return tiny.write_checkpoint(folder, rope_scaling=None, max_position_embeddings=256, rope_theta=5e5)


def trained_from(base: Path, folder: Path, *, change: bool, **config: Any) -> Path:
    """A checkpoint with the base's weights, one of k_proj's changed if `change`, and another config."""
    from safetensors.torch import load_file

    folder.mkdir()
    values = {**json.loads((base / "config.json").read_text()), **tiny.YARN, **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    state = load_file(base / "model.safetensors")
    if change:
        state["model.layers.1.self_attn.k_proj.weight"][0, 0] += 1.0
    tiny.write_weights(folder, state)
    return folder


def found(folder: Path, base: Path | None = None) -> dict[str, str]:
    return {finding.name: finding.evidence for finding in inspect_checkpoint(folder, base=base).findings}


def test_yarn_that_nothing_was_trained_with(base: Path, tmp_path: Path) -> None:
    same = trained_from(base, tmp_path / "same", change=False)
    assert found(same) == {}
    assert found(same, base) == {
        "claimed, never trained": "4 of 4 weights of queries and keys are those of base, bit by bit"
    }
    assert found(trained_from(base, tmp_path / "trained", change=True), base) == {}
    assert found(base, base) == {}


def test_weights_of_another_type_are_not_compared_and_that_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    folder = trained_from(base, tmp_path / "half", change=False)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    tiny.write_weights(folder, state)
    assert found(folder, base) == {}
    assert "whether training changed queries and keys is not known" in capsys.readouterr().err


def test_sequences_that_never_reached_beyond_the_original_context(base: Path, tmp_path: Path) -> None:
    folder = trained_from(base, tmp_path / "short", change=True)
    (folder / "training_args.yaml").write_text("cutoff_len: 256\n")
    assert found(folder) == {"reach never trained": "training_args.yaml: cutoff_len 256 (LLaMA-Factory)"}
    (folder / "training_args.yaml").write_text("cutoff_len: 1024\n")
    assert found(folder) == {}


def test_a_lost_base_of_the_rotation(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = trained_from(base, tmp_path / "lost", change=True, rope_theta=...)
    assert found(lost) == {}
    assert "transformers' default for llama" in found(lost, base)["another base of the rotation"]
    null = trained_from(base, tmp_path / "null", change=True, rope_theta=None)
    assert main(["inspect", str(null), "--against-base", str(base)]) == 2
    assert capsys.readouterr().err.rstrip().endswith("has 500000 (config.json: rope_theta): --rope-theta 500000")
    assert main(["inspect", str(null), "--against-base", str(base), "--rope-theta", "500000"]) == 0


DAMAGED = {
    "cut": b"\x08\x00\x00",
    "a header beyond the file": (1 << 40).to_bytes(8, "little"),
    "not JSON": (4).to_bytes(8, "little") + b"nope",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "offsets beyond the file": (87).to_bytes(8, "little")
    + b'{"model.layers.0.self_attn.q_proj.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'[:87],
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_of_the_base_are_one_line(
    case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained_from(base, tmp_path / "ours", change=False)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(DAMAGED[case])
    assert main(["inspect", str(folder), "--against-base", str(broken)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: " in line


def test_a_base_for_a_gguf_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert main(["inspect", str(tmp_path / "a.gguf"), "--against-base", str(base)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_two_codes_of_the_same_attention_factor() -> None:
    """The value that DeepSeek-R1-0528-Qwen3-8B has is what makes A 1 where it multiplies."""
    written, _plain, _reaches = READ["DeepSeek-R1-0528-Qwen3-8B"]
    got = read_scaling(ConfigFile("config.json", written), ScalingOverrides(attention_factor_reading="multiply"))
    assert got.attention_factor == pytest.approx(1.0, rel=1e-12)
    assert 1 / (0.1 * math.log(4) + 1) == pytest.approx(0.8782488562869419, rel=1e-15)
