"""Configs as they lie on the Hub -> RopeScaling, judged by transformers where it can read them; refusals by key."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest

from yarn_edge.checkpoint.dialects import (
    NOUS_LLAMA,
    NOUS_MISTRAL,
    TRANSFORMERS_V4,
    TRANSFORMERS_V5,
    ConfigFile,
    head_dim,
    recognise,
)
from yarn_edge.checkpoint.read import read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides
from yarn_edge.positions import rope

ROPE = "rope_scaling"
LLAMA_2_7B = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}
NOUS_YARN = {"factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True}
NOUS_7B_128K = LLAMA_2_7B | {
    "auto_map": {
        "AutoConfig": "configuration_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM",
    },
    ROPE: NOUS_YARN,
}
NOUS_MISTRAL_128K = MISTRAL_7B | {
    "auto_map": {
        "AutoConfig": "NousResearch/Yarn-Mistral-7b-128k--configuration_mistral.MistralConfig",
        "AutoModelForCausalLM": "NousResearch/Yarn-Mistral-7b-128k--modeling_mistral_yarn.MistralForCausalLM",
    },
    ROPE: {"factor": 16.0, "original_max_position_embeddings": 8192, "type": "yarn", "finetuned": True},
}
QWEN_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
S4 = 0.1 * math.log(4) + 1


def block(**fields):
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096} | fields


def llama(scaling=None, context=16384, **more):
    return LLAMA_2_7B | {"max_position_embeddings": context} | ({} if scaling is None else {ROPE: scaling}) | more


V5 = block(rope_theta=500000.0, beta_fast=16, beta_slow=2.0, truncate=False)
# config, expected fields, does transformers read it the same way
SAME, NOT = True, False
CONFIGS = {
    "plain llama 2": (LLAMA_2_7B, {"method": "none", "rope_theta": 10000.0, "original_context": 4096, "factor": 1.0},
        NOT),
    "plain qwen 2.5": (QWEN25_7B | {ROPE: None}, {"method": "none", "rope_theta": 1e6, "original_context": 32768}, NOT),
    "plain v5": (
        QWEN25_7B | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"method": "none", "rope_theta": 1e6}, NOT,
    ),
    "Yarn-Llama-2-7b-128k": (
        NOUS_7B_128K,
        {"factor": 32.0, "original_context": 4096, "attention_factor": 1.3465735902799727, "finetuned": True,
         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "rope_theta": 10000.0}, SAME,
    ),
    "Nous without its code": (LLAMA_2_7B | {ROPE: NOUS_YARN}, {"attention_factor": 1.3465735902799727}, SAME),
    "Nous attn_factor multiplies": (
        NOUS_7B_128K | {ROPE: NOUS_YARN | {"attn_factor": 1.5, "extrapolation_factor": 0.5, "beta_fast": 16}},
        {"attention_factor": 1.5 * 1.3465735902799727, "ext_factor": 0.5, "beta_fast": 16.0}, NOT,
    ),
    "Yarn-Mistral-7b-128k": (
        NOUS_MISTRAL_128K,
        {"factor": 16.0, "original_context": 8192, "attention_factor": 1.1940812105567847, "finetuned": True,
         "beta_fast": 128.0, "beta_slow": 2.0}, NOT,
    ),
    "v4 rope_type": (llama(block()), {"factor": 4.0, "attention_factor": S4, "finetuned": None, "ext_factor": 1.0},
        SAME),
    "v4 type": (llama({"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096.0}), {"factor": 4.0},
        SAME),
    "v4 both spelled": (llama(block(type="yarn")), {"method": "yarn"}, SAME),
    "v4 without original": (llama({"rope_type": "yarn", "factor": 8.0}), {"original_context": 16384, "factor": 8.0},
        SAME),
    "v4 original at the top": (
        llama({"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=4096), {"original_context": 4096},
            SAME,
    ),
    "v5": (
        llama(rope_parameters=V5),
        {"rope_theta": 500000.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, SAME,
    ),
    "v5 theta at the top": (llama(rope_parameters=block(), rope_theta=70000.0), {"rope_theta": 70000.0}, SAME),
    "v4 and v5 alike": (llama(block(), rope_parameters=block()), {"factor": 4.0}, SAME),
    "Qwen2.5 opt-in": (
        QWEN25_7B | {ROPE: QWEN_YARN}, {"factor": 4.0, "original_context": 32768, "attention_factor": S4, "dim": 128},
            SAME,
    ),
    "Qwen3 opt-in": (QWEN3_8B | {ROPE: QWEN_YARN}, {"factor": 4.0, "original_context": 32768, "rope_theta": 1e6}, SAME),
    "OLMo 3's block": (
        llama({"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
               "original_max_position_embeddings": 8192, "rope_type": "yarn"}, 65536, rope_theta=500000),
        {"attention_factor": 1.2079441541679836, "factor": 8.0}, SAME,
    ),
    "attention_factor replaces": (llama(block(attention_factor=0.8)), {"attention_factor": 0.8}, SAME),
    "mscale": (
        llama(block(mscale=0.707, mscale_all_dim=1.0)),
        {"attention_factor": (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1)}, SAME,
    ),
    "mscale twice the same": (llama(block(mscale=1.0, mscale_all_dim=1.0)), {"attention_factor": 1.0}, SAME),
    "mscale alone": (llama(block(mscale=2.0)), {"attention_factor": S4}, SAME),
    "mscale_all_dim 0": (llama(block(mscale=2.0, mscale_all_dim=0)), {"attention_factor": S4}, SAME),
    "factor null": (llama(block(factor=None)), {"factor": 4.0, "attention_factor": S4}, SAME),
    "factor 1": (llama(block(factor=1.0), 4096), {"factor": 1.0, "attention_factor": 1.0}, SAME),
    "nulls are absent": (llama(block(beta_fast=None, attention_factor=None)), {"beta_fast": 32.0}, SAME),
    "linear": (llama({"type": "linear", "factor": 2.0, "original_max_position_embeddings": 8192}), {"method": "linear", "factor": 2.0, "attention_factor": 1.0},
        SAME),
    "linear v5": (llama(rope_parameters={"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 4096}), {"method": "linear", "factor": 8.0},
        SAME),
}  # fmt: skip
HF_CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def near(value):
    return pytest.approx(value, rel=1e-15) if isinstance(value, float) else value


@pytest.mark.parametrize("config, want, _oracle", CONFIGS.values(), ids=CONFIGS)
def test_configs_of_the_wild(config, want, _oracle):
    before = copy.deepcopy(config)
    got = read_scaling(ConfigFile("config.json", config))
    want = {"method": "yarn", "dim": 128} | want
    assert {n: getattr(got, n) for n in want} == {n: near(v) for n, v in want.items()}
    assert config == before
    if got.method != "none":
        assert got.effective_fields().keys() - {"ramp"} <= got.provenance.keys(), "each value tells where it came from"


@pytest.mark.parametrize("name", [n for n, (_c, _w, oracle) in CONFIGS.items() if oracle])
def test_transformers_reads_it_alike(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS[name][0]
    ours = read_scaling(ConfigFile("config.json", config))
    theirs = getattr(transformers, HF_CLASSES[config["model_type"]]).from_dict(copy.deepcopy(config))
    inv_freq, a = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu")
    # Float32: five half-ulps, and the blend costs up to two more times the factor (see test_rope.float32_budget).
    np.testing.assert_allclose(rope.inv_freq(ours), inv_freq.double().numpy(), rtol=2.0**-24 * (5 + 2 * ours.factor))
    assert ours.attention_factor == pytest.approx(a, rel=1e-15)


@pytest.mark.parametrize(
    "config, siblings, want",
    [
        (NOUS_7B_128K, [], NOUS_LLAMA),
        (NOUS_MISTRAL_128K, [], NOUS_MISTRAL),
        (MISTRAL_7B | {ROPE: NOUS_YARN}, ["modeling_mistral_yarn.py"], NOUS_MISTRAL),
        (LLAMA_2_7B | {ROPE: block()}, ["modeling_llama_yarn.py", "README.md"], NOUS_LLAMA),
        (llama(block()), ["modeling_other.py"], TRANSFORMERS_V4),
        (llama(rope_parameters=block()), [], TRANSFORMERS_V5),
        (LLAMA_2_7B, [], TRANSFORMERS_V4),
        (llama(block(finetuned=False)), [], NOUS_LLAMA),
    ],
    ids=["nous-llama", "nous-mistral", "file-mistral", "file-llama", "v4", "v5", "plain", "finetuned"],
)
def test_recognise(config, siblings, want):
    assert recognise(ConfigFile("config.json", config, frozenset(siblings))) is want


@pytest.mark.parametrize(
    "config, want",
    [
        ({"head_dim": 96, "hidden_size": 1, "num_attention_heads": 3}, 96),
        ({"hidden_size": 576, "num_attention_heads": 9, "head_dim": None}, 64),
    ],
)
def test_head_dim(config, want):
    assert head_dim(ConfigFile("c", config)) == want


FLAGGED = {
    "plain Qwen2.5": (QWEN25_7B, {"factor": 4.0, "original_context": 32768},
                      {"method": "yarn", "factor": 4.0, "original_context": 32768, "attention_factor": S4,
                          "rope_theta": 1e6}),
    "with everything": (QWEN25_7B, {"factor": 4.0, "original_context": 8192, "attention_factor": 1.1, "beta_fast": 8.0,
                                    "beta_slow": 2.0, "ext_factor": 0.5},
                        {"original_context": 8192, "attention_factor": 1.1, "beta_fast": 8.0, "ext_factor": 0.5}),
    "another factor": (NOUS_7B_128K, {"factor": 16.0}, {"factor": 16.0, "attention_factor": 1.2772588722239781}),
    "another factor, 0.07": (NOUS_MISTRAL_128K, {"factor": 4.0}, {"attention_factor": 0.07 * math.log(4) + 1}),
    "another A": (llama(block(attention_factor=1.5)), {"attention_factor": 1.0}, {"attention_factor": 1.0,
        "factor": 4.0}),
    "another origin": (llama(block()), {"original_context": 2048}, {"original_context": 2048, "factor": 4.0}),
    "origin for Nous": (LLAMA_2_7B | {ROPE: {"type": "yarn", "factor": 32.0, "finetuned": True}},
                        {"original_context": 4096}, {"original_context": 4096}),
    "factor where it is missing": (llama({"rope_type": "yarn"}), {"factor": 2.0}, {"factor": 2.0}),
    "a contradiction settled": (llama(block(), 999999), {"factor": 4.0, "original_context": 4096}, {"factor": 4.0}),
    "None is no flag": (llama(block()), {"factor": None, "beta_fast": None}, {"factor": 4.0, "beta_fast": 32.0}),
}  # fmt: skip


@pytest.mark.parametrize("config, flags, want", FLAGGED.values(), ids=FLAGGED)
def test_flags_override(config, flags, want):
    got = read_scaling(ConfigFile("config.json", config), ScalingOverrides(**flags))
    assert {n: getattr(got, n) for n in want} == {n: near(v) for n, v in want.items()}
    for field, value in flags.items():
        flag = "--yarn-orig-ctx" if field == "original_context" else f"--yarn-{field.replace('_', '-')}"
        assert (got.provenance[field] == flag) == (value is not None)


C, P, V = "config.json: ", "config.json: rope_scaling.", "config.json: rope_parameters."
ORIGIN = P + "original_max_position_embeddings"
ERRORS = {
    "unknown type": (llama(block(rope_type="yarm")), P + "rope_type", "'yarm', which is unknown"),
    "type is a list": (llama(block(rope_type=["yarn"])), P + "rope_type", "['yarn']"),
    "type is an object": (llama(block(rope_type={})), P + "rope_type", "{}"),
    "no type": (llama({"factor": 4.0}), P + "rope_type", "is missing, but the block has factor"),
    "two types": (llama(block(type="linear")), P + "rope_type", "which one is right"),
    "unknown key": (llama(block(beta_quick=3)), P + "beta_quick", "is unknown here (value 3)"),
    "per layer type": (
        llama(rope_parameters={"full_attention": block(), "sliding_attention": {"rope_type": "default"}}),
        C + "rope_parameters", "differs by layer type (full_attention, sliding_attention)",
    ),
    "per layer type, one null": (llama(rope_parameters={"full_attention": block(), "x": None}), C + "rope_parameters",
        "layer type (full_attention, x), but layer_types names none"),
    "partial 0": (llama(partial_rotary_factor=0), C + "partial_rotary_factor", "is 0, expected"),
    "partial above 1": (llama(rope_parameters=block(partial_rotary_factor=1.5)), V + "partial_rotary_factor", "is 1.5, expected"),
    "partial odd": (llama(partial_rotary_factor=0.26), C + "hidden_size", "dim is 33"),
    "two partials": (llama(block(partial_rotary_factor=0.25), partial_rotary_factor=0.5), C + "rotated dimensions",
        "0.25 makes it 32 and config.json: hidden_size"),
    "mrope": (llama({"rope_type": "mrope"}), P + "rope_type", "is 'mrope': multimodal"),
    "proportional": (llama({"rope_type": "proportional", "factor": 4.0}), P + "rope_type", "is 'proportional': frequencies"),
    "dynamic-yarn of transformers": (llama(block(rope_type="dynamic-yarn")), P + "type", "only the Nous code has"),
    "block a string": (llama("yarn"), C + "rope_scaling", "'yarn', not an object"),
    "v5 block a list": (llama(rope_parameters=[1]), C + "rope_parameters", "[1], not an object"),
    "v5 block a string beside v4": (llama(block(), rope_parameters="x"), C + "rope_parameters", "not an object"),
    "both blocks": (llama(block(), rope_parameters=block(factor=8.0)), C + "rope_parameters",
        "and rope_scaling are both present and differ"),
    "Nous code, v5 block": (
        NOUS_7B_128K | {ROPE: None, "rope_parameters": block()}, C + "rope_parameters", "Nous Llama",
    ),
    "two thetas": (llama(rope_parameters=block(rope_theta=5e5), rope_theta=1e4), V + "rope_theta",
        "is 500000.0 and config.json: rope_theta is 10000.0"),
    "theta a list": (llama(block(), rope_theta=[1e4]), C + "rope_theta", "[10000.0], not a finite number"),
    "theta a string": (llama(rope_theta="10000"), C + "rope_theta", "'10000', not a finite number"),
    "two origins": (llama(block(), original_max_position_embeddings=2048), ORIGIN,
        "is 4096 and config.json: original_max_position_embeddings is 2048"),
    "origin a string": (llama(block(original_max_position_embeddings="4096")), ORIGIN, "'4096'"),
    "origin a list": (llama(block(original_max_position_embeddings=[4096])), ORIGIN, "[4096]"),
    "origin half a token": (llama(block(original_max_position_embeddings=4096.5)), ORIGIN, "4096.5"),
    "origin 0, factor null": (llama(block(original_max_position_embeddings=0, factor=None)), ORIGIN, "0"),
    "origin a string, factor null": (llama(block(original_max_position_embeddings="a", factor=None)), ORIGIN, "'a'"),
    "origin inf, factor null": (llama(block(original_max_position_embeddings=math.inf, factor=None)), ORIGIN, "inf"),
    "origin huge": (llama(block(original_max_position_embeddings=10**400)), ORIGIN, "must be from 1"),
    "Nous without origin": (LLAMA_2_7B | {ROPE: {"type": "yarn", "factor": 32.0, "finetuned": True}}, ORIGIN,
        "is missing; the Nous Llama code needs it: add it, or pass --yarn-orig-ctx"),
    "factor missing": (llama({"rope_type": "yarn", "original_max_position_embeddings": 4096}), P + "factor",
        "--yarn-factor"),
    "factor null without origin": (llama({"rope_type": "yarn", "factor": None}), P + "factor", "is missing"),
    "factor below 1": (llama(block(factor=0.25)), P + "factor", "below 1"),
    "factor 0": (llama(block(factor=0), 4096), P + "factor", "below 1"),
    "factor a string": (llama(block(factor="4")), P + "factor", "'4', not a number"),
    "factor true": (llama(block(factor=True)), P + "factor", "True, not a number"),
    "factor nan": (llama(block(factor=math.nan)), P + "factor", "nan"),
    "factor huge": (llama(block(factor=10**400)), P + "factor", "must be at most"),
    "context above the product": (llama(block(), 20000), C + "max_position_embeddings", "factor 4 makes it 16384"),
    "context below the origin": (llama(block(), 2048), C + "max_position_embeddings", "is 2048"),
    "context missing": ({"hidden_size": 64, "num_attention_heads": 1}, C + "max_position_embeddings", "is missing"),
    "context a string": (llama(context="4096"), C + "max_position_embeddings", "whole number above 0"),
    "heads missing": ({"hidden_size": 64, "max_position_embeddings": 64}, C + "num_attention_heads", "is missing"),
    "heads do not divide": (llama(num_attention_heads=33), C + "hidden_size", "not divisible"),
    "head_dim odd": (llama(head_dim=63), C + "head_dim", "63"),
    "extrapolation_factor in a transformers config": (llama(block(extrapolation_factor=0.5)), P + "extrapolation_factor",
        "the Nous code reads it and gets ext_factor 0.5, transformers does not read it and gets 1: remove it, or pass --yarn-ext-factor"),
    "attention_factor in a Nous config": (NOUS_7B_128K | {ROPE: NOUS_YARN | {"attention_factor": 1.2}},
        P + "attention_factor", "transformers reads it and gets attention_factor 1.2, the Nous Llama code, which this checkpoint names, does not read it and gets 1.34657"),
    "linear with attention_factor": (llama({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.2}),
        P + "attention_factor", "no meaning"),
    "attention_factor a string": (llama(block(attention_factor="1")), P + "attention_factor", "not a number"),
    "betas crossed": (llama(block(beta_fast=1, beta_slow=32)), P + "beta_fast", "must not be below beta_slow"),
    "truncate a string": (llama(block(truncate="false")), P + "truncate", "not true or false"),
    "ext_factor the factor": (NOUS_7B_128K | {ROPE: NOUS_YARN | {"extrapolation_factor": 32.0}},
        P + "extrapolation_factor", "looks like the factor itself"),
}  # fmt: skip


@pytest.mark.parametrize("config, key, part", ERRORS.values(), ids=ERRORS)
def test_refusals_name_the_key_and_the_value(config, key, part):
    with pytest.raises(YarnEdgeError) as caught:
        read_scaling(ConfigFile("config.json", config))
    assert str(caught.value).startswith(key)
    assert part in str(caught.value)
    assert str(caught.value).isprintable()


FLAG_ERRORS = {
    "factor alone": (QWEN25_7B, {"factor": 4.0}, "--yarn-orig-ctx is needed too"),
    "origin alone": (QWEN25_7B, {"original_context": 32768}, "--yarn-factor is needed too"),
    "betas alone": (QWEN25_7B, {"beta_fast": 8.0}, "--yarn-factor is needed too"),
    "origin above the context": (QWEN25_7B, {"factor": 4.0, "original_context": 65536}, "below --yarn-orig-ctx 65536"),
    "factor below 1": (
        QWEN25_7B,
        {"factor": 0.25, "original_context": 32768},
        "--yarn-factor: factor is 0.25, below 1",
    ),
    "factor nan": (QWEN25_7B, {"factor": math.nan, "original_context": 32768}, "--yarn-factor: factor is nan"),
    "A of another factor": (llama(block(attention_factor=1.2)), {"factor": 8.0}, "pass --yarn-attention-factor too"),
    "ext_factor": (
        QWEN25_7B,
        {"factor": 4.0, "original_context": 32768, "ext_factor": 4.0},
        "--yarn-ext-factor: ext_factor",
    ),
    "beta": (llama(block()), {"beta_slow": 0.0}, "--yarn-beta-slow: beta_slow is 0.0"),
}


@pytest.mark.parametrize("config, flags, part", FLAG_ERRORS.values(), ids=FLAG_ERRORS)
def test_bad_flags_are_named(config, flags, part):
    with pytest.raises(YarnEdgeError, match=re.escape(part)):
        read_scaling(ConfigFile("config.json", config), ScalingOverrides(**flags))
