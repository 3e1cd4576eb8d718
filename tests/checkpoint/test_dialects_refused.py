"""Contradictions are refused with both values, hostile values with a YarnEdgeError, quickly."""

from __future__ import annotations

import copy
import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}
SU = {"type": "su", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 4096}
PHI3 = LLAMA | {"model_type": "phi3", "original_max_position_embeddings": 4096}
MLA = LLAMA | {"model_type": "deepseek_v3", "qk_rope_head_dim": 64}
OLMO3 = LLAMA | {"model_type": "olmo3"}
NOUS_MISTRAL = {"auto_map": {"AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM"}}
NOUS = {"auto_map": {"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"}}
LAYERS = {"layer_types": ["full_attention", "sliding_attention"]}


def scaled(**block):
    return {"rope_scaling": block}


# config, every part that the message must have
CONTRADICTIONS = {
    "dynamic NTK's origin": (LLAMA | scaled(rope_type="dynamic", factor=2.0, original_max_position_embeddings=4096),
        ["original_max_position_embeddings is 4096", "max_position_embeddings 8192"]),
    "dynamic YaRN, fine-tuned": (LLAMA | NOUS | scaled(**YARN | {"rope_type": "dynamic-yarn"}, finetuned=True),
        ["is 4096", "max_position_embeddings 8192", "finetuned True", "use type yarn"]),
    "dynamic without factor": (LLAMA | scaled(rope_type="dynamic"), ["rope_scaling.factor is missing: add it"]),
    "rotary_dim": (LLAMA | {"rotary_dim": 32, "partial_rotary_factor": 0.5}, ["makes it 64", "rotary_dim makes it 32"]),
    "rotary_dim above the head": (LLAMA | {"rotary_dim": 256}, ["256", "a head of 128"]),
    "text_config and the top": (LLAMA | {"rope_theta": 1e4, "text_config": LLAMA | {"rope_theta": 1e6}},
        ["rope_theta is 10000.0 and text_config.rope_theta is 1000000.0"]),
    "Phi-3 without origin at the top": (
        LLAMA | {"model_type": "phi3"} | scaled(**SU | {"original_max_position_embeddings": 2048}),
        ["is 2048", "transformers' default for phi3", "is 4096"]),
    "llama3 origin": (LLAMA | scaled(**LLAMA3 | {"original_max_position_embeddings": 16384}), ["16384", "8192"]),
    "llama3 crossed": (LLAMA | scaled(**LLAMA3 | {"high_freq_factor": 0.5}), ["high_freq_factor is 0.5", "low_freq_factor is 1"]),
    "llama3 low 0": (LLAMA | scaled(**LLAMA3 | {"low_freq_factor": 0}), ["low_freq_factor is 0.0"]),
    "llama3 with betas": (LLAMA | scaled(**LLAMA3, beta_fast=32), ["beta_fast is 32", "no meaning", "'llama3'"]),
    "longrope table length": (PHI3 | scaled(**SU | {"long_factor": [1.0] * 48}), ["long_factor has 48 numbers, expected 64"]),
    "longrope table missing": (PHI3 | scaled(type="longrope", long_factor=[1.0] * 64), ["short_factor is missing"]),
    "longrope table a number": (PHI3 | scaled(**SU | {"long_factor": 2.0}), ["long_factor is 2.0, not a list"]),
    "longrope entry": (PHI3 | scaled(**SU | {"long_factor": [1.0] * 63 + ["a"]}), ["long_factor[63] is 'a'"]),
    "phi3 yarn is longrope": (PHI3 | scaled(**YARN), ["short_factor is missing"]),
    "phimoe's own factors": (LLAMA | {"model_type": "phimoe"} | scaled(**SU, short_mscale=1.2), ["short_mscale is unknown"]),
    "OLMo 3, flat v5": (OLMO3 | {"rope_parameters": YARN}, ["one block for all layers", "olmo3", "nest it"]),
    "OLMo 3, another base": (OLMO3 | scaled(**YARN) | {"rope_theta": 1e4}, ["rope_theta is 10000.0", "500000"]),
    "OLMo 3 and flags": (OLMO3 | scaled(**YARN), ["differ by layer type (full_attention, sliding_attention)"], {"factor": 2.0}),
    "Laguna, flat": (LLAMA | {"model_type": "laguna", "rope_parameters": YARN}, ["laguna", "nest it"]),
    "nested truncate": (LLAMA | LAYERS | {"rope_parameters": dict.fromkeys(LAYERS["layer_types"], YARN | {"truncate": False})},
        ["full_attention.truncate is False", "beside the layer types"]),
    "nested and flat": (LLAMA | LAYERS | {"rope_parameters": {"full_attention": YARN, "factor": 2.0}},
        ["factor is unknown here (value 2.0) beside layer types"]),
    "flat truncate, OLMo 3": (OLMO3 | scaled(**YARN, truncate=False), ["rope_scaling.truncate is False", "nests the block of olmo3"]),
    "flat truncate, Gemma 3": (LLAMA | {"model_type": "gemma3_text"} | scaled(**YARN, truncate=None), ["truncate is None", "nests the block of gemma3_text"]),
    "a ramp backwards, L": (LLAMA | scaled(**YARN | {"original_max_position_embeddings": 1, "factor": 8192.0}),
        ["correction dimension 0 and end at -12", "original_context 1 (config.json: rope_scaling.orig", "rope_theta 10000 (transformers' default for llama)"]),
    "a ramp backwards, theta": (LLAMA | {"rope_theta": 1.01} | scaled(**YARN),
        ["start at correction dimension 19386 and end at 127", "rope_theta 1.01 (config.json: rope_theta)"]),
    "a ramp backwards, flags": (LLAMA, ["end at -12", "original_context 1 (--yarn-orig-ctx)"], {"factor": 4.0, "original_context": 1}),
    "gpt_neox, two bases": (LLAMA | {"model_type": "gpt_neox", "rotary_emb_base": 25000, "rope_theta": 1e4},
        ["rotary_emb_base is 25000", "rope_theta is 10000.0"]),
    "gpt_neox, a base it does not read": (LLAMA | {"model_type": "gpt_neox", "rope_theta": 1e6},
        ["transformers' default for gpt_neox is 10000", "rope_theta is 1000000.0"]),
    "gpt_neox, base a string": (LLAMA | {"model_type": "gpt_neox", "rotary_emb_base": "1e4"}, ["rotary_emb_base is '1e4'"]),
    "layer type without block": (LLAMA | LAYERS | {"rope_parameters": {"full_attention": YARN}},
        ["no block for sliding_attention"]),
    "layer_types a number": (LLAMA | {"layer_types": 3, "rope_parameters": {"x": YARN}}, ["layer_types is 3"]),
    "latent attention unknown": (MLA | {"model_type": "strange"}, ["qk_rope_head_dim is 64", "'strange'"]),
    "latent attention without size": (LLAMA | {"model_type": "deepseek_v3"}, ["qk_rope_head_dim is missing"]),
    "llama_4_scaling in llama": (LLAMA | scaled(**YARN, llama_4_scaling_beta=0.1), ["llama_4_scaling_beta is unknown here"]),
    "telechat with mscale": (LLAMA | scaled(**YARN | {"rope_type": "telechat3-yarn"}, mscale=1.0), ["mscale is 1.0", "no meaning"]),
    "telechat without origin": (LLAMA | scaled(type="telechat3-yarn", factor=2.0), ["original_max_position_embeddings is missing"]),
    "mrope": (LLAMA | scaled(type="mrope", mrope_section=[16, 24, 24]), ["'mrope': multimodal"]),
    "proportional": (LLAMA | scaled(rope_type="proportional"), ["'proportional'"]),
    "code of another": (LLAMA | {"auto_map": {"AutoModelForCausalLM": ["a"]}}, ["auto_map names", "remove auto_map"]),
    "freezing what is static": (LLAMA | scaled(**YARN), ["--freeze-at 4096", "yarn", "leave it out"], None, 4096),
    "freezing what is plain": (LLAMA, ["--freeze-at 4096", "none"], None, 4096),
    "freezing beyond LongRoPE": (PHI3 | scaled(**SU), ["--freeze-at 10000", "8192"], None, 10000),
    "freezing at nothing": (LLAMA | scaled(type="dynamic", factor=2.0), ["--freeze-at is 0"], None, 0),
    "flags on dynamic": (LLAMA | scaled(type="dynamic", factor=2.0), ["dynamic-ntk", "for YaRN"], {"factor": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_name_both_values(name):
    config, parts, flags, freeze_at = (*CONTRADICTIONS[name], None, None)[:4]
    with pytest.raises(YarnEdgeError) as caught:
        read_scaling(ConfigFile("config.json", config), ScalingOverrides(**(flags or {}), freeze_at=freeze_at))
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).isprintable()


def params(**changes):
    yarn = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
    values = {"dim": 4096, "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 262144, "yarn": yarn}
    return (
        values
        | {k: v for k, v in changes.items() if k in ("rope_theta", "max_position_embeddings", "qk_rope_head_dim")}
        | {"yarn": yarn | {k: v for k, v in changes.items() if k in ("factor", "apply_scale", "beta", "swirl")}}
    )


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"factor": None}, "yarn.factor is missing"),
        ({"apply_scale": "no"}, "yarn.apply_scale is 'no'"),
        ({"swirl": 1}, "yarn.swirl is unknown here"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"max_position_embeddings": 300000}, "makes it 262144"),
        ({"qk_rope_head_dim": 64}, "qk_rope_head_dim is 64"),
        ({"beta": 0.5}, "yarn.beta: beta_fast 0.5"),
        ({"factor": "x"}, "yarn.factor: factor is 'x'"),
    ],
    ids=str,
)
def test_params_json_refused(changes, part):
    with pytest.raises(YarnEdgeError) as caught:
        read_scaling(ConfigFile("params.json", params(**changes)))
    assert part in str(caught.value)


# ---- hostile values

DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]
HOSTILE = [
    10**400,
    10**5000,
    -(10**400),
    -1,
    0,
    1e308,
    1e-320,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "4",
    "x" * 1_000_000,
    "\n\x00\x1b[2J",
    [],
    [1] * 100_000,
    {},
    {"a": {"b": {}}},
    DEEP,
    {"full_attention": DEEP},
    3.5,
]
TARGETS = {
    "yarn": LLAMA
    | scaled(**YARN, beta_fast=32, beta_slow=1, truncate=True, attention_factor=1.1, mscale=1.0, mscale_all_dim=1.0),
    "nous": LLAMA
    | NOUS
    | {"rope_theta": 1e4}
    | scaled(**YARN, extrapolation_factor=1.0, attn_factor=1.1, finetuned=True),
    "llama3": LLAMA | scaled(**LLAMA3),
    "longrope": PHI3 | scaled(**SU),
    "dynamic": LLAMA | scaled(type="dynamic", factor=2.0),
    "latent": MLA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4}},
    "nested": LLAMA
    | LAYERS
    | {
        "partial_rotary_factor": 0.5,
        "rotary_dim": 64,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "gemma": LLAMA | {"model_type": "gemma3_text", "head_dim": 128, "rope_local_base_freq": 1e4},
    "text": {
        "model_type": "mistral3",
        "text_config": LLAMA
        | {
            "model_type": "ministral3",
            "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 8192},
        },
    },
    "params": params(),
}


def paths(value, prefix=()):
    for key, inner in value.items():
        yield (*prefix, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*prefix, key))


CASES = [(name, path) for name, config in TARGETS.items() for path in paths(config)]


def read_everything(name, config):
    """Read with no flags, with flags, and frozen; refusals are one line."""
    file = ConfigFile("params.json" if name == "params" else "config.json", config)
    said = []
    for overrides in (ScalingOverrides(), ScalingOverrides(2.0, 4096), ScalingOverrides(freeze_at=4096)):
        try:
            for scaling in read_positions(file, overrides).parts.values():
                scaling.as_dict()
        except YarnEdgeError as error:
            said.append(str(error))
    assert all(len(text) <= 2000 and text.isprintable() for text in said)


@pytest.mark.parametrize("name, path", CASES, ids=[f"{n}-{'.'.join(p)}" for n, p in CASES])
def test_hostile_values_are_refused_quickly(name, path):
    for value in HOSTILE:
        config = copy.deepcopy(TARGETS[name])
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        start = time.process_time()
        read_everything(name, config)
        assert time.process_time() - start < 2, f"{path} = {type(value)}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300, database=None)
@given(st.sampled_from(CASES), json_values, st.text(max_size=10))
def test_any_json_is_read_or_refused(case, value, new_key):
    name, path = case
    config = copy.deepcopy(TARGETS[name])
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    inner[new_key] = value
    read_everything(name, json.loads(json.dumps(config)))


def test_the_targets_are_good():
    for name, config in TARGETS.items():
        file = ConfigFile("params.json" if name == "params" else "config.json", config)
        assert read_positions(file).parts, name
