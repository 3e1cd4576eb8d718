"""What no family takes: a tensor too few or too many, a wrong shape, a value that llama.cpp would run otherwise in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from yarn_edge.cli import main

from support import tiny_families
from support.made_once import Shelf
from support.tiny_families import FAMILIES

State = dict[str, torch.Tensor]
Config = dict[str, Any]
NAMES = [name for name in FAMILIES if "-" not in name and name != "devstral2"]


def folder_of(name: str, shelf: Shelf) -> Path:
    return shelf.made_once(f"family-{name}", lambda folder: tiny_families.write(folder / "ck", name)) / "ck"


def refusal(
    name: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[State, Config], None]
) -> str:
    """What convert says about the family's checkpoint after `change`; one line, and no file."""
    folder = folder_of(name, shelf)
    state, values = tiny_families.saved(folder), json.loads((folder / "config.json").read_text())
    change(state, values)
    tiny_families.rewrite(tmp_path / "ck", state, values)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "ck"), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("yarn-edge: error: ")
    assert not (tmp_path / "x.gguf").exists()
    return lines[0]


def some_tensor(state: State) -> str:
    """A tensor of the last layer: of the last expert, if there are experts in tensors of their own."""
    layer = sorted(name for name in state if "layers.3." in name)
    return next((n for n in reversed(layer) if "experts.3." in n), next(n for n in layer if "mlp" in n or "moe" in n))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing(name: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone: list[str] = []

    def change(state: State, _values: Config) -> None:
        gone.append(some_tensor(state))
        del state[gone[0]]

    assert f"tensor {gone[0] if gone else ''}" in (said := refusal(name, shelf, tmp_path, capsys, change))
    assert said.endswith(f"tensor {gone[0]} is missing")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_too_many(name: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(state: State, _values: Config) -> None:
        state["model.layers.3.self_attn.q_proj.lost"] = torch.zeros(3)

    said = refusal(name, shelf, tmp_path, capsys, change)
    assert "tensor model.layers.3.self_attn.q_proj.lost has no place in the GGUF" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape(name: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes: list[list[int]] = []

    def change(state: State, _values: Config) -> None:
        wrong = some_tensor(state)
        shapes.extend((list(state[wrong].shape), list(state[wrong][:-1].shape)))
        state[wrong] = state[wrong][:-1]

    said = refusal(name, shelf, tmp_path, capsys, change)
    assert said.endswith(f"has the shape {shapes[1]}, but config.json implies {shapes[0]}")


def test_one_expert_of_another_type(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(state: State, _values: Config) -> None:
        state[some_tensor(state)] = state[some_tensor(state)].half()

    said = refusal("qwen3_moe", shelf, tmp_path, capsys, change)
    assert "experts.3.up_proj.weight is F16, but model.layers.3.mlp.experts.0.up_proj.weight is F32" in said


NO_ROPE = "llama.cpp leaves out RoPE in every fourth layer"
EVERY = "llama.cpp wants experts in every layer"
NO_PLACE = "llama.cpp has no place for the bias of o_proj"
# name -> (family, changed config values, the end or middle of the message). ...: the key is taken out.
WRONG: dict[str, tuple[str, Config, str]] = {
    "llama, activation": ("llama", {"hidden_act": "gelu"}, "only 'silu' can be converted"),
    "llama, layers": ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than"),
    "smollm3, layers": (
        "smollm3",
        {"num_hidden_layers": 10**9, "layer_types": ..., "no_rope_layers": ...},
        "num_hidden_layers is 1000000000, more than",
    ),
    "qwen3_moe, experts": (
        "qwen3_moe",
        {"num_experts": 10**9, "num_local_experts": ...},
        "num_experts is 1000000000, more than",
    ),
    "mellum, experts": ("mellum", {"num_local_experts": 10**9}, "num_local_experts is 1000000000, more than"),
    "granitemoe, experts": ("granitemoe", {"num_local_experts": 10**9}, "(no dimension of a tensor is above "),
    "mistral, window": ("mistral", {"sliding_window": 100}, "shorter than the context of 256"),
    "qwen2, window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True: only False"),
    "qwen3, bias": ("qwen3", {"attention_bias": True}, "attention_bias is True: only False can be converted"),
    "cohere, own head": (
        "cohere",
        {"tie_word_embeddings": False},
        "tie_word_embeddings is False: only True can be converted: llama.cpp takes the embeddings for the output matrix",
    ),
    "cohere, norms": ("cohere", {"use_qk_norm": True}, "in models of 64 layers and more, and only there"),
    "cohere, epsilon": ("cohere", {"layer_norm_eps": 0}, "layer_norm_eps is 0, not a number between 0 and 1"),
    "cohere, scale": ("cohere", {"logit_scale": 0.0}, "logit_scale is 0.0, expected a number above 0"),
    "cohere2, no windows": (
        "cohere2",
        {"layer_types": ["full_attention"] * 4},
        "gives no layer a sliding window: llama.cpp runs cohere2 only if some have one",
    ),
    "qwen3_moe, sums": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        "norm_topk_prob is False: only True can be converted: llama.cpp lets the weights of a token's experts always add up to 1",
    ),
    "qwen3_moe, sums by default": ("qwen3_moe", {"norm_topk_prob": ...}, "norm_topk_prob is False: only True"),
    "qwen3_moe, dense layers": (
        "qwen3_moe",
        {"mlp_only_layers": [0]},
        f"mlp_only_layers is [0]: only [] can be converted: {EVERY}",
    ),
    "qwen3_moe, step": (
        "qwen3_moe",
        {"decoder_sparse_step": 2},
        f"decoder_sparse_step is 2: only 1 can be converted: {EVERY}",
    ),
    "qwen3_moe, bias": ("qwen3_moe", {"attention_bias": True}, NO_PLACE),
    "qwen3_moe, activation": (
        "qwen3_moe",
        {"hidden_act": "gelu"},
        "hidden_act is 'gelu': only 'silu' can be converted",
    ),
    "qwen3_moe, experts twice": (
        "qwen3_moe",
        {"num_experts": 5},
        "num_experts is 5, but num_local_experts is 4: correct one of them",
    ),
    "qwen3_moe, too many used": (
        "qwen3_moe",
        {"num_experts_per_tok": 9},
        "num_experts_per_tok is 9, more than the 4 experts",
    ),
    "qwen3_moe, no number": ("qwen3_moe", {"num_local_experts": ...}, "num_experts is missing: add it"),
    "qwen2_moe, sums": ("qwen2_moe", {"norm_topk_prob": True}, "llama.cpp never lets the weights"),
    "mixtral, window": (
        "mixtral",
        {"sliding_window": 100},
        "shorter than the context of 256: llama.cpp would attend to all of it",
    ),
    "granite, zero": (
        "granite",
        {"attention_multiplier": 0.0},
        "attention_multiplier is 0.0, expected a number above 0",
    ),
    "granite, text": ("granite", {"logits_scaling": "8"}, "logits_scaling is '8', expected a number above 0"),
    "granitemoe, activation": ("granitemoe", {"hidden_act": "gelu"}, "only 'silu'"),
    "phi3, window": ("phi3", {"sliding_window": 100}, "shorter than the context of 256"),
    "granite, LongRoPE": (
        "granite",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
            "original_max_position_embeddings": 64,
        },
        "positions differ by allocated context (up to 64 tokens, beyond 64 tokens): that cannot be represented as one scaling: "
        "pass --freeze-at N to use the table for N tokens",
    ),
    "olmo2, width": ("olmo2", {"head_dim": 32}, "llama.cpp runs olmo2 only if heads * head_dim is the hidden size"),
    "olmo3, types": (
        "olmo3",
        {"layer_types": ["sliding_attention"] * 3},
        "layer_types names 3 layers, but num_hidden_layers is 4",
    ),
    "mellum, sums": ("mellum", {"norm_topk_prob": False}, "always add up to 1"),
    "mellum, dense layers": ("mellum", {"mlp_layer_types": ["dense"] + ["sparse"] * 3}, EVERY),
    "mellum, prediction": (
        "mellum",
        {"num_nextn_predict_layers": 1},
        "num_nextn_predict_layers is 1: only 0 can be converted",
    ),
    "smollm3, other layers": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0]},
        f"no_rope_layers is [1, 0, 1, 0]: only [1, 1, 1, 0] can be converted: {NO_ROPE}",
    ),
    "smollm3, interval": (
        "smollm3",
        {"no_rope_layers": ..., "no_rope_layer_interval": 2},
        f"no_rope_layer_interval is 2: only 4 can be converted: {NO_ROPE}",
    ),
    "smollm3, bias": ("smollm3", {"attention_bias": True}, NO_PLACE),
    "arcee, activation": ("arcee", {"hidden_act": "silu"}, "hidden_act is 'silu': only 'relu2' can be converted"),
    "arcee, mlp": ("arcee", {"mlp_bias": True}, "llama.cpp has no place for the biases of the MLP"),
    "glm4, activation": ("glm4", {"hidden_act": "gelu"}, "only 'silu'"),
    "ministral3, beta": (
        "ministral3",
        {"rope_parameters": {**tiny_families.MINISTRAL}},
        "llama_4_scaling_beta is missing, expected a number from 0",
    ),
    "gpt_oss, limit": ("gpt_oss", {"swiglu_limit": 10.0}, "swiglu_limit is 10.0: only 7.0 can be converted"),
    "gpt_oss, no biases": (
        "gpt_oss",
        {"attention_bias": False},
        "only True can be converted: llama.cpp wants the biases of all four projections",
    ),
    "gpt_oss, no windows": (
        "gpt_oss",
        {"layer_types": ["full_attention"] * 4},
        "gives no layer a sliding window: llama.cpp runs gpt-oss only if some have one",
    ),
    "gpt_oss, window of null": ("gpt_oss", {"sliding_window": None}, "sliding_window is null"),
    "deepseek_v2, groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        "topk_method is 'group_limited_greedy': only 'greedy' can be converted: llama.cpp ranks groups of experts by the sum",
    ),
    "deepseek_v2, sums": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True: only False"),
    "deepseek_v2, full queries": (
        "deepseek_v2",
        {"q_lora_rank": None},
        "q_lora_rank is None: llama.cpp runs such a model only with 26 or 27 layers, or with 48 and 128256 tokens",
    ),
    "deepseek_v2, dense layers": (
        "deepseek_v2",
        {"first_k_dense_replace": 5},
        "first_k_dense_replace is 5, expected a whole number from 0 to num_hidden_layers, 4",
    ),
    "deepseek_v3, bias": ("deepseek_v3", {"attention_bias": True}, "no place for the biases of latent attention"),
    "deepseek_v3, pairs": (
        "deepseek_v3",
        {"rope_interleave": False},
        "rope_interleave is False: only True can be converted: the rotated pairs must be neighbours",
    ),
    "deepseek_v3, heads": ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2: only 4 can"),
    "deepseek_v3, router": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax': only 'sigmoid'"),
    "deepseek_v3, groups": ("deepseek_v3", {"n_group": 3}, "n_group is 3: the experts must be in groups of one size"),
    "deepseek_v3, groups used": ("deepseek_v3", {"topk_group": 5}, "topk_group is 5: there are only n_group groups"),
    "deepseek_v3, frequency": ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2: only 1 can be converted"),
    "glm4_moe_lite, last dense": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]},
        "llama.cpp wants the dense layers first, and all others sparse",
    ),
    "glm4_moe_lite, dense layers": (
        "glm4_moe_lite",
        {"mlp_layer_types": ..., "first_k_dense_replace": 2},
        "first_k_dense_replace is 2, but transformers has experts from the second layer on",
    ),
    "youtu, activation": ("youtu", {"hidden_act": "gelu"}, "only 'silu'"),
    "laguna, capped router": (
        "laguna",
        {"moe_router_logit_softcapping": 5.0},
        "moe_router_logit_softcapping is 5.0: only 0.0 can be converted: llama.cpp does not cap the router",
    ),
    "laguna, other layers": (
        "laguna",
        {"layer_types": ["chunked_attention"] + ["sliding_attention"] * 3},
        "layer_types",
    ),
    "laguna, first layer": (
        "laguna",
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        "gives the first layer a sliding window: llama.cpp would turn as much of a head in every layer of laguna as there",
    ),
    "laguna, dense in between": (
        "laguna",
        {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
        "llama.cpp wants the dense layers first, and all others sparse",
    ),
    "laguna, dense twice": ("laguna", {"mlp_only_layers": [0, 1]}, "but the first 1 layers are dense: which is right?"),
    "laguna, gate": ("laguna", {"gating": "none"}, "gating is 'none', expected true, per-head or per-element"),
    "laguna, gates": (
        "laguna",
        {"gating_types": ["per_element"] * 4},
        "but gating makes every layer per_head: which is right?",
    ),
    "laguna, heads": (
        "laguna",
        {"num_attention_heads_per_layer": [4, 6, 6]},
        "num_attention_heads_per_layer is [4, 6, 6], expected 4 whole numbers, one for each layer",
    ),
    "laguna, weights": ("laguna", {"moe_apply_router_weight_on_input": True}, "only False can be converted"),
    "laguna, bias": ("laguna", {"attention_bias": True}, NO_PLACE),
    "laguna, bare origin": (
        "laguna",
        {
            "rope_parameters": {
                "full_attention": tiny_families.LAGUNA_YARN,
                "sliding_attention": tiny_families.LAGUNA_PLAIN,
                "original_max_position_embeddings": 32,
            }
        },
        "original_max_position_embeddings is unknown here (value 32) beside layer types",
    ),
    "glm4_moe, groups": ("glm4_moe", {"n_group": 3}, "n_group is 3: the experts must be in groups of one size, of two"),
    "glm4_moe, more groups": ("glm4_moe", {"topk_group": 2}, "topk_group is 2: there are only n_group groups"),
    "glm4_moe, dense layers": (
        "glm4_moe",
        {"first_k_dense_replace": 9},
        "first_k_dense_replace is 9, expected a whole number from 0 to num_hidden_layers, 4",
    ),
    "glm4_moe, router": ("glm4_moe", {"scoring_func": "softmax"}, "only 'sigmoid' can be converted"),
    "solar_open, dense layers": (
        "solar_open",
        {"first_k_dense_replace": 1},
        "first_k_dense_replace is 1: only 0 can be converted: transformers has experts in every layer",
    ),
    "qwen3_next, sums": ("qwen3_next", {"norm_topk_prob": False}, "always add up to 1"),
    "qwen3_next, dense layers": ("qwen3_next", {"mlp_only_layers": [0]}, EVERY),
    "qwen3_5, epsilon": (
        "qwen3_5",
        {"rms_norm_eps": 1e-5},
        "rms_norm_eps is 1e-05: only 1e-06 can be converted: llama.cpp takes it for the lengths of",
    ),
    "qwen3_5, values": (
        "qwen3_5",
        {"linear_value_head_dim": 32},
        "linear_value_head_dim is 32: only 16 can be converted: llama.cpp wants keys and values",
    ),
    "qwen3_5, heads": (
        "qwen3_5",
        {"linear_num_value_heads": 5},
        "linear_num_value_heads is 5: linear_num_key_heads does not divide it",
    ),
    "qwen3_5, only linear": (
        "qwen3_5",
        {"layer_types": ["linear_attention"] * 4},
        "makes every layer linear_attention: llama.cpp runs these models only with both kinds",
    ),
    "qwen3_5, only full": ("qwen3_5", {"layer_types": ["full_attention"] * 4}, "makes every layer full_attention"),
    "qwen3_5, windows": (
        "qwen3_5",
        {"layer_types": ["sliding_attention"] * 4},
        "only linear_attention or full_attention can be converted",
    ),
    "qwen3_5_moe, bias": ("qwen3_5_moe", {"attention_bias": True}, "no place for the biases of attention"),
    "gemma3, capped": (
        "gemma3",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0: only None can be converted",
    ),
    "gemma3, scalar": (
        "gemma3",
        {"query_pre_attn_scalar": 24},
        "query_pre_attn_scalar is 24: only 32 can be converted: llama.cpp takes this from the sizes",
    ),
    "gemma3, both ways": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True: only False",
    ),
    "gemma3, only windows": (
        "gemma3",
        {"layer_types": ["sliding_attention"] * 4},
        "gives every layer a sliding window",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value(case: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, changes, message = WRONG[case]

    def change(_state: State, values: Config) -> None:
        values |= changes
        for key in [key for key, value in values.items() if value is ...]:
            del values[key]

    assert message in refusal(name, shelf, tmp_path, capsys, change)


def test_every_family_has_a_wrong_value() -> None:
    assert {name for name, _changes, _message in WRONG.values()} == set(NAMES)
