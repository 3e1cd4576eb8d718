"""Configs as trainers leave them: taken where every reading agrees, refused with both readings where they differ.

transformers, given the same values plainly written, is the truth for what is taken.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import Reading, ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.scaling import model_scaling
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions import rope
from yarn_edge.verify.command import verify

from support import tiny

LLAMA = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 16384}
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 4096}
V5 = YARN | {"rope_theta": 50000.0}
LINEAR = {"type": "linear", "factor": 2.0}
S4, S4_MISTRAL = 0.1 * math.log(4) + 1, 0.07 * math.log(4) + 1
FINETUNED = {"type": "yarn", "factor": 4.0, ORIGINAL: 4096, "finetuned": True}
NOUS = LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"}}
NOUS_MISTRAL = LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM"}}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "qk_rope_head_dim": 64,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
}
HEADS = {"hidden_size": 512, "num_attention_heads": 8}


def v4(**block: Any) -> dict[str, Any]:
    return {"rope_scaling": block}


def v5(**block: Any) -> dict[str, Any]:
    return {"rope_parameters": block}


def config_file(values: dict[str, Any]) -> ConfigFile:
    return ConfigFile("config.json", copy.deepcopy(values))


# what the trainer wrote, the same config plainly written
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "context a float": (LLAMA | v5(**V5) | {"max_position_embeddings": 16384.0}, LLAMA | v5(**V5)),
    "sizes floats": (LLAMA | v5(**V5) | {"hidden_size": 512.0, "num_attention_heads": 8.0}, LLAMA | v5(**V5)),
    "head_dim a float": (LLAMA | v5(**V5) | {"head_dim": 32.0}, LLAMA | v5(**V5) | {"head_dim": 32}),
    "original a float": (LLAMA | v5(**V5 | {ORIGINAL: 4096.0}), LLAMA | v5(**V5)),
    "original null, at the top": (LLAMA | v4(**YARN | {ORIGINAL: None}) | {ORIGINAL: 4096}, LLAMA | v4(**YARN)),
    "original null at the top": (LLAMA | v4(**YARN) | {ORIGINAL: None}, LLAMA | v4(**YARN)),
    "original null, plain": (
        LLAMA | v5(rope_type="default", rope_theta=5e4, original_max_position_embeddings=None),
        LLAMA | v5(rope_type="default", rope_theta=5e4),
    ),
    "theta null at the top": (LLAMA | v5(**V5) | {"rope_theta": None}, LLAMA | v5(**V5)),
    "theta null in the block": (LLAMA | v5(**V5 | {"rope_theta": None}) | {"rope_theta": 5e4}, LLAMA | v5(**V5)),
    "betas whole": (LLAMA | v5(**V5, beta_fast=32, beta_slow=1), LLAMA | v5(**V5)),
    "A whole": (LLAMA | v5(**V5, attention_factor=1), LLAMA | v5(**V5, attention_factor=1.0)),
    "A as the default, rounded": (LLAMA | v5(**V5, attention_factor=float(np.float32(S4))), LLAMA | v5(**V5)),
    "attn_factor 1": (LLAMA | v5(**V5, attn_factor=1), LLAMA | v5(**V5)),
    "attn_factor 1.0, v4": (LLAMA | v4(**YARN, attn_factor=1.0), LLAMA | v4(**YARN)),
    "attn_factor 1 beside A": (LLAMA | v4(**YARN, attn_factor=1.0, attention_factor=S4), LLAMA | v4(**YARN)),
    "extrapolation_factor 1": (LLAMA | v4(**YARN, extrapolation_factor=1), LLAMA | v4(**YARN)),
    "truncate true, a word": (LLAMA | v4(**YARN, truncate="True"), LLAMA | v4(**YARN)),
    "truncate 0": (LLAMA | v4(**YARN, truncate=0), LLAMA | v4(**YARN, truncate=False)),
    "truncate 1": (LLAMA | v4(**YARN, truncate=1), LLAMA | v4(**YARN)),
    "default with factor 1": (LLAMA | v4(rope_type="default", factor=1.0), LLAMA),
    "factor 1 without a type": (LLAMA | v4(factor=1), LLAMA),
    "default with its own context": (LLAMA | v4(rope_type="default", original_max_position_embeddings=16384), LLAMA),
    "linear with A 1": (LLAMA | v4(**LINEAR, attention_factor=1.0), LLAMA | v4(**LINEAR)),
    "linear, original null": (LLAMA | v4(**LINEAR, original_max_position_embeddings=None), LLAMA | v4(**LINEAR)),
    "linear, v5": (LLAMA | v5(rope_type="linear", factor=2.0, rope_theta=1e4), LLAMA | v4(**LINEAR)),
    "an empty block beside it": (LLAMA | v5(**V5) | {"rope_scaling": {}}, LLAMA | v5(**V5)),
    "an empty v5 block beside it": (LLAMA | v4(**YARN) | {"rope_parameters": {}}, LLAMA | v4(**YARN)),
    "null beside it": (LLAMA | v5(**V5) | {"rope_scaling": None}, LLAMA | v5(**V5)),
    "both blocks, spelled differently": (
        LLAMA
        | v5(**V5, beta_fast=32)
        | v4(type="yarn", factor=4, original_max_position_embeddings=4096, rope_theta=5e4),
        LLAMA | v5(**V5),
    ),
    "both types": (LLAMA | v4(**YARN, type="yarn"), LLAMA | v4(**YARN)),
    "type null beside rope_type": (LLAMA | v4(**YARN, type=None), LLAMA | v4(**YARN)),
    "nulls for what is derived": (LLAMA | v5(**V5) | {"head_dim": None, "num_key_value_heads": None}, LLAMA | v5(**V5)),
}


@pytest.mark.parametrize("case", SAME)
def test_taken_as_transformers_runs_it(case: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    written, plain = SAME[case]
    ours, same = read_scaling(config_file(written)), read_scaling(config_file(plain))
    assert ours.differences(same) == {}
    assert ours.extended_context == same.extended_context
    theirs = LlamaConfig.from_dict(copy.deepcopy(plain))
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        assert ours.method == "none"
        return
    inv_freq, a = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    np.testing.assert_allclose(rope.inv_freq(ours), inv_freq.double().numpy(), rtol=2.0**-24 * (5 + 2 * ours.factor))
    assert ours.attention_factor == pytest.approx(a, rel=1e-6)


# Codes other than transformers' that make the same of a key that only transformers reads, or the other way round
OTHER_CODES: dict[str, tuple[dict[str, Any], float]] = {
    "Nous with A as its default": (NOUS | v4(**FINETUNED, attention_factor=S4), S4),
    "Nous with a true truncate": (NOUS | v4(**FINETUNED, truncate=True), S4),
    "Nous with one mscale, which transformers ignores": (NOUS | v4(**FINETUNED, mscale=0.707), S4),
    "Nous, attn_factor and the A that it makes": (
        NOUS | v4(**FINETUNED, attn_factor=1.2, attention_factor=1.2 * S4),
        1.2 * S4,
    ),
    "Nous Mistral with A as its default": (NOUS_MISTRAL | v4(**FINETUNED, attention_factor=S4_MISTRAL), S4_MISTRAL),
    "DeepSeek, mscale 1 alone": (DEEPSEEK | v4(**YARN, mscale=1.0), S4),
    "DeepSeek, mscale 1 and nothing": (DEEPSEEK | v4(**YARN, mscale=1, mscale_all_dim=0), S4),
    "mscales alike": (LLAMA | v4(**YARN, mscale=0.7, mscale_all_dim=0.7), 1.0),
}


@pytest.mark.parametrize("case", OTHER_CODES)
def test_taken_where_two_codes_agree(case: str) -> None:
    config, attention = OTHER_CODES[case]
    got = read_scaling(config_file(config))
    assert (got.attention_factor, got.truncate) == (pytest.approx(attention, rel=1e-12), True)


# config, what the message must have: the fact, both readings, and what settles it
DIFFER: dict[str, tuple[dict[str, Any], list[str]]] = {
    "theta null": (
        LLAMA | v5(**V5 | {"rope_theta": None}),
        [
            "rope_parameters.rope_theta is null, which transformers fails on",
            "without the key it is 10000 (transformers' default for llama)",
            "--rope-theta",
        ],
    ),
    "theta null at the top": (
        LLAMA | v4(**YARN) | {"rope_theta": None},
        ["config.json: rope_theta is null", "--rope-theta"],
    ),
    "theta null, plain": (LLAMA | {"rope_theta": None}, ["config.json: rope_theta is null", "is 10000"]),
    "theta null, another family": (
        LLAMA | {"model_type": "mixtral", "rope_theta": None},
        ["is 1e+06 (transformers' default for mixtral)"],
    ),
    "gpt_neox's base null": (LLAMA | {"model_type": "gpt_neox", "rotary_emb_base": None}, ["rotary_emb_base is null"]),
    "Gemma's local base null": (
        LLAMA | {"model_type": "gemma3_text", "head_dim": 64, "rope_local_base_freq": None},
        ["rope_local_base_freq is null", "10000", "sliding layers"],
    ),
    "theta null in one layer type": (
        LLAMA
        | {"layer_types": ["full_attention", "sliding_attention"]}
        | v5(full_attention=V5, sliding_attention={"rope_type": "default", "rope_theta": None}),
        ["rope_parameters.sliding_attention.rope_theta is null"],
    ),
    "original null": (
        LLAMA | v5(**V5 | {ORIGINAL: None}),
        [
            f"rope_parameters.{ORIGINAL} is null, which transformers 5 fails on",
            "without the key it is max_position_embeddings 16384",
            "--yarn-orig-ctx",
        ],
    ),
    "original null at the top": (
        LLAMA | v4(rope_type="yarn", factor=4.0) | {ORIGINAL: None},
        [f"config.json: {ORIGINAL} is null"],
    ),
    "original null, llama3": (
        LLAMA
        | v4(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=None,
        ),
        [f"{ORIGINAL} is null", "write the context before the extension"],
    ),
    "original and factor null": (LLAMA | v4(**YARN | {ORIGINAL: None, "factor": None}), [f"{ORIGINAL} is null"]),
    "context half a token": (
        LLAMA | {"max_position_embeddings": 16384.5},
        ["max_position_embeddings is 16384.5, expected a whole number"],
    ),
    "context nan": (LLAMA | {"max_position_embeddings": math.nan}, ["max_position_embeddings is nan"]),
    "context infinite": (LLAMA | {"max_position_embeddings": math.inf}, ["max_position_embeddings is inf"]),
    "context huge": (LLAMA | {"max_position_embeddings": 1e300}, ["max_position_embeddings is 1e+300, must be from 1"]),
    "context negative": (LLAMA | {"max_position_embeddings": -4096.0}, ["max_position_embeddings is -4096.0"]),
    "context in words": (LLAMA | {"max_position_embeddings": "32k"}, ["max_position_embeddings is '32k'"]),
    "context null": (LLAMA | {"max_position_embeddings": None}, ["max_position_embeddings is null: add it"]),
    "factor a string": (LLAMA | v4(**YARN | {"factor": "4.0"}), ["factor is '4.0', not a number"]),
    "truncate false, a word": (
        LLAMA | v4(**YARN, truncate="false"),
        ["truncate is 'false', not true or false", "transformers 4 takes any text for true"],
    ),
    "truncate 2": (LLAMA | v4(**YARN, truncate=2), ["truncate is 2, not true or false"]),
    "attn_factor 0": (LLAMA | v4(**YARN, attn_factor=0), ["rope_scaling.attn_factor", "is 0.0, must be above 0"]),
    "attn_factor in words": (LLAMA | v4(**YARN, attn_factor="1.2"), ["attn_factor is '1.2', not a number"]),
    "extrapolation_factor 0.5": (
        LLAMA | v4(**YARN, extrapolation_factor=0.5),
        ["gets ext_factor 0.5", "gets 1:", "--yarn-ext-factor"],
    ),
    "Nous with another A": (
        NOUS | v4(**FINETUNED, attention_factor=1.2),
        ["transformers reads it and gets attention_factor 1.2", "gets 1.13863", "--yarn-attention-factor"],
    ),
    "Nous Mistral with transformers' A": (NOUS_MISTRAL | v4(**FINETUNED, attention_factor=S4), ["1.13863", "1.09704"]),
    "Nous with both mscales": (
        NOUS | v4(**FINETUNED, mscale=1.0, mscale_all_dim=1.0),
        ["mscale is 1.0", "attention_factor 1,", "1.13863"],
    ),
    "Nous with truncate null": (
        NOUS | v4(**FINETUNED, truncate=None),
        ["truncate is None", "gets truncate false", "gets true"],
    ),
    "DeepSeek, mscale 0.5 alone": (
        DEEPSEEK | v4(**YARN, mscale=0.5),
        ["mscale is 0.5", "gets A 1.06931", "transformers 1.13863"],
    ),
    "DeepSeek, mscale 0": (
        DEEPSEEK | v4(**YARN, mscale=0, mscale_all_dim=0),
        ["gets A 1 from that, transformers 1.13863"],
    ),
    "linear with an A": (LLAMA | v4(**LINEAR, attention_factor=1.2), ["attention_factor is 1.2 and has no meaning"]),
    "linear without a factor": (LLAMA | v4(type="linear"), ["factor is missing"]),
    "linear, factor 0": (LLAMA | v4(type="linear", factor=0), ["factor is 0.0, below 1"]),
    "linear, factor nan": (LLAMA | v4(type="linear", factor=math.nan), ["factor is nan"]),
    "default with a factor": (LLAMA | v4(rope_type="default", factor=4.0), ["is 'default', but the block has factor"]),
    "default with another context": (
        LLAMA | v4(rope_type="default", original_max_position_embeddings=4096),
        ["'default'", ORIGINAL],
    ),
    "both blocks, another base": (
        LLAMA | v5(**V5) | v4(**YARN),
        ["rope_parameters and rope_scaling are both present and differ"],
    ),
    "both blocks, another factor": (LLAMA | v5(**YARN) | v4(**YARN | {"factor": 8.0}), ["both present and differ"]),
    "both blocks, another context": (
        LLAMA | v5(rope_type="linear", factor=2.0, original_max_position_embeddings=16384) | v4(**LINEAR),
        ["both present and differ"],
    ),
    "two types": (LLAMA | v4(**YARN, type="linear"), ["rope_type is 'yarn' and type is 'linear'"]),
    "by layer type, without layer types": (
        LLAMA | v5(full_attention=V5, sliding_attention=V5),
        ["layer_types names none"],
    ),
    "head_dim null, another default": (
        LLAMA | {"model_type": "qwen3", "head_dim": None},
        ["head_dim is null", "128", "is 64"],
    ),
}


@pytest.mark.parametrize("case", DIFFER)
def test_refused_with_both_readings(case: str) -> None:
    config, parts = DIFFER[case]
    with pytest.raises(YarnEdgeError) as caught:
        read_scaling(config_file(config))
    assert str(caught.value).isprintable()
    for part in parts:
        assert part in str(caught.value)


# config, the flags that its refusal names, what is then read
SETTLED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "theta null": (
        LLAMA | v5(**V5 | {"rope_theta": None}),
        {"rope_theta": 5e4},
        {"rope_theta": 5e4, "method": "yarn", "attention_factor": S4},
    ),
    "theta null, plain": (
        LLAMA | {"rope_theta": None},
        {"rope_theta": 5e4},
        {"rope_theta": 5e4, "method": "none", "original_context": 16384},
    ),
    "theta null, linear": (
        LLAMA | v4(**LINEAR) | {"rope_theta": None},
        {"rope_theta": 5e4},
        {"rope_theta": 5e4, "method": "linear", "factor": 2.0},
    ),
    "another theta": (LLAMA | v5(**V5), {"rope_theta": 7e4}, {"rope_theta": 7e4, "factor": 4.0}),
    "YaRN by flags on a null theta": (
        LLAMA | {"rope_theta": None},
        {"rope_theta": 5e4, "factor": 2.0, "original_context": 8192},
        {"rope_theta": 5e4, "method": "yarn", "factor": 2.0},
    ),
    "original null": (LLAMA | v5(**V5 | {ORIGINAL: None}), {"original_context": 4096}, {"original_context": 4096}),
    "attn_factor": (LLAMA | v4(**YARN, attn_factor=1.2), {"attention_factor": 1.3}, {"attention_factor": 1.3}),
    "extrapolation_factor": (LLAMA | v4(**YARN, extrapolation_factor=0.5), {"ext_factor": 0.5}, {"ext_factor": 0.5}),
    "Nous with another A": (
        NOUS | v4(**FINETUNED, attention_factor=1.2),
        {"attention_factor": 1.2},
        {"attention_factor": 1.2},
    ),
    "one mscale": (DEEPSEEK | v4(**YARN, mscale=0.5), {"attention_factor": 1.1}, {"attention_factor": 1.1}),
    "linear, the context before": (
        LLAMA | v4(**LINEAR),
        {"original_context": 16384},
        {"original_context": 16384, "extended_context": 32768},
    ),
    "linear": (LLAMA | v4(**LINEAR), {}, {"original_context": 8192, "extended_context": 16384}),
    "linear by thirds": (
        LLAMA | v4(type="linear", factor=3.0),
        {},
        {"original_context": 5461, "extended_context": 16383},
    ),
    "Llama 3's table and another theta": (
        LLAMA
        | v4(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=4096,
        ),
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "method": "llama3"},
    ),
}


@pytest.mark.parametrize("case", SETTLED)
def test_the_flag_settles_it(case: str) -> None:
    config, flags, want = SETTLED[case]
    got = read_scaling(config_file(config), ScalingOverrides(**flags))
    assert {name: getattr(got, name) for name in want} == pytest.approx(want)
    assert all(got.source(name).startswith("--") for name in flags)


@pytest.mark.parametrize("theta", [0.5, math.nan, -1.0])
def test_a_senseless_base_is_refused(theta: float) -> None:
    with pytest.raises(YarnEdgeError, match=r"^--rope-theta: rope_theta is"):
        read_scaling(config_file(LLAMA), ScalingOverrides(rope_theta=theta))


def test_linear_without_an_original_is_told_and_others_are_not() -> None:
    (told,) = read_positions(config_file(LLAMA | v4(**LINEAR))).assumptions
    assert "max_position_embeddings 16384 is taken as the context after scaling" in told
    assert "pass --yarn-orig-ctx 16384" in told
    (told,) = read_positions(config_file(LLAMA | v4(**LINEAR | {"factor": 3.0}))).assumptions
    assert "16384 is taken as the context after scaling (16383: factor 3 * 5461, a whole number of tokens)" in told
    for config in (LLAMA, LLAMA | v4(**YARN), LLAMA | v4(**LINEAR | {ORIGINAL: 8192})):
        assert read_positions(config_file(config)).assumptions == ()


# DeepSeek-R1-0528-Qwen3-8B, whose makers never said which reading they mean; attn_factor is 1 / (0.1 ln 4 + 1).
R1_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
} | v4(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, attn_factor=0.8782488562869419)
# config -> (A that is taken, A if it is multiplied)
OPEN: dict[str, tuple[dict[str, Any], float, float]] = {
    "as published": (R1_QWEN3, S4, 1.0),
    "1.2": (LLAMA | v5(**V5, attn_factor=1.2), S4, 1.2 * S4),
    "beside A": (LLAMA | v4(**YARN, attn_factor=1.2, attention_factor=1.1), 1.1, 1.2 * S4),
    "by layer type": (
        LLAMA | {"layer_types": ["full_attention"]} | v5(full_attention={**V5, "attn_factor": 1.2}),
        S4,
        1.2 * S4,
    ),
    "DeepSeek's code": (DEEPSEEK | v4(**YARN, attn_factor=1.2, mscale=1.0, mscale_all_dim=0.0), S4, 1.2 * S4),
    "in one of both blocks": (LLAMA | {"rope_theta": 5e4} | v5(**V5) | v4(**YARN, attn_factor=1.2), S4, 0.0),
}


def reading(config: dict[str, Any], choice: Reading | None) -> tuple[float, tuple[str, ...]]:
    got = read_positions(config_file(config), ScalingOverrides(attention_factor_reading=choice))
    (scaling,) = got.parts.values()
    return scaling.attention_factor, got.assumptions


@pytest.mark.parametrize("case", OPEN)
def test_both_readings_of_attn_factor_are_told_and_transformers_is_taken(case: str) -> None:
    config, taken, multiplied = OPEN[case]
    got, (told,) = reading(config, None)
    assert got == pytest.approx(taken)
    assert "does not read it and gets attention factor " + f"{taken:.6g}, " in told
    assert told.endswith(f"gets {multiplied or 1.2 * S4:.6g}: --attention-factor-reading multiply")
    assert reading(config, "transformers") == (pytest.approx(taken), ())
    if "beside A" in case:
        with pytest.raises(YarnEdgeError, match=r"attention_factor is 1.1: .*by attn_factor 1.2 does not read it"):
            reading(config, "multiply")
    elif multiplied:
        assert reading(config, "multiply") == (pytest.approx(multiplied), ())
    else:
        with pytest.raises(YarnEdgeError, match="both present and differ"):
            reading(config, "multiply")


# What stands beside an attn_factor of 1.2 -> A if it is multiplied, or what is said
BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any], float | str]] = {
    "the same A": (LLAMA, {"attention_factor": 1.2 * S4}, 1.2 * S4),
    "another A": (LLAMA, {"attention_factor": S4}, "attention_factor is 1.13"),
    "mscales": (
        LLAMA,
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        "mscale is 0.7: transformers reads it and gets attention_factor 0.96",
    ),
    "mscales that cancel": (LLAMA, {"mscale": 1.0, "mscale_all_dim": 1.0}, "mscale is 1.0"),
    "one mscale, ignored": (LLAMA, {"mscale": 0.7}, 1.2 * S4),
    "one mscale, DeepSeek's code": (DEEPSEEK, {"mscale": 0.7}, "mscale is 0.7"),
    "nulls": (LLAMA, {"attention_factor": None, "mscale": None}, 1.2 * S4),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_a_multiplied_attn_factor_is_not_dropped(case: str) -> None:
    base, keys, want = BESIDE[case]
    config = base | v4(**YARN, attn_factor=1.2, **keys)
    if isinstance(want, str):
        with pytest.raises(
            YarnEdgeError, match=f"{want}.*code that multiplies by attn_factor 1.2 does not read it and gets"
        ):
            reading(config, "multiply")
    else:
        assert reading(config, "multiply") == (pytest.approx(want), ())


def test_transformers_own_rotary_class_is_what_is_taken() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = transformers.Qwen3Config.from_dict(copy.deepcopy(R1_QWEN3))
    assert Qwen3RotaryEmbedding(config).attention_scaling == pytest.approx(reading(R1_QWEN3, None)[0], rel=1e-12)


NOTHING_OPEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no key": (LLAMA | v4(**YARN), {}, "is for a config with attn_factor, this one has none: leave it out"),
    "plain": (LLAMA, {}, "this one has none"),
    "the Nous code": (NOUS | v4(**FINETUNED, attn_factor=1.2), {}, "the Nous Llama code, .* multiplies by attn_factor"),
    "A by a flag": (R1_QWEN3, {"attention_factor": 1.1}, "and --yarn-attention-factor both say what A is"),
}


@pytest.mark.parametrize("case", NOTHING_OPEN)
def test_the_flag_has_something_to_decide(case: str) -> None:
    config, flags, message = NOTHING_OPEN[case]
    with pytest.raises(YarnEdgeError, match=f"--attention-factor-reading multiply.*{message}"):
        read_scaling(config_file(config), ScalingOverrides(attention_factor_reading="multiply", **flags))


# ---- through the commands

NULL_THETA = {
    "rope_scaling": ...,
    "rope_theta": ...,
    "rope_parameters": {**tiny.YARN["rope_scaling"], "rope_theta": None},
}


def plain_checkpoint(folder: Path, **written: Any) -> Path:
    """A checkpoint whose weights transformers makes from plain values; then `written` goes into config.json."""
    tiny.write_checkpoint(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | written
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return folder


# what is null, the field and the flag that settle it
NULLS: dict[str, tuple[dict[str, Any], str, str, Any]] = {
    "base": (NULL_THETA, "rope_theta", "--rope-theta", 70000.0),
    "original": (
        {"rope_scaling": {**tiny.YARN["rope_scaling"], ORIGINAL: None}},
        "original_context",
        "--yarn-orig-ctx",
        256,
    ),
}


@pytest.mark.parametrize("case", NULLS)
def test_a_null_needs_the_flag(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, field, flag, value = NULLS[case]
    folder, out = plain_checkpoint(tmp_path / "ck", **written), tmp_path / "out.gguf"
    for command in (["inspect", str(folder)], ["convert", str(folder), "-o", str(out), "--quant", "F32", "--quiet"]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert " is null, which transformers" in line
        assert f"pass {flag}" in line
    assert not out.exists()
    assert main([*command, flag, str(value)]) == 0
    positions = FilePositions(read_gguf(out))
    assert (getattr(positions.wanted, field), getattr(positions.effective(), field)) == (value, value)
    checks = verify(out, folder, overrides=ScalingOverrides(**{field: value}), n_tokens=32)
    assert {c.status for c in checks} == {"pass"}


def test_patch_from_a_checkpoint_and_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = convert(tiny.write_checkpoint(tmp_path / "good"), str(tmp_path / "in.gguf"), "F32")[0]
    folder = plain_checkpoint(tmp_path / "ck", **NULL_THETA)
    words = ["patch", str(source), "-o", str(tmp_path / "out.gguf"), "--from", str(folder)]
    assert main(words) == 2
    assert "pass --rope-theta" in capsys.readouterr().err
    assert main([*words, "--rope-theta", "70000"]) == 0
    assert FilePositions(read_gguf(tmp_path / "out.gguf")).effective().rope_theta == 70000.0


def test_the_reading_of_attn_factor_in_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = {**tiny.YARN["rope_scaling"], "attn_factor": 0.75}
    folder, flag = (
        tiny.write_checkpoint(tmp_path / "ck", rope_scaling=scaling),
        ["--attention-factor-reading", "multiply"],
    )
    told = "attn_factor is 0.75: transformers does not read it and gets attention factor"
    factors = []
    for name, flags in (("taken", []), ("multiplied", flag)):
        out = tmp_path / f"{name}.gguf"
        assert main(["convert", str(folder), "-o", str(out), "--quant", "F32", *flags]) == 0
        assert (told in capsys.readouterr().err) is (not flags)
        factors.append(FilePositions(read_gguf(out)).effective().attention_factor)
        assert main(["verify", str(out), "--against", str(folder), "--tokens", "32", *flags]) == 0
        assert (told in capsys.readouterr().err) is (not flags)
    assert factors[1] == pytest.approx(0.75 * factors[0])
    assert main(["verify", str(out), "--against", str(folder), "--tokens", "32"]) == 1
    assert "the checkpoint says" in capsys.readouterr().out
    patched = [
        "patch",
        str(tmp_path / "taken.gguf"),
        "-o",
        str(tmp_path / "patched.gguf"),
        "--from",
        str(folder),
        *flag,
    ]
    assert main(patched) == 0
    assert FilePositions(read_gguf(tmp_path / "patched.gguf")).effective().attention_factor == factors[1]
    capsys.readouterr()
    assert model_scaling(folder, attention_factor_reading="multiply").attention_factor == pytest.approx(factors[1])
    assert main(["inspect", str(folder), "--json"]) == 0
    assert told in json.dumps(json.loads(capsys.readouterr().out)["notes"])
    assert main(["inspect", str(out), *flag]) == 2
    assert "--attention-factor-reading is for checkpoints" in capsys.readouterr().err


def test_floats_and_words_convert_and_verify(tmp_path: Path) -> None:
    written = {"max_position_embeddings": 1024.0, "num_hidden_layers": 2.0, "tie_word_embeddings": 0, "mlp_bias": None}
    folder = plain_checkpoint(tmp_path / "ck", **written, attention_bias=0.0)
    out = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert read_gguf(out).number("context_length") == 1024
    assert {c.status for c in verify(out, folder, n_tokens=32)} == {"pass"}


@pytest.mark.parametrize("scaling, context", [({"type": "linear", "factor": 2.0}, 1024)])
def test_linear_without_an_original_converts_with_a_note(
    scaling: dict[str, Any], context: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", rope_scaling=scaling)
    out = tmp_path / "out.gguf"
    assert main(["convert", str(folder), "-o", str(out), "--quant", "F32"]) == 0
    assert "note: config.json: rope_scaling.original_max_position_embeddings is missing" in capsys.readouterr().err
    assert read_gguf(out).number("context_length") == context
    assert {c.status for c in verify(out, folder, n_tokens=32)} == {"pass"}
    assert main(["inspect", str(folder)]) == 0
    assert "note: config.json: rope_scaling.original_max" in capsys.readouterr().out


# what config.json says, what convert says
BOOLEANS: dict[str, tuple[dict[str, Any], str]] = {
    "tied, as a word": (
        {"tie_word_embeddings": "false"},
        "tie_word_embeddings is 'false', not true or false: as a word it says false, but transformers 4 takes any text for true",
    ),
    "tied, as Python writes it": ({"tie_word_embeddings": "False"}, "tie_word_embeddings is 'False'"),
    "tied, a number": ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2, not true or false"),
    "tied, yes": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
    "biases": ({"attention_bias": "false"}, "attention_bias is 'false'"),
    "no activation": ({"hidden_act": None}, "hidden_act is null, which transformers fails on: write 'silu'"),
    "window": (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": "false"},
        "use_sliding_window is 'false'",
    ),
}


@pytest.mark.parametrize("case", BOOLEANS)
def test_booleans_in_words(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, message = BOOLEANS[case]
    folder = plain_checkpoint(tmp_path / "ck", **written)
    assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--quant", "F32", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("tied", ["true", "True", 1, 1.0])
def test_tied_however_it_is_written(tied: Any, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", tie_word_embeddings=True)
    values = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(values))
    out = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert "output.weight" not in read_gguf(out).tensors


def test_inspect_takes_the_flags_that_its_messages_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", **tiny.YARN)
    config = json.loads((folder / "config.json").read_text())
    block = config.get("rope_scaling") or config["rope_parameters"]
    factor, origin = block.pop("factor"), block["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--yarn-factor", str(factor)]
    assert main(["inspect", str(folder)]) == 2
    assert "pass --yarn-factor" in capsys.readouterr().err
    assert main(["inspect", str(folder), *flags, "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"].values()
    assert (part["factor"], part["original_context"]) == (factor, origin)
    out = tmp_path / "out.gguf"
    assert main(["convert", str(folder), "-o", str(out), "--quant", "F32", "--quiet", *flags]) == 0
    assert main(["inspect", str(out), *flags]) == 2
    assert "--yarn-factor: for checkpoints here" in capsys.readouterr().err
